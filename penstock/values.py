"""Converts callers' values to plain Python: numbers, flags, strings and token ids. Raises `RequestError` for others.

Knows no parameter. Results are of built-in types, so that no method of a caller's class runs later, on a thread of the
engine. Called where parameters are made, on the caller's thread.

A number is an `int`, a `float`, or a scalar of numpy or torch that holds one; never a bool, a `Decimal` or a fraction.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, Protocol, TypeVar, cast

from penstock.errors import RequestError, shown

LARGEST_COUNT = 2**31 - 1
LARGEST_ID = 2**31 - 1
MAX_ITEMS = 1 << 22  # of a list, so that an endless iterator is refused
_PLAIN = frozenset({bool, int, float, str, type(None)})


T = TypeVar("T")


class _Scalar(Protocol):
    """A scalar of numpy or torch."""

    shape: tuple[int, ...]

    def item(self) -> object: ...


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: the one that was probably meant, or nothing."""
    matches = difflib.get_close_matches(name, list(names), n=1)
    return f": did you mean {matches[0]!r}?" if matches else ""


def suggests_keywords(cls: type[T]) -> type[T]:
    """A class whose constructor answers an unknown keyword with a `TypeError` that names the nearest known one."""
    construct = cls.__init__
    names = list(inspect.signature(cls).parameters)

    @functools.wraps(construct)
    def explained(self: T, *args: object, **keywords: object) -> None:
        if unknown := keywords.keys() - names:
            raise TypeError(f"{cls.__name__} has no parameter {min(unknown)!r}{nearest(min(unknown), names)}")
        construct(self, *args, **keywords)

    cls.__init__ = explained  # type: ignore[assignment]
    return cls


def plain(value: object) -> object:
    """The Python value of a scalar of numpy or torch; anything else unchanged."""
    if type(value) in _PLAIN:
        return value
    try:
        scalar = cast(_Scalar, value)
        return scalar.item() if scalar.shape == () else value
    except Exception:
        return value


def integer(name: str, value: object, low: int, high: int = LARGEST_COUNT, rule: str = "") -> int:
    """An integer from `low` to `high`; `rule` is that condition in words."""
    number = plain(value)
    if isinstance(number, int) and not isinstance(number, bool):
        number = int.__index__(number)
        if low <= number <= high:
            return number
    raise refused(name, value, rule or f"an integer from {low} to {high}")


def real(name: str, value: object, low: float, high: float, rule: str) -> float:
    """A number from `low` to `high`, both finite or not, that a float can hold; `rule` is that condition in words."""
    number = plain(value)
    if isinstance(number, int | float) and not isinstance(number, bool):
        try:
            number = float.__float__(number) if isinstance(number, float) else float(int.__index__(number))
        except OverflowError:
            number = math.nan
        if low <= number <= high:
            return number
    raise refused(name, value, rule)


def flag(name: str, value: object) -> bool:
    """True or False, for which 1 and 0 may stand."""
    number = plain(value)
    if isinstance(number, int) and int.__index__(number) in (0, 1):
        return bool(int.__index__(number))
    raise refused(name, value, "True or False")


def bare(value: object) -> object:
    """A string as a plain `str`; anything else unchanged."""
    return str.__str__(value) if isinstance(value, str) else value


def text(name: str, value: object) -> str:
    """A string."""
    if not isinstance(value, str):
        raise refused(name, value, "a string")
    return str.__str__(value)


def split_names(value: object) -> object:
    """The names in a text, separated by commas, or in a list of such texts; anything else unchanged."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or not all(isinstance(value, str) for value in values):
        return value
    return tuple(name for value in values for part in value.split(",") if (name := part.strip()))


def items(name: str, values: object) -> tuple[Any, ...]:
    """The items of a list, an array or any other iterable, of any type; none of None."""
    if values is None:
        return ()
    if isinstance(values, str | bytes | Mapping):
        raise refused(name, values, "a list")
    try:
        iterable = values.tolist() if hasattr(values, "tolist") else values
        elements = tuple(islice(cast(Iterable[object], iterable), MAX_ITEMS + 1))
    except Exception:
        raise refused(name, values, "a list") from None
    if len(elements) > MAX_ITEMS:
        raise refused(name, values, f"a list of at most {MAX_ITEMS} items")
    return elements


def token_ids(name: str, values: object) -> tuple[int, ...]:
    """The ids of a list or an array; their order is kept."""
    ids = items(name, values)
    if set(map(type, ids)) <= {int} and (not ids or (min(ids) >= 0 and max(ids) <= LARGEST_ID)):
        return ids
    return tuple(integer(f"each of {name}", item, 0, LARGEST_ID, "a token id, an integer >= 0") for item in ids)


def refused(name: str, value: object, rule: str) -> RequestError:
    """The error for a value that does not follow a rule. `name` ends with the parameter: "each of stop_token_ids"."""
    return RequestError(f"{name} must be {rule}, got {shown(value)}", parameter=name.rpartition(" ")[2])
