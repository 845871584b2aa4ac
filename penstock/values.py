"""Callers' values as plain Python: numbers, flags, texts and token ids, refused where they are not what they should be.

Knows no parameter. What it returns is of built-in types, so that no method of a caller's runs later, on a thread of the
engine. Called where parameters are made, on the caller's thread; every function raises `RequestError`.

A number is an `int`, a `float`, or a scalar of numpy or torch that holds one; never a bool, a `Decimal` or a fraction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import islice
from typing import Any

from penstock.errors import RequestError, shown

LARGEST_COUNT = 2**31 - 1
LARGEST_ID = 2**31 - 1
MOST_ITEMS = 1 << 22  # of a list, so that an endless iterator is refused
_PLAIN = frozenset({bool, int, float, str, type(None)})


def plain(value: Any) -> Any:
    """What a scalar of numpy or torch holds; anything else as it is."""
    if type(value) in _PLAIN:
        return value
    try:
        return value.item() if value.shape == () else value
    except Exception:
        return value


def integer(name: str, value: Any, low: int, high: int = LARGEST_COUNT, rule: str = "") -> int:
    """An integer from `low` to `high`; `rule` says so in words."""
    number = plain(value)
    if isinstance(number, int) and not isinstance(number, bool):
        number = int.__index__(number)
        if low <= number <= high:
            return number
    raise refused(name, value, rule or f"an integer from {low} to {high}")


def real(name: str, value: Any, low: float, high: float, rule: str) -> float:
    """A number from `low` to `high`, both finite or not, that a float can hold; `rule` says so in words."""
    number = plain(value)
    if isinstance(number, int | float) and not isinstance(number, bool):
        try:
            number = float.__float__(number) if isinstance(number, float) else float(int.__index__(number))
        except OverflowError:
            number = math.nan
        if low <= number <= high:
            return number
    raise refused(name, value, rule)


def flag(name: str, value: Any) -> bool:
    """True or False; 1 and 0 stand for them."""
    found = plain(value)
    if isinstance(found, int) and int.__index__(found) in (0, 1):
        return bool(int.__index__(found))
    raise refused(name, value, "True or False")


def bare(value: Any) -> Any:
    """A string without methods of its own; anything else as it is."""
    return str.__str__(value) if isinstance(value, str) else value


def text(name: str, value: Any) -> str:
    """A string."""
    if not isinstance(value, str):
        raise refused(name, value, "a string")
    return str.__str__(value)


def items(name: str, values: Any) -> tuple[Any, ...]:
    """The items of a list, an array or any other iterable; none of None."""
    if values is None:
        return ()
    if not isinstance(values, str | bytes | Mapping):
        try:
            found = tuple(islice(values.tolist() if hasattr(values, "tolist") else values, MOST_ITEMS + 1))
        except Exception:
            raise refused(name, values, "a list") from None
        if len(found) <= MOST_ITEMS:
            return found
    raise refused(name, values, f"a list of at most {MOST_ITEMS} items")


def token_ids(name: str, values: Any) -> tuple[int, ...]:
    """The ids of a list or an array; their order is kept."""
    found = items(name, values)
    if set(map(type, found)) <= {int} and (not found or (min(found) >= 0 and max(found) <= LARGEST_ID)):
        return found
    return tuple(integer(f"each of {name}", item, 0, LARGEST_ID, "a token id, an integer >= 0") for item in found)


def refused(name: str, value: Any, rule: str) -> RequestError:
    """The error that says what a value must be."""
    return RequestError(f"{name} must be {rule}, got {shown(value)}")
