"""Any ids, any split, any stops: the streamed text is the decoded text, cut where it must be."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from penstock.engine.text.detokenizer import Detokenizer
from penstock.engine.text.stops import StopStrings
from penstock.engine.text.stream import TextStream
from tests.tokenizers_for_tests import byte_fallback, byte_level, in_context, streamed_text

TOKENIZERS = {
    "byte level": byte_level(),
    "byte fallback": byte_fallback(),
    "byte level in context": in_context(byte_level()),
    "byte fallback in context": in_context(byte_fallback()),
}


def ids_for(tokenizer: PreTrainedTokenizerFast) -> st.SearchStrategy[list[int]]:
    """Random ids, pieces of real text, and what is hard: single bytes, special tokens, spaces, unknown ids."""
    vocabulary = tokenizer.get_vocab()
    hard = sorted(id for token, id in vocabulary.items() if len(token) == 1 or token[0] == "<")
    text = st.text("ab 你é🙂\ufffd", min_size=1, max_size=4)
    pieces = st.one_of(
        st.integers(0, len(vocabulary) + 5).map(lambda id: [id]),
        st.sampled_from(hard).map(lambda id: [id]),
        text.map(lambda t: list(tokenizer(t, add_special_tokens=False)["input_ids"])),
    )
    return st.lists(pieces, max_size=25).map(lambda lists: [id for ids in lists for id in ids])


streams = st.sampled_from(list(TOKENIZERS.values())).flatmap(lambda t: st.tuples(st.just(t), ids_for(t), st.booleans()))


def decode(tokenizer: Any, ids: list[int], skip: bool) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False))


@given(stream=streams)
@settings(max_examples=300)
def test_streamed_text_is_the_decoded_text(stream: tuple[Any, list[int], bool]) -> None:
    tokenizer, ids, skip = stream
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    full, shown = streamed_text(tokenizer, ids, skip), ""
    for token_id in ids:
        shown += detokenizer.push(token_id)
        assert full.startswith(shown)
    assert shown + detokenizer.flush() == full


@given(stream=streams)
def test_streamed_text_differs_from_the_decoded_text_in_byte_runs_that_are_not_utf8_only(
    stream: tuple[Any, list[int], bool],
) -> None:
    tokenizer, ids, skip = stream
    full, shown = decode(tokenizer, ids, skip), streamed_text(tokenizer, ids, skip)
    assert shown == full or ("\ufffd" in full and "<0x00>" in tokenizer.get_vocab())


@given(stream=streams.filter(lambda s: "Ģ" not in s[0].get_vocab()), data=st.data())
def test_characters_of_byte_tokens_show_with_their_last_byte(
    stream: tuple[Any, list[int], bool], data: st.DataObject
) -> None:
    tokenizer, ids, skip = stream
    text = data.draw(st.text("éя你🙂\ufffd", min_size=1, max_size=6))
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    before = "".join(map(detokenizer.push, [*ids, tokenizer.get_vocab()["<0x2E>"]]))
    shown = [detokenizer.push(tokenizer.get_vocab()[f"<0x{byte:02X}>"]) for byte in text.encode()]
    assert before.endswith(".")
    assert shown == [part for char in text for part in [*[""] * (len(char.encode()) - 1), char]]


@given(stream=streams.filter(lambda s: "Ģ" in s[0].get_vocab()))
def test_byte_level_text_is_held_back_by_one_character_at_most(stream: tuple[Any, list[int], bool]) -> None:
    tokenizer, ids, skip = stream
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    shown = ""
    for count, token_id in enumerate(ids, start=1):
        shown += detokenizer.push(token_id)
        assert shown == decode(tokenizer, ids[:count], skip).removesuffix("\ufffd")


@given(stream=streams, data=st.data())
@settings(max_examples=200)
def test_tokens_in_one_push_or_in_many_give_the_same_text_and_stop(
    stream: tuple[Any, list[int], bool], data: st.DataObject
) -> None:
    tokenizer, ids, _ = stream
    text = streamed_text(tokenizer, ids)
    starts = st.integers(0, max(0, len(text) - 1))
    found = data.draw(st.lists(st.tuples(starts, st.integers(1, 4)), max_size=2))
    stops = tuple(text[start : start + size] for start, size in found if text)
    min_tokens = data.draw(st.integers(0, 5))
    size = data.draw(st.integers(1, 6))
    one_by_one = run(TextStream(Detokenizer(tokenizer), StopStrings(stops), min_tokens), ids, 1)
    assert run(TextStream(Detokenizer(tokenizer), StopStrings(stops), min_tokens), ids, size) == one_by_one


def run(stream: TextStream, ids: list[int], size: int) -> tuple[str, str | None, int]:
    """(text, stop, number of tokens that count) of a whole stream, pushed `size` tokens at a time."""
    text, total = "", 0
    for start in range(0, len(ids), size):
        delta = stream.push(ids[start : start + size])
        text, total = text + delta.text, total + delta.num_tokens
        if delta.stop is not None:
            return text, delta.stop, total
    last = stream.finish()
    return text + last.text, last.stop, total


@given(stream=streams, data=st.data())
def test_text_ends_at_the_first_stop_of_the_whole_text(
    stream: tuple[Any, list[int], bool], data: st.DataObject
) -> None:
    tokenizer, ids, _ = stream
    text = streamed_text(tokenizer, ids)
    start = data.draw(st.integers(0, max(0, len(text) - 1)))
    stop = text[start : start + data.draw(st.integers(1, 5))] or "x"
    shown, completed, _ = run(TextStream(Detokenizer(tokenizer), StopStrings((stop,))), ids, 1)
    assert (shown, completed) == (text.partition(stop)[0], stop if stop in text else None)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_pair_of_bytes_streams_exactly(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    vocabulary = tokenizer.get_vocab()
    hard = [f"<0x{b:02X}>" for b in (0x41, 0x80, 0xA0, 0xBF, 0xC2, 0xE0, 0xE4, 0xED, 0xF0, 0xF4, 0xFF)]
    if hard[0] not in vocabulary:
        hard = ["A", "Ģ", "ł", "¿", "Â", "à", "ä", "í", "ð", "ô", "ÿ"]
    ids = [vocabulary[token] for token in hard]
    for triple in ([a, b, c, d] for a in ids for b in ids for c in ids for d in (ids[0], ids[1])):
        detokenizer = Detokenizer(tokenizer)
        assert "".join(map(detokenizer.push, triple)) + detokenizer.flush() == streamed_text(tokenizer, triple)
