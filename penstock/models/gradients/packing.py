"""`pack`: sequences as one row of tokens in which every shared prefix stands once.

A compressed trie over the sequences: tokens that several of them begin with are one segment, so a group's prompt goes
through the model once. Knows nothing of models and gradients. Called by `scorer`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
Span = tuple[int, int]  # tokens [begin, end) of the packed row

_NO_TOKENS: IntArray = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [begin, end) of the packed row, the first at `position` of its sequences, after those of `ancestors`."""

    begin: int
    end: int
    position: int
    ancestors: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class PackedRow:
    """`input_ids` and `positions`, int64 [T]; `places[i]` has the index in the row of every token of sequence i."""

    input_ids: IntArray
    positions: IntArray
    segments: tuple[Segment, ...]
    places: tuple[IntArray, ...]


@dataclass(slots=True, eq=False)
class _Node:
    """A run of tokens with the runs that follow it, by their first token."""

    tokens: IntArray
    children: dict[int, _Node] = field(default_factory=dict)
    span: Span = (0, 0)

    def split(self, length: int) -> None:
        """Leave the first `length` tokens here, and the rest to an only child."""
        rest = _Node(self.tokens[length:], self.children)
        self.tokens, self.children = self.tokens[:length], {int(rest.tokens[0]): rest}


def pack(sequences: Sequence[IntArray], *, share_prefixes: bool = True) -> PackedRow:
    """The row of all `sequences`, which are not empty; with `share_prefixes=False` each is there in full."""
    common_root = _Node(_NO_TOKENS)
    roots = [common_root if share_prefixes else _Node(_NO_TOKENS) for _ in sequences]
    for root, sequence in zip(roots, sequences, strict=True):
        _insert(root, sequence)
    segments = _lay_out(dict.fromkeys(roots))
    places = tuple(_place(root, sequence) for root, sequence in zip(roots, sequences, strict=True))
    ids = np.empty(segments[-1].end, dtype=np.int64)
    positions = np.empty_like(ids)
    for sequence, place in zip(sequences, places, strict=True):
        ids[place] = sequence
        positions[place] = np.arange(len(sequence))
    return PackedRow(ids, positions, segments, places)


def _insert(node: _Node, tokens: IntArray) -> None:
    while len(tokens):
        child = node.children.get(int(tokens[0]))
        if child is None:
            node.children[int(tokens[0])] = _Node(tokens)
            return
        common = _common_length(child.tokens, tokens)
        if common < len(child.tokens):
            child.split(common)
        node, tokens = child, tokens[common:]


def _common_length(left: IntArray, right: IntArray) -> int:
    length = min(len(left), len(right))
    differences = np.flatnonzero(left[:length] != right[:length])
    return int(differences[0]) if len(differences) else length


def _lay_out(roots: Iterable[_Node]) -> tuple[Segment, ...]:
    """Give every node its span, a parent before its children."""
    segments: list[Segment] = []
    waiting: list[tuple[_Node, int, tuple[Span, ...]]] = [
        (child, 0, ()) for root in roots for child in root.children.values()
    ]
    begin = 0
    while waiting:
        node, position, ancestors = waiting.pop()
        end = begin + len(node.tokens)
        node.span = begin, end
        segments.append(Segment(begin, end, position, ancestors))
        waiting += [(child, position + end - begin, (*ancestors, node.span)) for child in node.children.values()]
        begin = end
    return tuple(segments)


def _place(node: _Node, tokens: IntArray) -> IntArray:
    spans: list[IntArray] = []
    while len(tokens):
        node = node.children[int(tokens[0])]
        spans.append(np.arange(*node.span))
        tokens = tokens[len(node.tokens) :]
    return np.concatenate(spans)
