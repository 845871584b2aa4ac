"""`ResponseCache`: results of earlier requests, the least recently used dropped first; `frozen` makes their keys.

Knows no engine and no result: a key says everything on which a result depends, and a function copies results. The one
part of `cache` that callers use from their own threads, and therefore has a lock. Called by `InferenceModule`.
"""

from __future__ import annotations

import dataclasses
import enum
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Generic, TypeVar

V = TypeVar("V")
_SCALARS = (int, float, complex, str, bytes, bool, type(None))


class Unfreezable(TypeError):
    """A value that has no frozen form, because it may change or cannot be compared."""


class ResponseCache(Generic[V]):
    """At most `max_size` values by key. Values are copied when they are put and when they are read.

    Every method may be called from any thread. `num_hits` and `num_misses` count the calls of `get`.
    """

    def __init__(self, max_size: int, copy: Callable[[V], V]) -> None:
        self.max_size = max_size
        self.num_hits = 0
        self.num_misses = 0
        self._copy = copy
        self._values: OrderedDict[Hashable, V] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> V | None:
        """A copy of the value, which is then the most recently used; None for an unknown key."""
        with self._lock:
            value = self._values.get(key)
            if value is None:
                self.num_misses += 1
                return None
            self.num_hits += 1
            self._values.move_to_end(key)
        return self._copy(value)  # stored values are never changed, so they are copied without the lock

    def put(self, key: Hashable, value: V) -> None:
        """Keep a copy of the value, as the most recently used, and drop the least recently used beyond `max_size`."""
        if self.max_size == 0:
            return
        stored = self._copy(value)
        with self._lock:
            self._values[key] = stored
            self._values.move_to_end(key)
            while len(self._values) > self.max_size:
                self._values.popitem(last=False)

    def clear(self) -> None:
        """Drop all values."""
        with self._lock:
            self._values.clear()

    def __contains__(self, key: Hashable) -> bool:
        with self._lock:
            return key in self._values

    def __len__(self) -> int:
        with self._lock:
            return len(self._values)

    def __repr__(self) -> str:
        return f"<ResponseCache of {len(self)} results, at most {self.max_size}>"


def frozen(value: object) -> Hashable:
    """A hashable form of plain data, equal only for equal data: 1, 1.0 and True differ, as do "1" and ["1"].

    Mappings keep their order, which may show in a rendered prompt. Raises `Unfreezable` for anything else than scalars,
    enumerations, lists, tuples, mappings and dataclasses of them: functions and objects may answer differently later.
    """
    if type(value) in _SCALARS:
        return type(value).__name__, value
    if isinstance(value, enum.Enum | int | float | complex | str | bytes):  # also of a subclass
        return type(value), value
    if isinstance(value, list | tuple):
        return type(value).__name__, tuple(map(frozen, value))
    if isinstance(value, Mapping):
        return "mapping", tuple((frozen(name), frozen(item)) for name, item in value.items())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value), tuple(frozen(getattr(value, field.name)) for field in dataclasses.fields(value))
    if isinstance(value, frozenset):
        return "frozenset", frozenset(map(frozen, value))
    raise Unfreezable(f"a {type(value).__name__} has no frozen form")
