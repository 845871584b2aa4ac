"""`TokenBound`: never more than the count of the tokenizer, and 0 where text may be lost."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from penstock.engine.text.token_bound import NFC_FACTOR, TokenBound
from tests.tokenizers_for_tests import byte_fallback, byte_level

CUT = pre_tokenizers.Split(Regex(r"\s+"), behavior="isolated")
# Characters whose composed form has far fewer bytes, controls, tokens of the tokenizer, and any other.
PIECES = st.one_of(
    st.sampled_from(["\u1fbe\u0344", "\u212a\u0327", "\u1112\u1161\u11ab", "\x04\x00", "<end>", "two words", " " * 9]),
    st.text(),
)


def composing() -> PreTrainedTokenizerFast:
    """A tokenizer that composes characters, as Qwen's does."""
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([CUT, pre_tokenizers.ByteLevel()])
    return tokenizer


def without_controls() -> PreTrainedTokenizerFast:
    """A tokenizer without tokens for control characters, which it drops, as SmolLM's does."""
    tokenizer = byte_level()
    model = tokenizer.backend_tokenizer.model
    letters = {chr(0x100 + byte) for byte in range(0x20)}
    vocab = {token: id for token, id in tokenizer.backend_tokenizer.get_vocab(False).items() if token not in letters}
    tokenizer.backend_tokenizer.model = type(model)(vocab, [])
    return tokenizer


TOKENIZERS = {"plain": byte_level(), "composing": composing(), "without controls": without_controls()}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(pieces=st.lists(PIECES, max_size=60))
def test_no_text_has_fewer_tokens(name: str, pieces: list[str]) -> None:
    tokenizer, text = TOKENIZERS[name], "".join(pieces)
    assert TokenBound().at_least(tokenizer, text) <= len(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_long_text_has_a_bound_above_0(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    longest = max(map(len, tokenizer.get_vocab()))
    assert TokenBound().at_least(tokenizer, "a" * 10_000) == -(-10_000 // longest)
    assert TokenBound().at_least(tokenizer, "ä" * 10_000) >= 20_000 // NFC_FACTOR // longest


def test_a_token_may_take_in_more_bytes_than_it_has() -> None:
    tokenizer = composing()
    tokenizer.add_tokens([AddedToken("\u0136" * 8, normalized=True)])  # 16 bytes, composed from 40
    text = "\u212a\u0327" * 80
    assert len(tokenizer.encode(text, add_special_tokens=False)) == 10
    assert TokenBound().at_least(tokenizer, text) <= 10


def test_no_character_composes_from_more_bytes_than_is_assumed() -> None:
    sources: dict[str, int] = {}
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for character in characters:
        parts = unicodedata.normalize("NFD", character)
        sources[parts] = max(sources.get(parts, 0), len(character.encode()))

    def longest(parts: str) -> int:
        """The most bytes of a text that decomposes to these parts."""
        ends = range(1, len(parts) + 1)
        return max((sources[parts[:end]] + longest(parts[end:]) for end in ends if parts[:end] in sources), default=0)

    composed = [character for character in characters if unicodedata.is_normalized("NFC", character)]
    ratios = [longest(unicodedata.normalize("NFD", each)) / len(each.encode()) for each in composed]
    assert 3 < max(ratios) < NFC_FACTOR


def stripping(tokenizer: Any) -> None:
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])


def lower_case(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def dropping_spaces(tokenizer: Any) -> None:
    cut = pre_tokenizers.Split(" ", behavior="removed")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel()])


def splitting_at_spaces(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()


def truncating(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.enable_truncation(4)


@pytest.mark.parametrize("change", [stripping, lower_case, dropping_spaces, splitting_at_spaces, truncating])
def test_nothing_is_known_of_tokenizers_that_may_lose_text(change: Callable[[Any], None]) -> None:
    tokenizer = byte_level()
    change(tokenizer)
    assert TokenBound().at_least(tokenizer, "a" * 10_000) == 0


def test_nothing_is_known_of_other_kinds_of_tokenizers() -> None:
    assert TokenBound().at_least(byte_fallback(), "a" * 10_000) == 0
    assert TokenBound().at_least(None, "a" * 10_000) == 0
