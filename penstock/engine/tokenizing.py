"""Prompts to token ids, and the worker threads on which that happens.

Owns private copies of the tokenizer, one per worker. Never touches the caller's tokenizer after the constructor, never
runs on an event loop. Called by the engine for every prompt that is not token ids already.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from operator import index
from queue import SimpleQueue
from typing import Any, TypeVar

from penstock.engine.decoding import redefines
from penstock.engine.exiting import join
from penstock.engine.tokenizer_copies import copy_tokenizer
from penstock.errors import EngineClosed, RequestError, shown, text_of

# A string, token ids, chat messages, {"prompt": str}, or {"prompt_token_ids": ids} with its text as "prompt" or not.
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]] | Mapping[str, Any]

T = TypeVar("T")
_Job = Callable[[Any], None]
_Jobs = SimpleQueue[_Job | None]

_WANTED = 'a string, token ids, chat messages, {"prompt": str} or {"prompt_token_ids": [...]}'


class TokenizerPool:
    """Worker threads that run functions on tokenizers that no two threads share.

    Tokenizers are not thread-safe ("Already borrowed"), so each worker has a copy. The copies are made here, not at
    first use: copying must not meet the caller changing the tokenizer. Workers are daemons, sleep while idle, and end
    with `close` or with the pool.
    """

    def __init__(self, tokenizer: Any, num_workers: int = 2) -> None:
        self._jobs: _Jobs = SimpleQueue()
        self._lock = threading.Lock()  # nothing may enter the queue behind the end mark
        self._resting = threading.Event()
        self._threads = []
        for number in range(num_workers):
            args = (self._jobs, copy_tokenizer(tokenizer), self._resting)
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
        """Take no more work. What was submitted before still runs; returns without waiting for it."""
        with self._lock:
            self._end()

    def rest(self, until: float) -> None:
        """The process exits: begin no work that waits, and see the workers end until then."""
        self._resting.set()
        self._jobs.put(None)
        join(self._threads, until)


def _work(jobs: _Jobs, tokenizer: Any, resting: threading.Event) -> None:
    while (job := jobs.get()) is not None and not resting.is_set():
        job(tokenizer)
        del job  # an idle worker keeps no prompt alive
    jobs.put(None)  # for the next worker


def _resolve(future: Future[T], fn: Callable[..., T], tokenizer: Any, args: tuple[Any, ...]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = fn(tokenizer, *args)
    except BaseException as error:
        future.set_exception(error)
        del future  # else its traceback and it keep each other alive
    else:
        future.set_result(result)


def needs_tokenizer(prompt: Prompt) -> bool:
    """Whether `encode_prompt` will tokenize, so that it belongs on a worker."""
    if isinstance(prompt, Mapping):
        return "prompt_token_ids" not in prompt
    return isinstance(prompt, str) or _is_chat(prompt)


def check_keys(prompt: Mapping[str, Any]) -> None:
    """Refuse a mapping that is no prompt. Raises `RequestError`."""
    if unknown := set(prompt) - {"prompt", "prompt_token_ids"}:
        raise RequestError(f"a prompt has no key {min(map(str, unknown))!r}: pass {_WANTED}")


def encode_prompt(tokenizer: Any, prompt: Prompt, *, add_special_tokens: bool = True) -> tuple[str | None, list[int]]:
    """Return (the prompt's text, its token ids); the text is None where only ids were given.

    Chat messages go through the tokenizer's template, which writes the special tokens itself. `tokenizer` may be None
    for token ids. Raises `RequestError` for anything that is no prompt.
    """
    if isinstance(prompt, Mapping):
        return _encode_mapping(tokenizer, prompt, add_special_tokens)
    if isinstance(prompt, str):
        return prompt, _encode_text(tokenizer, prompt, add_special_tokens)
    if _is_chat(prompt):
        text = _render(tokenizer, prompt)
        return text, _encode_text(tokenizer, text, add_special_tokens=False)
    return None, _check_ids(prompt)


def encode_words(tokenizer: Any, words: Iterable[str | Sequence[int]]) -> list[list[int]]:
    """Token ids of `bad_words`: each string as at the start of a text and as after a space; ids as they are.

    Raises `RequestError` for what is neither, and for strings when `tokenizer` is None.
    """
    found: list[list[int]] = []
    for word in words:
        for ids in _encode_word(tokenizer, word):
            if ids not in found:
                found.append(ids)
    return found


def _encode_word(tokenizer: Any, word: str | Sequence[int]) -> list[list[int]]:
    if not isinstance(word, str):
        return [_check_ids(word)]
    _need_tokenizer(tokenizer, "pass bad_words as lists of token ids")
    bare = word.lstrip(" ") or word
    return [_encode_text(tokenizer, text, add_special_tokens=False) for text in (bare, f" {bare}")]


def _encode_mapping(
    tokenizer: Any, prompt: Mapping[str, Any], add_special_tokens: bool
) -> tuple[str | None, list[int]]:
    check_keys(prompt)
    text = prompt.get("prompt")
    if not isinstance(text, str | None):
        raise RequestError(f'"prompt" must be a string, got {type(text).__name__}: pass {_WANTED}')
    if "prompt_token_ids" in prompt:
        return text, _check_ids(prompt["prompt_token_ids"])
    return text, _encode_text(tokenizer, text or "", add_special_tokens)


def _encode_text(tokenizer: Any, text: str, add_special_tokens: bool) -> list[int]:
    _need_tokenizer(tokenizer, 'pass {"prompt_token_ids": [...]}')
    if not text:
        raise RequestError("the prompt is empty: pass at least one character, or token ids")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{text[:40]!r} has half a surrogate pair at character {error.start}: remove it") from None
    ids = _encode_valid(tokenizer, text, add_special_tokens)
    if not ids:
        raise RequestError(f"{text[:40]!r} has no tokens: pass other text, or token ids")
    return ids


def _encode_valid(tokenizer: Any, text: str, add_special_tokens: bool) -> list[int]:
    """What `tokenizer.encode` returns, in the way that lets other threads run meanwhile where there is one.

    `encode_batch_fast` releases the interpreter lock, `backend.encode` holds it from beginning to end, and
    transformers' own call computes offsets and masks that nobody asked for.
    """
    if not _is_plain(tokenizer):
        return list(tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False))
    encodings = tokenizer.backend_tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    ids: list[int] = encodings[0].ids
    return ids


def _is_plain(tokenizer: Any) -> bool:
    """Whether `tokenizer.encode` is what its backend does, with no state or method of its own in between."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return (
        backend is not None
        and backend.truncation is None
        and backend.padding is None
        and backend.encode_special_tokens == tokenizer.split_special_tokens
        and not redefines(tokenizer, "__call__", "encode", "_encode_plus", "_batch_encode_plus")
    )


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _render(tokenizer: Any, messages: Sequence[Any]) -> str:
    """The messages as one text, as the tokenizer's chat template writes them."""
    _need_tokenizer(tokenizer, 'pass {"prompt_token_ids": [...]}')
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise RequestError(f'chat message {number} must be a dict with "role" and "content", got {shown(message)}')
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError("this tokenizer has no chat template: pass a string, or set tokenizer.chat_template")
    try:
        return str(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False))
    except BaseException as error:  # templates raise what they like about roles and orders that they do not know
        raise RequestError(f"the chat template refused these messages: {text_of(error)}") from error


def _need_tokenizer(tokenizer: Any, remedy: str) -> None:
    if tokenizer is None:
        raise RequestError(f"this engine serves token ids only: {remedy}")


def _check_ids(prompt: Any) -> list[int]:
    values = prompt.tolist() if hasattr(prompt, "tolist") else prompt  # numpy, torch, array.array
    if not isinstance(values, Sequence) or isinstance(values, str | bytes | bytearray):
        raise RequestError(f"a prompt cannot be a {type(prompt).__name__}: pass {_WANTED}")
    if not values:
        raise RequestError("the prompt is empty: pass at least one token id")
    try:
        ids = list(map(index, values))
    except TypeError as error:
        raise RequestError(f"token ids must be integers, but {error}: pass {_WANTED}, one per request") from None
    if bool in set(map(type, values)):
        raise RequestError("token ids must be integers, not True or False: pass the ids, not a mask")
    if min(ids) < 0:
        raise RequestError(f"token ids must be at least 0, got {min(ids)}: remove padding and ignored positions")
    return ids
