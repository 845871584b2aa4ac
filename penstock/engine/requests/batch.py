"""`Batch`: the requests of one call that has several prompts and no use for a part of the results.

Owns their handles and the deadline that they share. A batch that is longer than the queue waits for its own earlier
requests. Called by `embed` and `score`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from penstock.api.handle import RequestHandle
from penstock.api.prompt import Prompt
from penstock.api.protocols import WithAdapters
from penstock.errors import EngineOverloaded
from penstock.sampling import RequestPriority, SamplingParams
from penstock.values import real


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """The options of every request of a batch; `deadline` is in seconds from now. Raises `RequestError`."""

    namespace: str
    priority: RequestPriority
    deadline: float | None
    adapter: str = ""

    def __post_init__(self) -> None:
        if self.deadline is not None:
            deadline = real("deadline", self.deadline, -math.inf, math.inf, "seconds from now")
            object.__setattr__(self, "deadline", deadline)


class Batch:
    """Requests that end together: leaving the block cancels what still runs."""

    def __init__(self, engine: WithAdapters, options: BatchOptions) -> None:
        self.handles: list[RequestHandle] = []
        self._engine = engine
        self._options = options
        self._begin = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self.handles:
            handle.cancel()

    async def submit(self, prompt: Prompt, params: SamplingParams) -> None:
        """Submit one request. Raises what `Engine.generate` and awaiting an earlier request raise."""
        options = self._options
        for running in (*(handle for handle in self.handles if not handle.done()), None):
            try:
                handle = self._engine.generate(
                    *(prompt, params),
                    namespace=options.namespace,
                    priority=options.priority,
                    adapter=options.adapter,
                    deadline=None if options.deadline is None else options.deadline - self._elapsed_s(),
                )
            except EngineOverloaded:
                if running is None:
                    raise
                await running
            else:
                self.handles.append(handle)
                return

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._begin
