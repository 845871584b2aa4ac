"""Prompts: what a caller may pass, and the plain form that engines keep.

A prompt is read once, on the caller's thread: none of the caller's code runs on an engine's thread, and later changes
to the caller's objects have no effect. Encoding text is left to each engine.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import TypeGuard, cast

from penstock.errors import RequestError, described, shown
from penstock.values import flag, items, plain
from penstock.values import text as checked_text

Message = Mapping[str, object]
# A string, token ids, chat messages, {"prompt": str}, {"prompt_token_ids": ids} (optionally with its text as "prompt"),
# or {"messages": [...]} (optionally with further keys of `Chat`).
Prompt = str | Sequence[int] | Sequence[Message] | Mapping[str, object]

KINDS = 'a string, token ids, chat messages, {"prompt": str}, {"prompt_token_ids": [...]} or {"messages": [...]}'
EMPTY = "the prompt is empty: pass at least one character, token id or chat message"
_TEXT_KEYS = frozenset({"prompt", "prompt_token_ids"})
_CHAT_KEYS = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"}
)
# Arguments of `apply_chat_template` that the engine sets itself.
_RESERVED_ARGUMENTS = _CHAT_KEYS | {
    *("conversation", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict")
}


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, and the arguments for rendering its template.

    With `continue_final_message` the model continues the last message instead of answering it; this is the default if
    the last message is the assistant's. Otherwise `add_generation_prompt` starts the assistant's turn. `arguments` are
    further variables of the template (`enable_thinking`).
    """

    messages: list[dict[str, object]]
    tools: list[object] | None = None
    documents: list[object] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    arguments: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PromptInput:
    """A prompt in plain Python. Either `token_ids` are known, or `text` or `chat` must be encoded.

    `text` next to `token_ids` is the caller's text for these ids; it is reported and never encoded.
    """

    text: str | None = None
    token_ids: list[int] | None = None
    chat: Chat | None = None
    is_bare: bool = False  # a string passed without {"prompt": ...}
    is_encoded: bool = False  # the ids were made from the text here

    @property
    def needs_tokenizer(self) -> bool:
        """Whether the prompt must be encoded."""
        return self.token_ids is None

    def estimate_tokens(self) -> int:
        """The approximate number of tokens: exact for ids, a quarter of the characters for text."""
        if self.token_ids is not None:
            return len(self.token_ids)
        if self.chat is not None:
            return sum(map(_num_characters, self.chat.messages)) // 4 + 1
        return len(self.text or "") // 4 + 1


def read_prompt(prompt: Prompt) -> PromptInput:
    """Copy the prompt into plain Python. Raises `RequestError` if it is not a valid prompt."""
    try:
        return _read(prompt)
    except RequestError as error:
        error.concerns("prompt")
        raise
    except Exception as error:  # raised by an object that only looks like a prompt
        raise RequestError(f"the prompt cannot be read: {described(error)}", parameter="prompt") from error


def as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """The prompts as a list: a string, a mapping, token ids or one conversation is a single prompt."""
    try:
        return [cast(Prompt, prompts)] if _is_single(prompts) else list(cast(Sequence[Prompt], prompts))
    except Exception as error:
        raise RequestError(f"prompts must be a prompt or a list of prompts ({described(error)})") from error


def _is_single(prompts: Prompt | Sequence[Prompt]) -> bool:
    if prompts is None or isinstance(prompts, str | bytes | Mapping):
        return True
    first = plain(prompts[0]) if len(prompts) > 0 else None
    return isinstance(first, int) or (isinstance(first, dict) and "role" in first)


def _read(prompt: object) -> PromptInput:
    if isinstance(prompt, Mapping):
        return _read_mapping(prompt)
    if isinstance(prompt, str):
        return PromptInput(text=_nonempty(str.__str__(prompt)), is_bare=True)
    if is_chat(prompt):
        return PromptInput(chat=_read_chat({"messages": prompt}))
    return PromptInput(token_ids=read_ids(prompt))


