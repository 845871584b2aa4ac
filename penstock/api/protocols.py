"""`Engine`: the narrow waist. Everything above (LLM, server, CLI) is written against it; every engine implements it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from penstock.api.handle import RequestHandle
from penstock.api.prompt import Prompt
from penstock.generation import Params
from penstock.outputs import Delta, RequestOutput
from penstock.sampling import RequestPriority

Callback = Callable[[Delta], Awaitable[None] | None]
FinalCallback = Callable[[RequestOutput], Awaitable[None] | None]


class Engine(Protocol):
    """Generates text for many callers at once."""

    def generate(
        self,
        prompt: Prompt,
        params: Params = None,
        *,
        request_id: str | None = None,
        priority: RequestPriority = RequestPriority.NORMAL,
        deadline: float | None = None,
        ttft_deadline: float | None = None,
        namespace: str = "",
        callback: Callback | None = None,
    ) -> RequestHandle:
        """Submit at once, from any thread or loop; await or iterate the handle."""
        ...

    async def score(
        self, prompt_ids: Sequence[int], completion_ids: Sequence[int], *, namespace: str = ""
    ) -> list[float]:
        """The model's log probability of each completion token after the prompt."""
        ...

    def abort(self, request_id: str) -> None:
        """End a request; unknown and ended ids are ignored."""
        ...

    def start(self) -> None:
        """Load the model and begin to serve; blocks until ready."""
        ...

    def stop(self, drain: float = 30.0) -> None:
        """Serve what was accepted for at most `drain` seconds, abort the rest, free everything."""
        ...

    def get_stats(self) -> dict[str, Any]:
        """Figures of the engine so far."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
