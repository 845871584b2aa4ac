"""The index finds the longest match among the newest places, and a cursor follows it."""

from __future__ import annotations

import random
from array import array

import pytest

from penstock.optimizers.speculation.drafter import Draft
from penstock.optimizers.speculation.text_index import (
    KEY_TOKENS,
    MAX_CANDIDATES,
    MAX_MATCH_TOKENS,
    Match,
    MatchCursor,
    Text,
    TextIndex,
)


def match_of(index: TextIndex, tokens: list[int]) -> tuple[int, int, int] | None:
    """(number of the text, position, length) of the match."""
    match = index.find(tokens)
    return None if match is None else (match.text.number, match.position, match.length)


def test_the_tokens_before_a_place_are_looked_up() -> None:
    index = TextIndex()
    text = index.add(0, [1, 2, 3, 4, 5])
    index.grow(text)
    assert match_of(index, [9, 2, 3]) == (0, 3, 2)
    assert match_of(index, [1, 2, 3]) == (0, 3, 3)
    assert match_of(index, [4, 5]) is None, "nothing follows the end"
    assert match_of(index, [3]) is None
    assert match_of(index, [2, 9]) is None


def test_a_text_is_found_as_far_as_it_has_grown() -> None:
    index, tokens = TextIndex(), [1, 2]
    text = index.add(0, tokens)
    index.grow(text)
    assert match_of(index, [1, 2]) is None
    tokens.append(3)
    index.grow(text)
    assert match_of(index, [1, 2]) == (0, 2, 2)


def test_the_longest_match_wins_and_among_equals_the_newest() -> None:
    index = TextIndex()
    index.grow(index.add(0, [7, 1, 2, 3, 8, 1, 2, 4, 9, 1, 2, 5]))
    assert match_of(index, [7, 1, 2]) == (0, 3, 3)
    assert match_of(index, [6, 1, 2]) == (0, 11, 2)


def test_texts_share_an_index_until_they_are_dropped() -> None:
    index = TextIndex()
    texts = [index.add(number, tokens) for number, tokens in ((5, [1, 2, 3]), (6, [1, 2, 4]))]
    for text in texts:
        index.grow(text)
    assert match_of(index, [1, 2]) == (6, 2, 2)
    index.drop(texts[1])
    assert match_of(index, [1, 2]) is None, "a chain ends where a text is gone"
    index.drop(texts[0])
    assert (match_of(index, [1, 2]), len(index)) == (None, 0)


def test_a_dropped_text_leaves_what_newer_ones_say() -> None:
    index = TextIndex()
    old, new = index.add(0, [1, 2, 3]), index.add(1, [1, 2, 4])
    index.grow(old)
    index.grow(new)
    index.drop(old)
    assert match_of(index, [1, 2]) == (1, 2, 2)


def best_place(text: list[int], tokens: list[int]) -> tuple[int, int] | None:
    """(position, length), by trying every place."""
    best: tuple[int, int] | None = None
    places = [p for p in range(KEY_TOKENS, len(text)) if text[p - KEY_TOKENS : p] == tokens[-KEY_TOKENS:]]
    for position in places[::-1][:MAX_CANDIDATES]:
        length = KEY_TOKENS
        limit = min(MAX_MATCH_TOKENS, position, len(tokens))
        while length < limit and text[position - 1 - length] == tokens[-1 - length]:
            length += 1
        if best is None or length > best[1]:
            best = position, length
    return best


@pytest.mark.parametrize("seed", range(10))
def test_no_place_is_overlooked(seed: int) -> None:
    rng = random.Random(seed)
    index, tokens = TextIndex(), [rng.randrange(3) for _ in range(3)]
    text = index.add(0, tokens)
    for _ in range(200):
        tokens.append(rng.randrange(3) if rng.random() < 0.3 else tokens[-rng.choice([2, 3])])
        index.grow(text)
        match = match_of(index, tokens)
        assert (match and match[1:]) == best_place(tokens, tokens)


def cursor_at(text: list[int], position: int, length: int, tokens: list[int]) -> MatchCursor:
    """A cursor of a sequence with these tokens, and a match."""
    cursor = MatchCursor()
    cursor.advance(tokens)
    cursor.match = Match(Text(0, text, array("q")), position, length)
    return cursor


def test_a_match_that_goes_on_grows_with_every_token() -> None:
    cursor = cursor_at([10, 11, 12, 13, 14, 15], 2, 2, [10, 11])
    cursor.advance([10, 11, 12])
    assert cursor.match is not None
    assert (cursor.match.position, cursor.match.length) == (3, 3)
    cursor.advance([10, 11, 12, 13, 14])
    assert (cursor.match.position, cursor.match.length) == (5, 5)
    assert cursor.read(4, repeat=False).tokens == (15,)


def test_another_token_ends_the_match() -> None:
    cursor = cursor_at([10, 11, 12, 13], 2, 2, [10, 11])
    cursor.advance([10, 11, 12, 9])
    assert cursor.match is None
    assert cursor.read(4, repeat=False) == Draft()


def test_a_match_ends_with_its_text() -> None:
    cursor = cursor_at([10, 11, 12], 2, 2, [10, 11])
    cursor.advance([10, 11, 12])
    assert cursor.match is not None
    assert cursor.read(2, repeat=False) == Draft()
    cursor.advance([10, 11, 12, 13])
    assert cursor.match is None


@pytest.mark.parametrize(("repeat", "tokens"), [(True, (12, 13, 12, 13, 12)), (False, (12, 13))])
def test_the_sequences_own_text_repeats_beyond_its_end(repeat: bool, tokens: tuple[int, ...]) -> None:
    """The text is followed by itself."""
    assert cursor_at([10, 11, 12, 13], 2, 2, [12, 13]).read(5, repeat=repeat).tokens == tokens


def test_confidence_grows_with_the_length_of_the_match() -> None:
    """The number of bits of the length, at most 7."""
    text = list(range(200))
    assert cursor_at(text, 3, 3, [1, 2]).read(6, repeat=False).confidences == (2, 3, 3, 3, 3, 4)
    assert cursor_at(text, 100, 62, [1, 2]).read(4, repeat=False).confidences == (6, 6, 7, 7)
    assert cursor_at(text, 100, 127, [1, 2]).read(3, repeat=False).confidences == (7, 7, 7)