def _read_mapping(prompt: Mapping[str, object]) -> PromptInput:
    prompt = dict(prompt)
    if unknown := set(prompt) - (_CHAT_KEYS if "messages" in prompt else _TEXT_KEYS):
        kinds = 'chat messages in a list, [{"role": ..., "content": ...}]' if "role" in prompt else KINDS
        raise RequestError(f"a prompt has no key {min(map(str, unknown))!r}: pass {kinds}")
    if "messages" in prompt:
        return PromptInput(chat=_read_chat(prompt))
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


def _read_chat(prompt: Mapping[str, object]) -> Chat:
    """A copy of the conversation, with the text of each message as one string."""
    values = copy.deepcopy({name: value for name, value in prompt.items() if value is not None})
    messages = [_read_message(*numbered) for numbered in enumerate(items("messages", values.pop("messages", ())))]
    if not messages:
        raise RequestError("the conversation is empty: pass at least one message")
    arguments = values.pop("chat_template_kwargs", {})
    if not isinstance(arguments, Mapping):
        raise RequestError(f"chat_template_kwargs must be a mapping of names to values, got {shown(arguments)}")
    if reserved := _RESERVED_ARGUMENTS & set(arguments):
        raise RequestError(f"chat_template_kwargs cannot set {min(reserved)!r}: pass it next to messages, or omit it")
    last = messages[-1]
    prefill = last["role"] == "assistant" and "tool_calls" not in last and bool(last["content"])
    is_continued = flag("continue_final_message", values.get("continue_final_message", prefill))
    starts_turn = flag("add_generation_prompt", values.get("add_generation_prompt", not is_continued))
    if is_continued and starts_turn:
        raise RequestError("continue_final_message continues a message: set add_generation_prompt=False, or omit it")
    tools, documents = (list(items(name, values[name])) if name in values else None for name in ("tools", "documents"))
    return Chat(messages, tools, documents, starts_turn, is_continued, dict(arguments))


def _read_message(number: int, message: object) -> dict[str, object]:
    if not isinstance(message, Mapping) or "role" not in message:
        raise RequestError(f'chat message {number} must be a dict with "role" and "content", got {shown(message)}')
    content = message.get("content")
    if content is None and "content" not in message and not message.get("tool_calls"):
        raise RequestError(f'chat message {number} has no "content": pass a string, or a list of text parts')
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "\n".join(_text_of_part(number, part) for part in content)
    return {**message, "content": "" if content is None else content}


def _text_of_part(number: int, part: object) -> str:
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") in ("text", "input_text") else None
    if not isinstance(text, str):
        raise RequestError(
            f'chat message {number} has a part that is not text, {shown(part)}: pass {{"type": "text", "text": "..."}}'
        )
    return text


def read_ids(prompt: object) -> list[int]:
    """Token ids as a list of plain integers. Raises `RequestError`."""
    values = prompt.tolist() if hasattr(prompt, "tolist") else prompt  # numpy, torch, array.array
    if not isinstance(values, Sequence) or isinstance(values, str | bytes | bytearray):
        raise RequestError(f"a prompt cannot be of type {type(prompt).__name__}: pass {KINDS}")
    if not values:
        raise RequestError(EMPTY)
    if isinstance(values[0], Sequence):
        raise RequestError("a request has one prompt, and this looks like a list of them: make a request of each")
    try:
        ids = list(map(index, values))
    except TypeError as error:
        raise RequestError(f"token ids must be integers, but {error}: pass {KINDS}") from None
    if bool in set(map(type, values)):
        raise RequestError("token ids must be integers, not True or False: pass the ids, not a mask")
    if min(ids) < 0:
        raise RequestError(f"token ids must be at least 0, got {min(ids)}: remove padding and ignored positions")
    return ids


def _num_characters(message: object) -> int:
    try:
        return len(str(message))
    except Exception:  # the chat template reports invalid content later, on the tokenizer's thread
        return 0
