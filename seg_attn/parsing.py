"""What jsonargparse's parsers say, in words for the person who typed the arguments."""

import re
from collections.abc import Iterable
from typing import Any

_KEY = re.compile(r'Parser key "([^"]+)":')
_STRUCTURE = re.compile(
    r"Parser key|Does not validate against|Subtypes:|Errors:|Given value|Expected a (<class 'NoneType'>|path but)"
)
_CLASS = re.compile(r"Expected a dot import path string: (.*)")
_EXPECTED = re.compile(r"Expected a (.*?)(?:\. Got value: (.*))?")
_TYPE = re.compile(r"<class '(?:[\w.]+\.)?(\w+)'>|typing\.Literal\[(.*)\]")


def readable(error: str) -> str:
    r"""Turn the text of a parser's error, a tree of union subtypes, into one line: the argument, the rule, the value.

    What is no such tree is returned as it is.

    Examples:
        >>> readable('Parser key "model.lr":\n  Expected a <class \'float\'>. Got value: x')
        'model.lr: expected float, got x'
    """
    key = ".".join(_KEY.findall(error))
    lines = [_CLASS.sub(r"Expected a known class. Got value: \1", line.strip(" -")) for line in error.splitlines()]
    leaves = list(dict.fromkeys(line for line in lines if line and not _STRUCTURE.match(line)))
    expected = [found for found in map(_EXPECTED.fullmatch, leaves) if found]
    others = [leaf for leaf in leaves if not _EXPECTED.fullmatch(leaf)]
    if not key or not leaves:
        return error
    if any(not other.endswith(":") for other in others):  # "Problem with given class_path ...:" says too little
        return f"{key}: {' '.join(others)}"
    rules = list(dict.fromkeys(_TYPE.sub(r"\1\2", found[1]) for found in expected))
    values = [found[2] for found in expected if found[2]] or re.findall("Given value: (.*)", error)
    return f"{key}: expected {' or '.join(rules)}, got {values[0]}"


def show_choices(parser: Any, argument: str, what: str, choices: Iterable[str]) -> None:
    """Add to an argument's help what it may name at this moment, from the registry that knows."""
    (action,) = (action for action in parser._actions if action.dest == argument)
    action.help = f"{action.help} {what}: {', '.join(choices)}."
