"""The index finds the place with the longest like past among the newest ones, by hand and against a search of all."""

from __future__ import annotations

import random

import pytest

from penstock.optimizers.speculation.index import KEY_TOKENS, LONGEST, MOST_PLACES, TextIndex


def found(index: TextIndex, tokens: list[int]) -> tuple[int, int, int] | None:
    """(number of the text, position, length) of the match."""
    match = index.find(tokens)
    return None if match is None else (match.text.number, match.at, match.length)


def test_the_tokens_before_a_place_are_looked_up() -> None:
    index = TextIndex()
    text = index.add(0, [1, 2, 3, 4, 5])
    index.grow(text)
    assert found(index, [9, 2, 3]) == (0, 3, 2)
    assert found(index, [1, 2, 3]) == (0, 3, 3)
    assert found(index, [4, 5]) is None, "nothing follows the end"
    assert found(index, [3]) is None
    assert found(index, [2, 9]) is None


def test_a_text_is_found_as_far_as_it_has_grown() -> None:
    index, tokens = TextIndex(), [1, 2]
    text = index.add(0, tokens)
    index.grow(text)
    assert found(index, [1, 2]) is None
    tokens.append(3)
    index.grow(text)
    assert found(index, [1, 2]) == (0, 2, 2)


def test_the_longest_past_wins_and_of_equals_the_newest_place() -> None:
    index = TextIndex()
    index.grow(index.add(0, [7, 1, 2, 3, 8, 1, 2, 4, 9, 1, 2, 5]))
    assert found(index, [7, 1, 2]) == (0, 3, 3)
    assert found(index, [6, 1, 2]) == (0, 11, 2)


def test_texts_share_an_index_until_they_are_dropped() -> None:
    index = TextIndex()
    texts = [index.add(number, tokens) for number, tokens in ((5, [1, 2, 3]), (6, [1, 2, 4]))]
    for text in texts:
        index.grow(text)
    assert found(index, [1, 2]) == (6, 2, 2)
    index.drop(texts[1])
    assert found(index, [1, 2]) is None, "a chain ends where a text is gone"
    index.drop(texts[0])
    assert (found(index, [1, 2]), len(index)) == (None, 0)


def test_a_dropped_text_leaves_what_newer_ones_say() -> None:
    index = TextIndex()
    old, new = index.add(0, [1, 2, 3]), index.add(1, [1, 2, 4])
    index.grow(old)
    index.grow(new)
    index.drop(old)
    assert found(index, [1, 2]) == (1, 2, 2)


def best_place(text: list[int], tokens: list[int]) -> tuple[int, int] | None:
    """(position, length), by trying every place."""
    best: tuple[int, int] | None = None
    places = [p for p in range(KEY_TOKENS, len(text)) if text[p - KEY_TOKENS : p] == tokens[-KEY_TOKENS:]]
    for position in places[::-1][:MOST_PLACES]:
        length = KEY_TOKENS
        while length < min(LONGEST, position, len(tokens)) and text[position - 1 - length] == tokens[-1 - length]:
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
        match = found(index, tokens)
        assert (match and match[1:]) == best_place(tokens, tokens)
