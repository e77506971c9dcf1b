"""From what a config says ("se", or {"name": "se", "reduction": 8}) to a name and options, with errors that help."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from seg_attn.attention.arguments import unknown_message


def options_of(block: type[nn.Module]) -> list[str]:
    """Return the names of a block's own options: everything it takes besides `channels`."""
    return [name for name in inspect.signature(block).parameters if name != "channels"]


def parse_spec(
    registry: Mapping[str, type[nn.Module]], what: str, spec: Any, extra: Mapping[str, Any] | None = None
) -> tuple[str, dict[str, Any]]:
    """Split a name or {"name": ..., **options} into a known name and options that its block has.

    Args:
        registry: name → class.
        what: what the registry holds, for the messages.
        spec: a name, or a mapping with the key "name".
        extra: more options; those in `spec` win over them.

    Returns:
        The name, and the options.

    Raises:
        ValueError: if `spec` is neither form, or the name or an option is unknown (with the closest match and all
            choices).
    """
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping) or "name" not in spec:
        choices = ", ".join(registry)
        raise ValueError(f"{what} must be a name or {{'name': ..., **options}}, got {spec!r}. Choices: {choices}")
    given = {**(extra or {}), **spec}
    name = given.pop("name")
    if name not in registry:
        raise ValueError(unknown_message(what, name, registry))
    known = options_of(registry[name])
    for option in given:
        if option not in known:
            raise ValueError(unknown_message(f"option of {what} {name!r}", option, known))
    return name, given
