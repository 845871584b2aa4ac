"""What a format is, and what its reader is given."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from penstock.tools.calls import CallCollector
from penstock.tools.coercion import allowed_types
from penstock.tools.cursor import Cursor, Malformed, Marker, Reading
from penstock.tools.definitions import Tool
from penstock.tools.pieces import random_id

_CALLABLE = re.compile(r"[A-Za-z0-9_][\w.:/-]{0,127}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Block:
    """A part of the text that may hold calls. `opening` is the marker that began it, already consumed.

    Without an explicit marker the text may be prose or data: then a name must be that of a tool.
    """

    cursor: Cursor
    calls: CallCollector
    tools: Mapping[str, Tool]
    opening: str
    is_marked: bool = True

    def checked_name(self, name: str) -> str:
        """The name of a function. Raises `Malformed` if it cannot be one."""
        if not _CALLABLE.fullmatch(name) or (self.tools and not self.is_marked and name not in self.tools):
            raise Malformed
        return name

    def types_of(self, function: str, argument: str) -> frozenset[str]:
        """The JSON types of an argument; none if unknown."""
        tool = self.tools.get(function)
        return allowed_types(tool.properties.get(argument), tool.parameters) if tool else frozenset()


@dataclass(frozen=True, slots=True)
class Format:
    """How a family of models writes calls.

    `marker` finds where calls may begin, for tools of these names; `read` reads one block of them. `special_tokens` are
    markers that tokenizers have as special tokens: decode with `skip_special_tokens=False` to see them.
    """

    name: str
    marker: Callable[[tuple[str, ...]], Marker]
    read: Callable[[Block], Reading[None]]
    special_tokens: tuple[str, ...] = ()
    new_id: Callable[[], str] = random_id


def literal_markers(*texts: str) -> Callable[[tuple[str, ...]], Marker]:
    """The same markers for any tools."""
    marker = Marker.literals(*texts)
    return lambda names: marker
