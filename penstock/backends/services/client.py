"""`InferenceServiceClient`: what rollout workers call, whatever service answers.

Owns the weight sync of its calls and the access in OpenAI's style. Subclasses call a service in `completion` and
`generate`, inside `_in_service`.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
)
from typing import Any, Protocol, runtime_checkable

from penstock.backends.services.openai_style import ChatWrapper, CompletionsWrapper, Messages
from penstock.backends.services.records import Json
from penstock.errors import ConfigurationError, shown

POLL_S = 0.1  # of a controller that tells only its status


@runtime_checkable
class Blocking(Protocol):
    """A controller that blocks until a service may be called."""

    def wait_for_weight_sync(self, model_tag: str) -> None: ...


@runtime_checkable
class AsyncBlocking(Protocol):
    """The same for event loops."""

    def await_for_weight_sync(self, model_tag: str) -> Awaitable[None]: ...


@runtime_checkable
class Telling(Protocol):
    """A controller that tells whether a service may be called: "continue" or "block"."""

    def check_rollout_service_status(self, model_tag: str) -> str: ...


@runtime_checkable
class Leasing(Protocol):
    """A controller that also knows which requests run, such as `WeightSyncController`."""

    def lease(self, model_tag: str) -> AbstractContextManager[int]: ...

    def alease(self, model_tag: str) -> AbstractAsyncContextManager[int]: ...


class InferenceServiceClient(ABC):
    """A client of an inference service. Every method has a twin for event loops, whose name begins with `a`.

    With `freeze_for_weight_sync` a call waits while weights are updated, and a controller that leases
    (`WeightSyncController`) starts no update before the call has ended.
    """

    freeze_for_weight_sync = True
    _weight_sync_controller: object = None
    _model_tag = "default"

    @abstractmethod
    def completion(self, prompt: str, **kwargs: Any) -> Json:
        """Complete a prompt. The response has OpenAI's fields, and `nexrl_train`. Raises `PenstockError`."""

    @abstractmethod
    def generate(self, messages: Messages, **kwargs: Any) -> Json:
        """Answer a chat. The response has OpenAI's fields, and `nexrl_train`. Raises `PenstockError`."""

    @abstractmethod
    def apply_chat_template(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool = True,
        tokenize: bool = False,
    ) -> str | list[int]:
        """The prompt of a chat as text, or as token ids. Raises `RequestError`."""

    async def acompletion(self, prompt: str, **kwargs: Any) -> Json:
        """`completion` for event loops."""
        return await asyncio.to_thread(self.completion, prompt, **kwargs)

    async def agenerate(self, messages: Messages, **kwargs: Any) -> Json:
        """`generate` for event loops."""
        return await asyncio.to_thread(self.generate, messages, **kwargs)

    def close(self) -> None:
        """End the connections of this client; nothing unless a subclass has some."""
        return None

    async def aclose(self) -> None:
        """`close` for event loops."""
        await asyncio.to_thread(self.close)

    @property
    def completions(self) -> CompletionsWrapper:
        """Text completions in OpenAI's style: `client.completions.create(prompt=...)`."""
        return CompletionsWrapper(self)

    @property
    def chat(self) -> ChatWrapper:
        """Chats in OpenAI's style: `client.chat.completions.create(messages=...)`."""
        return ChatWrapper(self)

    def set_weight_sync_controller(self, controller: object, model_tag: str | None = None) -> None:
        """Wait for this controller before every call, under this model tag; None keeps the tag of the config.

        A controller has `wait_for_weight_sync(model_tag)`, or `check_rollout_service_status(model_tag)`. None detaches.
        """
        if not (controller is None or isinstance(controller, Blocking | Telling)):
            raise ConfigurationError(f"{shown(controller)} has no wait_for_weight_sync(model_tag)")
        self._weight_sync_controller = controller
        self._model_tag = self._model_tag if model_tag is None else model_tag

    def _wait_for_weight_sync(self) -> None:
        """Block inference until weight sync completes, however long that takes. Raises `WeightsError`."""
        controller = self._weight_sync_controller
        if isinstance(controller, Blocking):
            controller.wait_for_weight_sync(self._model_tag)
        elif isinstance(controller, Telling):
            while _is_blocked(controller, self._model_tag):
                time.sleep(POLL_S)

    async def _await_for_weight_sync(self) -> None:
        """`_wait_for_weight_sync` for event loops."""
        controller = self._weight_sync_controller
        if isinstance(controller, AsyncBlocking):
            await controller.await_for_weight_sync(self._model_tag)
        elif isinstance(controller, Blocking):
            await asyncio.to_thread(controller.wait_for_weight_sync, self._model_tag)
        elif isinstance(controller, Telling):
            while _is_blocked(controller, self._model_tag):  # noqa: ASYNC110 (it has no event to wait for)
                await asyncio.sleep(POLL_S)

    @contextmanager
    def _in_service(self) -> Iterator[int | None]:
        """Wait for the weights, and keep them for one call. Gives their version, where the controller knows it."""
        controller = self._weight_sync_controller
        if not self.freeze_for_weight_sync or controller is None:
            yield None
            return
        self._wait_for_weight_sync()
        if not isinstance(controller, Leasing):
            yield None
            return
        with controller.lease(self._model_tag) as version:
            yield version

    @asynccontextmanager
    async def _ain_service(self) -> AsyncIterator[int | None]:
        """`_in_service` for event loops."""
        controller = self._weight_sync_controller
        if not self.freeze_for_weight_sync or controller is None:
            yield None
            return
        await self._await_for_weight_sync()
        if not isinstance(controller, Leasing):
            yield None
            return
        async with controller.alease(self._model_tag) as version:
            yield version


def _is_blocked(controller: Telling, model_tag: str) -> bool:
    status = controller.check_rollout_service_status(model_tag)
    if status not in ("continue", "block"):
        raise ConfigurationError(f'check_rollout_service_status must be "continue" or "block", not {shown(status)}')
    return status == "block"
