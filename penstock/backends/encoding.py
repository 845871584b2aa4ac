"""`Encoder`: prompts to token ids, for an engine that takes ids only.

Owns one thread and a copy of the tokenizer, which two threads must not use at once. Called by engines of this package.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from penstock.api.prompt import PromptInput
from penstock.api.rendering import render_chat
from penstock.errors import RequestError, text_of

T = TypeVar("T")


class Encoder:
    """Encodes with a tokenizer of `transformers`; None for an engine that serves token ids only."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._thread = ThreadPoolExecutor(1, "penstock-encoder")

    async def encode(self, prompt: PromptInput, add_special_tokens: bool = True) -> tuple[str | None, list[int]]:
        """The prompt's text, if it has one, and its token ids. Raises `RequestError`."""
        if prompt.token_ids is not None:
            return prompt.text, prompt.token_ids
        return await self._run(_encode, prompt, add_special_tokens)

    async def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of token ids. Raises `RequestError`."""
        return await self._run(_decode, list(ids), skip_special_tokens)

    async def _run(self, function: Callable[..., T], *args: Any) -> T:
        if self._tokenizer is None:
            raise RequestError('this engine serves token ids only: pass {"prompt_token_ids": [...]}')
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, self._tokenizer, *args)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False)


def _encode(tokenizer: Any, prompt: PromptInput, add_special_tokens: bool) -> tuple[str, list[int]]:
    """A chat template writes the special tokens itself."""
    text = prompt.text or "" if prompt.chat is None else render_chat(tokenizer, prompt.chat)
    try:
        ids = list(tokenizer.encode(text, add_special_tokens=add_special_tokens and prompt.chat is None))
    except Exception as error:
        raise RequestError(f"the prompt cannot be encoded: {text_of(error)}") from error
    if not ids:
        raise RequestError(f"{text[:40]!r} has no tokens: pass other text, or token ids")
    return text, ids


def _decode(tokenizer: Any, ids: list[int], skip_special_tokens: bool) -> str:
    try:
        return str(tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))
    except Exception as error:
        raise RequestError(f"the token ids cannot be decoded: {text_of(error)}") from error
