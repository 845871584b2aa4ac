"""Text appears as soon as it is final, in whole characters, at a constant cost per token."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import decoders
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from penstock.engine.text.detokenizer import Detokenizer
from tests.tokenizers_for_tests import TEXT, byte_fallback, byte_level, in_context, streamed_text

KINDS = [byte_level, byte_fallback]


def ids_of(tokenizer: Any, *tokens: str) -> list[int]:
    """The ids of vocabulary entries."""
    return [tokenizer.get_vocab()[token] for token in tokens]


def stream(tokenizer: Any, ids: list[int], **options: Any) -> list[str]:
    """The result of each push, and of the flush at the end."""
    detokenizer = Detokenizer(tokenizer, **options)
    return [detokenizer.push(token_id) for token_id in ids] + [detokenizer.flush()]


def decode(tokenizer: Any, ids: list[int], skip_special_tokens: bool = True) -> str:
    """The expected text of the joined stream."""
    return str(tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False))


@pytest.mark.parametrize("make", KINDS)
def test_joined_pushes_are_the_decoded_text(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = make()
    parts = stream(tokenizer, tokenizer(TEXT)["input_ids"])
    assert "".join(parts) == TEXT
    assert sum(part != "" for part in parts) > 100


def test_a_character_of_three_tokens_appears_with_the_last_one() -> None:
    tokenizer = byte_level()
    ids = tokenizer("a你b", add_special_tokens=False)["input_ids"]
    assert stream(tokenizer, ids) == ["a", "", "", "你", "b", ""]


def test_invalid_bytes_are_shown_as_soon_as_the_next_byte_cannot_save_them() -> None:
    tokenizer = byte_level()
    lead, end = ids_of(tokenizer, "ä", "a")  # the byte E4, and the letter
    assert stream(tokenizer, [lead, lead, end]) == ["", "\ufffd", "\ufffda", ""]


def test_flush_shows_half_a_character_and_begins_anew() -> None:
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer)
    lead = ids_of(tokenizer, "ä")[0]
    assert (detokenizer.push(lead), detokenizer.flush(), detokenizer.flush()) == ("", "\ufffd", "")
    assert detokenizer.push(ids_of(tokenizer, "a")[0]) == "a"


def test_a_character_of_byte_tokens_shows_with_its_last_byte() -> None:
    """It was held back to the end of the run, so an answer in Thai showed nothing for a hundred tokens."""
    tokenizer = byte_fallback()
    ids = ids_of(tokenizer, "▁the", "<0xE6>", "<0xB0>", "<0xB4>", "<0x21>", "▁lake")
    assert stream(tokenizer, ids) == ["the", "", "", "水", "!", " lake", ""]


def test_an_invalid_byte_spoils_no_character_that_was_shown() -> None:
    """Only here does the stream differ from `decode`, which returns one U+FFFD for each byte of the run."""
    tokenizer = byte_fallback()
    ids = ids_of(tokenizer, "▁the", "<0xE6>", "<0xB0>", "<0xB4>", "<0xFF>", "<0x21>", "▁lake")
    assert stream(tokenizer, ids) == ["the", "", "", "水", "\ufffd", "!", " lake", ""]
    assert decode(tokenizer, ids) == "the" + "\ufffd" * 5 + " lake"


def test_bytes_that_no_longer_can_become_a_character_show_at_once() -> None:
    tokenizer = byte_fallback()
    ids = ids_of(tokenizer, "▁the", "<0xE6>", "<0xE6>", "<0xB0>", "▁lake", "<0xE6>")
    assert stream(tokenizer, ids) == ["the", "", "\ufffd", "", "\ufffd\ufffd lake", "", "\ufffd"]


def test_a_skipped_special_token_does_not_end_a_run_and_a_shown_one_does() -> None:
    tokenizer = byte_fallback()
    ids = ids_of(tokenizer, "<0xE6>", "<0xB0>", "<s>", "<0xB4>")
    assert stream(tokenizer, ids) == ["", "", "", "水", ""]
    assert stream(tokenizer, ids, skip_special_tokens=False) == ["", "", "\ufffd\ufffd<s>", "\ufffd", ""]


def test_byte_tokens_that_a_decoder_takes_literally_are_text() -> None:
    tokenizer = byte_fallback()
    tokenizer.backend_tokenizer.decoder = decoders.Metaspace()
    ids = ids_of(tokenizer, "▁the", "<0xE6>", "<0x21>")
    assert stream(tokenizer, ids) == ["the", "<0xE6>", "<0x21>", ""]


def test_only_the_first_space_of_the_text_is_stripped() -> None:
    tokenizer = byte_fallback()
    ids = ids_of(tokenizer, "<s>", "▁", "▁the", "<s>", "▁the", "▁", "▁")
    assert stream(tokenizer, ids) == ["", "", " the", "", " the", " ", " ", ""]


def test_added_tokens_show_and_special_ones_only_if_asked() -> None:
    tokenizer = byte_level()
    ids = ids_of(tokenizer, "a", "<tool>", "<end>", "a")
    assert stream(tokenizer, ids) == ["a", "<tool>", "", "a", ""]
    assert stream(tokenizer, ids, skip_special_tokens=False) == ["a", "<tool>", "<end>", "a", ""]


@pytest.mark.parametrize("make", [*KINDS, ByT5Tokenizer])
def test_ids_outside_the_vocabulary_have_no_text(make: Callable[[], Any]) -> None:
    tokenizer = make()
    a = tokenizer("a", add_special_tokens=False)["input_ids"][-1]
    assert "".join(stream(tokenizer, [10**6, a, 10**6, a])) == decode(tokenizer, [a, a])


def test_two_requests_of_one_tokenizer_do_not_mix() -> None:
    tokenizer = byte_level()
    first, second = Detokenizer(tokenizer), Detokenizer(tokenizer, skip_special_tokens=False)
    end = ids_of(tokenizer, "<end>")[0]
    lead, *rest = tokenizer("你", add_special_tokens=False)["input_ids"]
    assert [first.push(lead), second.push(end), first.push(end)] == ["", "<end>", ""]
    assert "".join(map(first.push, rest)) == "你"


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.Metaspace(),
        decoders.BPEDecoder("</w>"),
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
        decoders.Sequence([decoders.Metaspace(), decoders.Fuse(), decoders.Strip(" ", 2, 0)]),
    ],
    ids=["word pieces", "metaspace", "word ends", "metaspace with bytes", "no strip", "strip twice"],
)
def test_other_decoders_stream_exactly_too(decoder: Any) -> None:
    tokenizer = byte_fallback()
    tokenizer.backend_tokenizer.decoder = decoder
    characters = [ids_of(tokenizer, *(f"<0x{byte:02X}>" for byte in char.encode())) for char in " aé水🙂\ufffd"]
    high = set(ids_of(tokenizer, *(f"<0x{byte:02X}>" for byte in range(128, 256))))
    words = [[id] for id in range(len(tokenizer)) if id not in high]
    choose, space = random.Random(0), ids_of(tokenizer, "▁")
    for _ in range(100):
        pieces = [choose.choice([space, choose.choice(characters), choose.choice(words)]) for _ in range(30)]
        ids = [id for piece in pieces for id in piece]
        assert "".join(stream(tokenizer, ids)) == decode(tokenizer, ids)


def test_a_tokenizer_written_in_python_streams_exactly_too() -> None:
    tokenizer = ByT5Tokenizer()
    choose = random.Random(0)
    for _ in range(100):
        ids = [*tokenizer("für 水")["input_ids"], *(choose.randrange(259) for _ in range(20))]
        assert "".join(stream(tokenizer, ids)) == decode(tokenizer, ids)


def endless(tokenizer: PreTrainedTokenizerFast) -> dict[str, list[int]]:
    """Streams of 10,000 tokens that never reach the end of a character, a run or a word."""
    if "Ģ" in tokenizer.get_vocab():
        streams = {"lead bytes": ["ä"], "continuations": ["Ģ"], "mixed": ["ä", "Ģ", "<s>"], "special": ["<s>"]}
    else:
        streams = {
            "lead bytes": ["<0xE6>"],
            "continuations": ["<0xB0>"],
            "characters": ["<0xE6>", "<0xB0>", "<0xB4>"],
            "replacements": ["<0xEF>", "<0xBF>", "<0xBD>"],
            "byte spaces": ["<0x20>"],
            "spaces": ["▁"],
            "special": ["<s>"],
            "short runs": ["<0xE6>", "<s>", "▁"],
        }
    cycles = {name: ids_of(tokenizer, *tokens) for name, tokens in streams.items()}
    cycles |= {"unknown": [10**6], "text": tokenizer(TEXT)["input_ids"]}
    return {name: (ids * 10_000)[:10_000] for name, ids in cycles.items()}


@pytest.mark.parametrize("known", [True, False], ids=["known decoder", "decoded in context"])
@pytest.mark.parametrize("make", KINDS)
def test_no_stream_decodes_more_than_a_few_ids_per_token(
    make: Callable[[], PreTrainedTokenizerFast], known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make() if known else in_context(make())
    original, num_decoded = tokenizer.decode, 0

    def counting(ids: list[int], **options: Any) -> str:
        nonlocal num_decoded
        num_decoded += len(ids)
        return str(original(ids, **options))

    for name, ids in endless(tokenizer).items():
        expected, num_decoded = streamed_text(tokenizer, ids), 0
        with monkeypatch.context() as patch:
            patch.setattr(tokenizer, "decode", counting)
            assert "".join(stream(tokenizer, ids)) == expected, name
        assert num_decoded <= 20 * len(ids), name


def test_known_tokens_of_a_known_decoder_are_not_decoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level()
    ids = tokenizer("the lake and the turbine", add_special_tokens=False)["input_ids"]
    stream(tokenizer, ids * 2)
    original, num_calls = tokenizer.decode, 0

    def counting(ids: list[int], **options: Any) -> str:
        nonlocal num_calls
        num_calls += 1
        return str(original(ids, **options))

    monkeypatch.setattr(tokenizer, "decode", counting)
    assert "".join(stream(tokenizer, ids * 10)) == "the lake and the turbine" * 10
    assert num_calls == 1  # for the first token of the text
