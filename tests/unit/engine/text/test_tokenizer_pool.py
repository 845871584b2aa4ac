"""Every kind of prompt becomes token ids, on worker threads that share nothing."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import normalizers

from penstock.api.prompt import read_prompt
from penstock.engine.text.tokenizer_pool import TokenizerPool, decode_ids, encode_ids, encode_words, prompt_text
from penstock.engine.text.tokenizer_pool import encode_prompt as encode_input
from penstock.errors import EngineClosed, RequestError
from tests.tokenizers_for_tests import TEXT, byte_fallback, byte_level


def encode_prompt(tokenizer: Any, prompt: Any, **options: bool) -> tuple[str | None, list[int]]:
    return encode_input(tokenizer, read_prompt(prompt), **options)


KINDS = [byte_level, byte_fallback]
CHAT = [{"role": "user", "content": "Where does the water go?"}]


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_text_is_encoded_as_the_tokenizer_does(make: Callable[[], Any], add_special_tokens: bool) -> None:
    tokenizer = make()
    for text in (TEXT, "the lake", " two words <tool></s>", "你🙂", "\x00"):
        expected = tokenizer.encode(text, add_special_tokens=add_special_tokens)
        assert encode_prompt(tokenizer, text, add_special_tokens=add_special_tokens) == (text, expected)
        assert encode_prompt(tokenizer, {"prompt": text}, add_special_tokens=add_special_tokens) == (text, expected)


def test_truncation_and_padding_are_ignored_and_split_special_tokens_is_not() -> None:
    plain, changed = byte_level(), byte_level()
    changed.backend_tokenizer.enable_truncation(3)
    changed.backend_tokenizer.enable_padding(length=999)
    changed.split_special_tokens = True
    text = "the water falls</s>"
    expected = plain.encode(text, split_special_tokens=True)
    assert encode_prompt(changed, text) == (text, expected)


@pytest.mark.parametrize("make", KINDS)
def test_chat_messages_go_through_the_template_once(make: Callable[[], Any]) -> None:
    tokenizer = make()
    text, ids = encode_prompt(tokenizer, CHAT)
    assert text == "<s><|user|>Where does the water go?<end><|assistant|>"
    assert ids == tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1


def test_text_of_a_prompt_is_what_is_encoded() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    assert prompt_text(tokenizer, read_prompt([{"role": "user", "content": "tea"}])) == "<tea>"
    assert prompt_text(tokenizer, read_prompt("tea")) == "tea"
    with pytest.raises(RequestError, match="no template to render"):
        prompt_text(tokenizer, read_prompt([1, 2]))


@pytest.mark.parametrize(
    "ids",
    [
        [5, 0, 7],
        (5, 0, 7),
        range(5, 8),
        array("q", [5, 0, 7]),
        np.array([5, 0, 7], dtype=np.int32),
        [np.int64(5), 0, np.uint8(7)],
        torch.tensor([5, 0, 7]),
        list(torch.tensor([5, 0, 7])),
    ],
    ids=str,
)
def test_any_sequence_of_integers_is_a_prompt(ids: Any) -> None:
    expected = [int(i) for i in ids]
    for prompt in (ids, {"prompt_token_ids": ids}):
        text, found = encode_prompt(None, prompt)
        assert (text, found) == (None, expected)
        assert {type(i) for i in found} == {int}
        assert not read_prompt(prompt).needs_tokenizer


def test_ids_may_bring_their_text() -> None:
    prompt = {"prompt": "abc", "prompt_token_ids": [1, 2]}
    assert encode_prompt(None, prompt) == ("abc", [1, 2])
    assert not read_prompt(prompt).needs_tokenizer


def test_a_prompt_of_special_tokens_only_is_fine() -> None:
    tokenizer = byte_level()
    assert encode_prompt(tokenizer, [tokenizer.eos_token_id]) == (None, [tokenizer.eos_token_id])
    assert encode_prompt(tokenizer, "</s>")[1] == [tokenizer.bos_token_id, tokenizer.eos_token_id]


@pytest.mark.parametrize("prompt", ["a", {"prompt": "a"}, CHAT, tuple(CHAT)])
def test_what_holds_text_needs_a_tokenizer(prompt: Any) -> None:
    assert read_prompt(prompt).needs_tokenizer
    with pytest.raises(RequestError, match=r'serves token ids only: pass \{"prompt_token_ids": \[\.\.\.\]\}'):
        encode_prompt(None, prompt)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty: pass at least one character"),
        ({"prompt": ""}, "the prompt is empty"),
        ({}, "the prompt is empty"),
        ([], "the prompt is empty: pass at least one character, token id or chat message"),
        ({"prompt_token_ids": []}, "the prompt is empty: pass at least one character, token id or chat message"),
        (np.array([], dtype=int), "the prompt is empty"),
        (None, "cannot be of type NoneType: pass a string, token ids, chat messages"),
        (5, "cannot be of type int"),
        (b"abc", "cannot be of type bytes"),
        ({1, 2}, "cannot be of type set"),
        ({"prompt_token_ids": "abc"}, "cannot be of type str"),
        ({"prompt": [1, 2]}, '"prompt" must be a string, got list'),
        ({"text": "a"}, "no key 'text'"),
        ({"input_ids": [1], 5: 6}, "no key '5'"),
        (["a", "b"], "a request has one prompt, and this looks like a list of them"),
        ([[1, 2], [3]], "make a request of each"),
        (np.array([[1, 2]]), "make a request of each"),
        ({"role": "user", "content": "a"}, r"no key 'content': pass chat messages in a list, \[\{"),
        ([1, 2.0], "integers, but 'float' object"),
        ([1, {"role": "user"}], "integers, but 'dict' object"),
        ([True, False], "not True or False"),
        ([3, -100, 4], "at least 0, got -100: remove padding"),
        ([{"content": "hi"}], 'chat message 0 must be a dict with "role"'),
        ([CHAT[0], "hi"], 'chat message 1 must be a dict with "role"'),
        ([{"role": "robot", "content": "hi"}], "template refused these messages: no robots"),
        ("a\ud800", "an unpaired surrogate at character 1"),
    ],
    ids=repr,
)
def test_what_is_no_prompt_is_refused_with_what_to_pass_instead(prompt: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        encode_prompt(byte_level(), prompt)


def test_chat_without_a_template_says_what_to_set() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = None
    with pytest.raises(RequestError, match=r"no chat template: pass a string, or set tokenizer\.chat_template"):
        encode_prompt(tokenizer, CHAT)


def test_text_without_tokens_is_refused() -> None:
    tokenizer = byte_fallback()
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    with pytest.raises(RequestError, match="has no tokens"):
        encode_prompt(tokenizer, " ", add_special_tokens=False)


def test_bad_words_are_banned_at_the_start_and_after_a_space() -> None:
    tokenizer = byte_level()
    start, after = (tokenizer.encode(text, add_special_tokens=False) for text in ("turbine", " turbine"))
    assert encode_words(tokenizer, ["turbine", [4, 5]]) == [start, after, [4, 5]]
    assert encode_words(tokenizer, [" turbine", "turbine"]) == [start, after]
    assert encode_words(tokenizer, []) == []


def test_many_bad_words_are_compared_by_hash() -> None:
    """Each was compared with all before it: a list of 100,000 kept the tokenizer busy for hours, a hang here."""
    words = [[number, number] for number in range(100_000)]
    assert encode_words(None, [*words, *words]) == words


def test_a_bad_word_of_white_space_stays_what_it_is() -> None:
    tokenizer = byte_level()
    newline, space = (tokenizer.get_vocab()[token] for token in "ĊĠ")
    assert encode_words(tokenizer, ["\n"]) == [[newline], [space, newline]]
    assert encode_words(tokenizer, [" "])[0] == [space]


def test_bad_words_without_a_tokenizer_must_be_ids() -> None:
    assert encode_words(None, [(1, 2)]) == [[1, 2]]
    with pytest.raises(RequestError, match="pass bad_words as lists of token ids"):
        encode_words(None, ["turbine"])
    with pytest.raises(RequestError, match="at least 0, got -1"):
        encode_words(None, [[-1]])


def decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids))


def encode_truncated(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, truncation=True, max_length=5)["input_ids"])


def mixed_calls(number: int) -> list[tuple[Callable[..., Any], Any]]:
    """Five calls of different kinds, different for each number."""
    text = TEXT[number % 400 :][: 10 + number % 90]
    return [
        (encode_prompt, text),
        (encode_truncated, text),
        (encode_prompt, [{"role": "user", "content": text}]),
        (encode_words, [text[:8], [number]]),
        (decode, list(range(number % 300, number % 300 + 20))),
    ]


@pytest.mark.parametrize("make", KINDS)
def test_sixteen_threads_get_the_same_results_as_one(make: Callable[[], Any]) -> None:
    tokenizer = make()
    calls = [call for number in range(640) for call in mixed_calls(number)]
    expected = [fn(tokenizer, argument) for fn, argument in calls]
    pool, found = TokenizerPool(tokenizer), [None] * len(calls)

    def call_every_sixteenth(first: int) -> None:
        for number in range(first, len(calls), 16):
            fn, argument = calls[number]
            found[number] = pool.submit(fn, argument).result()

    threads = [threading.Thread(target=call_every_sixteenth, args=(first,)) for first in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pool.close()
    assert found == expected


def test_no_two_threads_share_a_tokenizer() -> None:
    tokenizer, both_busy = byte_level(), threading.Barrier(2, timeout=60)
    pool = TokenizerPool(tokenizer)

    def who(own: Any) -> tuple[str, int, int]:
        both_busy.wait()
        return threading.current_thread().name, id(own), id(own.backend_tokenizer)

    first, second = (future.result() for future in [pool.submit(who), pool.submit(who)])
    assert all(a != b for a, b in zip(first, second, strict=True))
    assert id(tokenizer) not in (first[1], second[1])
    pool.close()


def test_the_caller_may_change_the_tokenizer_and_keeps_its_state() -> None:
    tokenizer = byte_level()
    full, backend = tokenizer.encode(TEXT), tokenizer.backend_tokenizer
    backend.enable_truncation(4)
    pool, truncation = TokenizerPool(tokenizer), backend.truncation
    assert pool.submit(encode_prompt, TEXT).result() == (TEXT, full)
    tokenizer.add_tokens(["the"])
    assert pool.submit(encode_prompt, TEXT).result() == (TEXT, full)
    assert backend.truncation == truncation
    pool.close()


def test_an_error_reaches_its_caller_and_the_worker_continues() -> None:
    pool = TokenizerPool(byte_level(), num_workers=1)
    with pytest.raises(RequestError, match="empty"):
        pool.submit(encode_prompt, "").result()
    assert pool.submit(encode_prompt, [1]).result() == (None, [1])
    pool.close()


def test_a_cancelled_call_is_not_made() -> None:
    pool, go, made = TokenizerPool(None, num_workers=1), threading.Event(), []
    busy = pool.submit(lambda _: go.wait())
    waiting, last = (pool.submit(lambda _, number=number: made.append(number)) for number in (1, 2))
    assert waiting.cancel()
    go.set()
    last.result()
    assert busy.result()
    assert made == [2]
    pool.close()


def workers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("penstock-tokenizer")}


def test_close_finishes_what_was_submitted_and_refuses_more() -> None:
    before = workers()
    pool, go = TokenizerPool(None), threading.Event()
    new = workers() - before
    busy = [pool.submit(lambda _: go.wait()) for _ in range(2)]
    waiting = pool.submit(lambda _: "done")
    pool.close()
    pool.close()
    with pytest.raises(EngineClosed, match="create a new engine"):
        pool.submit(encode_prompt, [1])
    go.set()
    assert all(future.result() for future in busy)
    assert waiting.result() == "done"
    assert len(new) == 2
    for thread in new:
        thread.join(timeout=60)
        assert not thread.is_alive()


def test_faults_of_a_tokenizer_are_the_requests() -> None:
    """`generate` said so; `tokenize` and `detokenize` raised them as they were, which servers answer with 500."""

    class Broken:
        def encode(self, text: str, **options: object) -> list[int]:
            raise ZeroDivisionError("broken")

        decode = convert_ids_to_tokens = encode

    with pytest.raises(RequestError, match="the prompt could not be encoded: ZeroDivisionError: broken"):
        encode_ids(Broken(), read_prompt("x"), True)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="the token ids could not be decoded: ZeroDivisionError: broken"):
        decode_ids(Broken(), [5], True)  # type: ignore[arg-type]


def test_workers_end_with_a_pool_that_is_dropped() -> None:
    before = workers()
    pool = TokenizerPool(None)
    new = workers() - before
    assert pool.submit(encode_prompt, [1]).result() == (None, [1])
    del pool
    gc.collect()
    for thread in new:
        thread.join(timeout=60)
        assert not thread.is_alive()


def test_a_busy_worker_does_not_hold_up_the_end_of_the_program() -> None:
    program = (
        "import threading; from penstock.engine.text.tokenizer_pool import TokenizerPool\n"
        "pool, begun = TokenizerPool(None), threading.Event()\n"
        "pool.submit(lambda _: (begun.set(), threading.Event().wait()))\n"
        "begun.wait(); print('end')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("end\n", 0)
