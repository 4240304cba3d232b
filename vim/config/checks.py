"""Checks of settings: each error names the setting, the rule and the value."""

import math
from collections.abc import Callable
from typing import Any, get_args


def check(name: str, value: Any, rule: str, holds: Callable[[Any], bool]) -> None:
    """Raise an error that names the setting, the rule and the value, unless the rule holds.

    Rules state what must hold, so that a NaN, which fails every comparison, is refused.

    Raises:
        ValueError: The rule does not hold.
        TypeError: The rule cannot be applied to the type of the value.
    """
    message = f"{name} must be {rule}, got {value!r}"
    try:
        right = holds(value)
    except TypeError as error:
        raise TypeError(message) from error
    if not right:
        raise ValueError(message)


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise unless the value is one of the values of a `Literal`."""
    allowed = get_args(choices)
    check(name, value, "one of " + ", ".join(repr(choice) for choice in allowed), lambda v: v in allowed)


def check_finite(name: str, value: Any) -> None:
    """Raise unless the number, or each number of a tuple, is finite; YAML spells infinity `.inf`."""
    check(name, value, "finite", lambda v: all(-math.inf < x < math.inf for x in (v if isinstance(v, tuple) else (v,))))


def check_positive(name: str, value: Any) -> None:
    """Raise unless the value is positive and finite."""
    check(name, value, "> 0", lambda v: v > 0)
    check_finite(name, value)


def check_not_negative(name: str, value: Any) -> None:
    """Raise unless the value is non-negative and finite."""
    check(name, value, ">= 0", lambda v: v >= 0)
    check_finite(name, value)


def check_fraction(name: str, value: Any) -> None:
    """Raise unless the value is in [0, 1]."""
    check(name, value, "between 0 and 1", lambda v: 0 <= v <= 1)


def check_range(name: str, value: tuple[float, float], upper: float = math.inf) -> None:
    """Raise unless the value is a pair of positive finite numbers, lower first, up to `upper`."""
    rule = "two numbers, 0 < low <= high" + ("" if upper == math.inf else f" <= {upper:g}")
    check(name, value, rule, lambda v: len(v) == 2 and 0 < v[0] <= v[1] <= upper)
    check_finite(name, value)
