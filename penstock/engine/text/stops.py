"""`StopStrings`: finds stop strings in streamed text and holds back a possible start of one.

Owns its position in the text. Never handles tokens, never reads a character twice. Called by `TextStream`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from functools import lru_cache


@dataclass(slots=True, eq=False)
class _Node:
    """A prefix of a stop string: the first `depth` characters of `word`."""

    word: str
    depth: int
    children: dict[str, _Node] = field(default_factory=dict)
    fallback: _Node | None = None  # longest proper suffix that is a prefix of a stop string; None at the root
    stop: str | None = None  # longest stop string that ends here


class StopStrings:
    """Ends a stream of text at the first stop string, however the text is split.

    A stop string ends the text with the character that completes it: of several, the one completed first wins; of those
    completed by the same character, the one that starts earliest. All text is returned at once, except the longest
    suffix that is a proper prefix of a stop string. With `include` the text ends after the stop string, otherwise
    before it. Linear in the length of text and stop strings (Aho and Corasick 1975).
    """

    def __init__(self, stops: tuple[str, ...], include: bool = False) -> None:
        self._root = self._node = _automaton(stops)
        self._include = include
        self._matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """Return (text that can be shown, the stop string found or None). After a stop, all text is dropped."""
        if self._matched is not None:
            return "", self._matched
        if not self._root.children:
            return text, None
        before, node = self._node, self._node
        for end, character in enumerate(text, start=1):
            node = _next(node, character)
            if node.stop is not None:
                self._matched = node.stop
                num_hidden = 0 if self._include else len(node.stop)
                return _first(before, text, before.depth + end - num_hidden), node.stop
        self._node = node
        return _first(before, text, before.depth + len(text) - node.depth), None

    def flush(self) -> str:
        """The text held back, when none follows; "" after a stop string."""
        if self._matched is not None:
            return ""
        pending, self._node = self._node, self._root
        return pending.word[: pending.depth]


def _first(pending: _Node, text: str, count: int) -> str:
    """The first `count` characters of the pending text followed by `text`; costs no more than that."""
    return pending.word[: min(count, pending.depth)] + text[: max(0, count - pending.depth)]


def _next(node: _Node, character: str) -> _Node:
    """The longest prefix of a stop string at the end of the text, after one more character."""
    while (child := node.children.get(character)) is None:
        if node.fallback is None:
            return node
        node = node.fallback
    return child


@lru_cache(maxsize=64)
def _automaton(stops: tuple[str, ...]) -> _Node:
    root = _Node("", 0)
    for stop in stops:
        _add(root, stop)
    queue = deque([root])
    while queue:
        parent = queue.popleft()
        for character, child in parent.children.items():
            child.fallback = _next(parent.fallback, character) if parent.fallback else root
            child.stop = child.stop or child.fallback.stop
            queue.append(child)
    return root


def _add(root: _Node, stop: str) -> None:
    node = root
    for depth, character in enumerate(stop, start=1):
        node = node.children.setdefault(character, _Node(stop, depth))
    node.stop = stop
