"""Checks of constructor arguments, and the one rule for reduced channel counts.

Every message names the argument, the rule and the value it got, and where there is one, the likely mend.
"""

import difflib
import math
from collections.abc import Iterable


def unknown_message(what: str, name: object, choices: Iterable[str]) -> str:
    """Return the message for a name that is not among `choices`: the closest one, then all of them.

    Example:
        >>> unknown_message("attention block", "sa", ["se", "eca"])
        "unknown attention block 'sa': did you mean 'se'? Choices: se, eca"
    """
    choices = list(choices)
    if not choices:
        return f"unknown {what} {name!r}: it has none"
    closest = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    hint = f"did you mean {closest[0]!r}? " if closest else ""
    return f"unknown {what} {name!r}: {hint}Choices: {', '.join(choices)}"


def positive_int(name: str, value: int) -> int:
    """Return `value`, an integer of at least 1.

    Raises:
        ValueError: if it is no integer or below 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return value


def positive_odd(name: str, value: int) -> int:
    """Return `value`, an odd integer of at least 1: the kernel sizes that keep a map's size.

    Raises:
        ValueError: if it is no integer, even or below 1.
    """
    if positive_int(name, value) % 2 == 0:
        raise ValueError(f"{name} must be odd to keep the size, got {value!r}; use {value - 1} or {value + 1}")
    return value


def positive_float(name: str, value: float) -> float:
    """Return `value`, a finite number above 0.

    Raises:
        ValueError: if it is no number, not finite, or not above 0.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
    return float(value)


def reduced_channels(channels: int, reduction: int, minimum: int = 1) -> int:
    """Return max(channels // reduction, minimum), the width of a bottleneck.

    Args:
        channels: C, at least 1.
        reduction: r, at least 1; one above C gives `minimum`.
        minimum: the least width, at least 1 (SK's L).

    Raises:
        ValueError: if an argument is no integer of at least 1.

    Example:
        >>> reduced_channels(64, 16), reduced_channels(3, 16), reduced_channels(64, 16, minimum=32)
        (4, 1, 32)
    """
    return max(
        positive_int("channels", channels) // positive_int("reduction", reduction), positive_int("minimum", minimum)
    )


def largest_divisor(channels: int, limit: int) -> int:
    """Return the largest divisor of `channels` that is not above `limit`, both at least 1.

    Example:
        >>> largest_divisor(256, 32), largest_divisor(48, 32), largest_divisor(257, 32)
        (32, 24, 1)
    """
    return max(divisor for divisor in range(1, limit + 1) if channels % divisor == 0)
