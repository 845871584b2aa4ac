"""Prompts: what a caller may pass, and the plain form in which engines keep it.

A prompt is read once, on the caller's thread, so that no code of the caller's runs on an engine's thread and later
changes of the caller's objects have no effect. Encoding text is an engine's own business.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import TypeGuard

from penstock.errors import RequestError, described, shown
from penstock.values import text as checked_text

Message = Mapping[str, object]
# A string, token ids, chat messages, {"prompt": str}, or {"prompt_token_ids": ids} with its text as "prompt" or not.
Prompt = str | Sequence[int] | Sequence[Message] | Mapping[str, object]

KINDS = 'a string, token ids, chat messages, {"prompt": str} or {"prompt_token_ids": [...]}'
EMPTY = "the prompt is empty: pass at least one character, or token ids"


@dataclass(frozen=True, slots=True)
class PromptInput:
    """A prompt in plain Python. Either `token_ids` are known, or `text` or `messages` are to be encoded.

    `text` beside `token_ids` is what the caller says they spell; it is reported and never encoded.
    """

    text: str | None = None
    token_ids: list[int] | None = None
    messages: list[Message] | None = None

    @property
    def needs_tokenizer(self) -> bool:
        """Whether there is anything to encode."""
        return self.token_ids is None

    def estimate_tokens(self) -> int:
        """About how many tokens it has: exact for ids, a quarter of the characters for text."""
        if self.token_ids is not None:
            return len(self.token_ids)
        if self.messages is not None:
            return sum(map(_num_characters, self.messages)) // 4 + 1
        return len(self.text or "") // 4 + 1


def read_prompt(prompt: Prompt) -> PromptInput:
    """The prompt as it is now. Raises `RequestError` for what cannot be one."""
    try:
        return _read(prompt)
    except RequestError:
        raise
    except Exception as error:  # of an object that only looks like a prompt
        raise RequestError(f"the prompt cannot be read: {described(error)}") from error


def _read(prompt: object) -> PromptInput:
    if isinstance(prompt, Mapping):
        return _read_mapping(prompt)
    if isinstance(prompt, str):
        return PromptInput(text=_nonempty(str.__str__(prompt)))
    if is_chat(prompt):
        messages = copy.deepcopy(list(prompt))
        check_messages(messages)
        return PromptInput(messages=list(map(dict, messages)))
    return PromptInput(token_ids=read_ids(prompt))


def _read_mapping(prompt: Mapping[str, object]) -> PromptInput:
    prompt = dict(prompt)
    if unknown := set(prompt) - {"prompt", "prompt_token_ids"}:
        raise RequestError(f"a prompt has no key {min(map(str, unknown))!r}: pass {KINDS}")
    text = prompt.get("prompt")
    if text is not None and not isinstance(text, str):
        raise RequestError(f'"prompt" must be a string, got {type(text).__name__}: pass {KINDS}')
    if "prompt_token_ids" in prompt:
        spelled = None if text is None else checked_text('"prompt"', text)
        return PromptInput(spelled, read_ids(prompt["prompt_token_ids"]))
    return PromptInput(text=checked_text('"prompt"', _nonempty(text or "")))


def _nonempty(text: str) -> str:
    if not text:
        raise RequestError(EMPTY)
    return text


def is_chat(prompt: object) -> TypeGuard[Sequence[Message]]:
    """Whether a prompt is a list of chat messages."""
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def check_messages(messages: Sequence[object]) -> None:
    """Raises `RequestError` for what is no list of chat messages."""
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise RequestError(f'chat message {number} must be a dict with "role" and "content", got {shown(message)}')


def read_ids(prompt: object) -> list[int]:
    """Token ids as a list of plain integers. Raises `RequestError`."""
    values = prompt.tolist() if hasattr(prompt, "tolist") else prompt  # numpy, torch, array.array
    if not isinstance(values, Sequence) or isinstance(values, str | bytes | bytearray):
        raise RequestError(f"a prompt cannot be a {type(prompt).__name__}: pass {KINDS}")
    if not values:
        raise RequestError("the prompt is empty: pass at least one token id")
    try:
        ids = list(map(index, values))
    except TypeError as error:
        raise RequestError(f"token ids must be integers, but {error}: pass {KINDS}, one per request") from None
    if bool in set(map(type, values)):
        raise RequestError("token ids must be integers, not True or False: pass the ids, not a mask")
    if min(ids) < 0:
        raise RequestError(f"token ids must be at least 0, got {min(ids)}: remove padding and ignored positions")
    return ids


def _num_characters(message: object) -> int:
    try:
        return len(str(message))
    except Exception:  # its content is the chat template's business, on the tokenizer's thread
        return 0
