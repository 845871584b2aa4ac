"""`AdapterNames`: which generation of each adapter new requests run with.

Owns the names and the keys made of them. A key is never used twice, so neither a cached prefix nor a running request
ever belongs to two adapters of one name. Written by `AdapterOrders` and read by `InputProcessor`, on the engine's loop.
"""

from __future__ import annotations

import itertools

from penstock.errors import RequestError, shown


class AdapterNames:
    """The loaded adapters by name."""

    def __init__(self) -> None:
        self._keys: dict[str, str] = {}
        self._generations = itertools.count(1)

    def new_key(self, name: str) -> str:
        """A key for the next generation of an adapter."""
        return f"{name}@{next(self._generations)}"

    def put(self, name: str, key: str) -> None:
        """Have new requests run with this generation."""
        self._keys[name] = key

    def remove(self, name: str) -> None:
        """Refuse new requests. Raises `RequestError` for an unknown name."""
        self.key(name)
        del self._keys[name]

    def key(self, name: str) -> str:
        """The key of the present generation; "" of no adapter. Raises `RequestError` for an unknown name."""
        if not name:
            return ""
        if (key := self._keys.get(name)) is None:
            known = ", ".join(self.names()) or "none"
            text = f"adapter {shown(name)} is not loaded (there is {known}): call load_adapter() first"
            raise RequestError(text, parameter="adapter")
        return key

    def generation(self, name: str) -> int:
        """The number of the load that made the present generation, over all adapters; 0 of none. Any thread."""
        return int(self._keys.get(name, "@0").rpartition("@")[2])

    def names(self) -> list[str]:
        """The loaded adapters, the one that was first loaded first. Any thread."""
        return list(self._keys)

    def keys(self) -> set[str]:
        """The keys of the present generations."""
        return set(self._keys.values())
