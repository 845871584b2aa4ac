"""Access to a service client in the style of the `openai` package: `client.chat.completions.create(...)`.

The objects are those of the `openai` package, with the training record as a further attribute, `nexrl_train`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from penstock.backends.services.records import Json

Messages = Sequence[Mapping[str, object]]


class Completing(Protocol):
    """The calls that the wrappers pass on."""

    def completion(self, prompt: str, **kwargs: Any) -> Json: ...

    def generate(self, messages: Messages, **kwargs: Any) -> Json: ...

    async def acompletion(self, prompt: str, **kwargs: Any) -> Json: ...

    async def agenerate(self, messages: Messages, **kwargs: Any) -> Json: ...


class CompletionsWrapper:
    """`client.completions`: text completions as `openai.types.Completion`."""

    def __init__(self, client: Completing) -> None:
        self._client = client

    def create(self, *, prompt: str, **kwargs: Any) -> Any:
        """`completion` of the client."""
        from openai.types import Completion

        return Completion.construct(**self._client.completion(prompt, **kwargs))

    async def acreate(self, *, prompt: str, **kwargs: Any) -> Any:
        """`create` for event loops."""
        from openai.types import Completion

        return Completion.construct(**await self._client.acompletion(prompt, **kwargs))


class ChatCompletionsWrapper:
    """`client.chat.completions`: chat completions as `openai.types.chat.ChatCompletion`."""

    def __init__(self, client: Completing) -> None:
        self._client = client

    def create(self, *, messages: Messages, **kwargs: Any) -> Any:
        """`generate` of the client."""
        from openai.types.chat import ChatCompletion

        return ChatCompletion.construct(**self._client.generate(messages, **kwargs))

    async def acreate(self, *, messages: Messages, **kwargs: Any) -> Any:
        """`create` for event loops."""
        from openai.types.chat import ChatCompletion

        return ChatCompletion.construct(**await self._client.agenerate(messages, **kwargs))


class ChatWrapper:
    """`client.chat`."""

    def __init__(self, client: Completing) -> None:
        self.completions = ChatCompletionsWrapper(client)
