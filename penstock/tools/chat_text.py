"""How a `Conversation` renders, encodes and decodes text: by its engine, or by a tokenizer of the caller's.

Never adds special tokens: a chat template writes its own. Called by `Conversation` only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from penstock.api.prompt import Message, Prompt, read_prompt
from penstock.api.protocols import Engine, Rendering, Templated, Tokenizing
from penstock.api.rendering import render_chat
from penstock.errors import RequestError


class ChatTokenizer(Protocol):
    """A tokenizer of `transformers`, or a similar object."""

    def apply_chat_template(self, conversation: list[dict[str, object]], **options: object) -> object:
        """The text of a conversation."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool) -> Sequence[int]:
        """The token ids of a text."""
        ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """The text of token ids."""
        ...


class ChatText(Protocol):
    """Turns messages into text, text into token ids, and token ids into text."""

    @property
    def template(self) -> str | None:
        """The chat template, if it is known."""
        ...

    async def render(self, messages: Sequence[Message], options: Mapping[str, object]) -> str:
        """What the chat template writes for these messages, up to where the assistant's reply begins."""
        ...

    async def encode(self, text: str) -> list[int]:
        """The token ids of a text."""
        ...

    async def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        ...


def chat_text(engine: Engine, tokenizer: ChatTokenizer | None) -> ChatText:
    """The text of a conversation with this engine. Raises `RequestError` if the engine needs a tokenizer for it."""
    if tokenizer is not None:
        return _TokenizerText(tokenizer)
    if isinstance(engine, Tokenizing) and isinstance(engine, Rendering):
        return _EngineText(engine, engine, engine)
    raise RequestError("this engine renders no chat templates: pass the model's tokenizer to the Conversation")


class _EngineText:
    """Text through the engine's own tokenizers."""

    def __init__(self, rendering: Rendering, tokenizing: Tokenizing, engine: object) -> None:
        self._rendering = rendering
        self._tokenizing = tokenizing
        self._engine = engine

    @property
    def template(self) -> str | None:
        tokenizer = self._engine.tokenizer if isinstance(self._engine, Templated) else None
        return _template_of(tokenizer)

    async def render(self, messages: Sequence[Message], options: Mapping[str, object]) -> str:
        return await self._rendering.render(_prompt(messages, options))

    async def encode(self, text: str) -> list[int]:
        return await self._tokenizing.tokenize(text, add_special_tokens=False)

    async def decode(self, ids: Sequence[int]) -> str:
        return await self._tokenizing.detokenize(ids, skip_special_tokens=False)


class _TokenizerText:
    """Text through a tokenizer, on the thread of the conversation."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer

    @property
    def template(self) -> str | None:
        return _template_of(self._tokenizer)

    async def render(self, messages: Sequence[Message], options: Mapping[str, object]) -> str:
        chat = read_prompt(_prompt(messages, options)).chat
        assert chat is not None
        return render_chat(self._tokenizer, chat)

    async def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    async def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


def _prompt(messages: Sequence[Message], options: Mapping[str, object]) -> Prompt:
    return {"messages": list(messages), "add_generation_prompt": True, **options}


def _template_of(tokenizer: object) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    return template if isinstance(template, str) else None
