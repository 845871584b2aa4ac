"""Encodes prompts to token ids, on worker threads if they are long.

Owns private copies of the tokenizer, one per worker. Never touches the caller's tokenizer after the constructor. Called
by `InputProcessor` for every prompt that is not token ids.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

from penstock.api.exiting import join_threads
from penstock.api.prompt import EMPTY, Chat, PromptInput, read_ids
from penstock.api.rendering import render_chat
from penstock.engine.text.token_text import TokenDecoder, redefines
from penstock.engine.text.tokenizer import Tokenizer, copy_tokenizer
from penstock.errors import EngineClosed, PenstockError, RequestError, RequestTooLarge, concerning, described

# Number of characters that a Rust tokenizer encodes in less time than two thread switches take.
SHORT_TEXT = 256
# Maximum characters of a rendered template, which may be much longer than the messages.
MAX_RENDERED = 1 << 24

T = TypeVar("T")
_Job = Callable[[Tokenizer | None], None]
_Jobs = SimpleQueue[_Job | None]


class TokenizerPool:
    """Worker threads that run functions on tokenizers that no two threads share.

    Tokenizers are not thread-safe ("Already borrowed"), so each worker has a copy. The copies are made in the
    constructor, not at first use, because the caller might change the tokenizer by then. Workers are daemon threads,
    sleep while idle, and end with `close` or when the pool is collected.
    """

    def __init__(self, tokenizer: Tokenizer | None, num_workers: int = 2) -> None:
        self._jobs: _Jobs = SimpleQueue()
        self._lock = threading.Lock()  # so that nothing is queued after the end mark
        self._halting = threading.Event()
        self._threads = []
        for number in range(num_workers):
            args = (self._jobs, copy_tokenizer(tokenizer), self._halting)
            thread = threading.Thread(target=_work, args=args, name=f"penstock-tokenizer-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._end = weakref.finalize(self, self._jobs.put, None)

    def submit(self, fn: Callable[..., T], *args: Any) -> Future[T]:
        """Run `fn(tokenizer, *args)` on a worker. Raises `EngineClosed` after `close`."""
        future: Future[T] = Future()
        with self._lock:
            if not self._end.alive:
                raise EngineClosed("the tokenizer workers were stopped: create a new engine")
            self._jobs.put(lambda tokenizer: _resolve(future, fn, tokenizer, args))
        return future

    def close(self) -> None:
        """Accept no more work. Work submitted earlier still runs; returns without waiting for it."""
        with self._lock:
            self._end()

    def halt(self, until: float) -> None:
        """Start no further work and wait for the workers until then, because the process exits."""
        self._halting.set()
        self._jobs.put(None)
        join_threads(self._threads, until)


def _work(jobs: _Jobs, tokenizer: Tokenizer | None, halting: threading.Event) -> None:
    while (job := jobs.get()) is not None and not halting.is_set():
        job(tokenizer)
        del job  # so that an idle worker keeps no prompt alive
    jobs.put(None)  # for the next worker


def _resolve(future: Future[T], fn: Callable[..., T], tokenizer: Tokenizer | None, args: tuple[Any, ...]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = fn(tokenizer, *args)
    except BaseException as error:
        future.set_exception(error)
        del future  # otherwise the error's traceback and the future keep each other alive
    else:
        future.set_result(result)


def encode_prompt(
    tokenizer: Tokenizer | None,
    prompt: PromptInput,
    *,
    add_special_tokens: bool = True,
    check: Callable[[Tokenizer | None, str], None] | None = None,
) -> tuple[str | None, list[int]]:
    """Return (the prompt's text, its token ids); the text is None if only ids were given.

    Chat messages are rendered by the tokenizer's template, which writes the special tokens itself. `tokenizer` may be
    None for token ids. `check` may refuse the text before it is encoded. Raises `RequestError` for a prompt that cannot
    be encoded.
    """
    if prompt.token_ids is not None:
        return prompt.text, prompt.token_ids
    try:
        text = prompt.text or "" if prompt.chat is None else _render(tokenizer, prompt.chat)
        if check is not None:
            check(tokenizer, text)
        return text, _encode_text(tokenizer, text, add_special_tokens and prompt.chat is None)
    except RequestError as error:
        error.concerns("prompt")
        raise


def prompt_text(tokenizer: Tokenizer | None, prompt: PromptInput) -> str:
    """The text of a prompt, before it is encoded. Raises `RequestError` for token ids."""
    if prompt.chat is not None:
        return _render(tokenizer, prompt.chat)
    if prompt.token_ids is not None:
        raise RequestError("token ids have no template to render: pass a string or chat messages, or use detokenize")
    return prompt.text or ""


@concerning("prompt")
def encode_ids(tokenizer: Tokenizer | None, prompt: PromptInput, add_special_tokens: bool) -> list[int]:
    """The token ids of a prompt. Raises `RequestError`."""
    with _explained("the prompt could not be encoded"):
        return encode_prompt(tokenizer, prompt, add_special_tokens=add_special_tokens)[1]


def decode_ids(tokenizer: Tokenizer | None, ids: Sequence[int], skip_special_tokens: bool) -> str:
    """The text of token ids; ids without text are left out. Raises `RequestError`."""
    _need_tokenizer(tokenizer, "there is no text to decode to")
    assert tokenizer is not None
    with _explained("the token ids could not be decoded"):
        return TokenDecoder(tokenizer, skip_special_tokens).text(ids)


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Make any error of a tokenizer a `RequestError`."""
    try:
        yield
    except PenstockError:
        raise
    except BaseException as error:  # a Rust tokenizer's panic is no Exception
        raise RequestError(f"{what}: {described(error)}") from error


@concerning("bad_words")
def encode_words(tokenizer: Tokenizer | None, words: Iterable[str | Sequence[int]]) -> list[list[int]]:
    """Token ids of `bad_words`: each string as at the start of a text and as after a space; ids unchanged.

    Raises `RequestError` for other types, and for strings when `tokenizer` is None.
    """
    encoded = (tuple(ids) for word in words for ids in _encode_word(tokenizer, word))
    return [list(ids) for ids in dict.fromkeys(encoded)]


def _encode_word(tokenizer: Tokenizer | None, word: str | Sequence[int]) -> list[list[int]]:
    if not isinstance(word, str):
        return [read_ids(word)]
    _need_tokenizer(tokenizer, "pass bad_words as lists of token ids")
    bare = word.lstrip(" ") or word
    return [_encode_text(tokenizer, text, add_special_tokens=False) for text in (bare, f" {bare}")]


def _encode_text(tokenizer: Tokenizer | None, text: str, add_special_tokens: bool) -> list[int]:
    _need_tokenizer(tokenizer, 'pass {"prompt_token_ids": [...]}')
    assert tokenizer is not None
    if not text:
        raise RequestError(EMPTY)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{text[:40]!r} has an unpaired surrogate at character {error.start}: remove it") from None
    ids = _encode_valid(tokenizer, text, add_special_tokens)
    if not ids:
        raise RequestError(f"{text[:40]!r} has no tokens: pass other text, or token ids")
    return ids


def _encode_valid(tokenizer: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """The result of `tokenizer.encode`, computed by the backend alone where possible.

    transformers' own call also computes offsets and masks. For a long text, `encode_batch_fast` releases the
    interpreter lock, which `backend.encode` holds; for a short one, reacquiring the lock takes longer than encoding.
    """
    if not is_plain(tokenizer):
        return list(tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False))
    backend = getattr(tokenizer, "backend_tokenizer")  # noqa: B009 - not every tokenizer has one
    if len(text) <= SHORT_TEXT:
        return list(backend.encode(text, add_special_tokens=add_special_tokens).ids)
    return list(backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)


def is_plain(tokenizer: Tokenizer | None) -> bool:
    """Whether `tokenizer.encode` does the same as its backend, without state or methods of its own."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return (
        tokenizer is not None
        and backend is not None
        and backend.truncation is None
        and backend.padding is None
        and backend.encode_special_tokens == getattr(tokenizer, "split_special_tokens", None)
        and not redefines(tokenizer, "__call__", "encode", "_encode_plus", "_batch_encode_plus")
    )


def _render(tokenizer: Tokenizer | None, chat: Chat) -> str:
    """The conversation as one text, rendered by the tokenizer's chat template."""
    _need_tokenizer(tokenizer, 'pass {"prompt_token_ids": [...]}')
    if len(text := render_chat(tokenizer, chat)) > MAX_RENDERED:
        raise RequestTooLarge(f"the chat template wrote {len(text)} characters, more than {MAX_RENDERED}")
    return text


def _need_tokenizer(tokenizer: Tokenizer | None, remedy: str) -> None:
    if tokenizer is None:
        raise RequestError(f"this engine serves token ids only: {remedy}")
