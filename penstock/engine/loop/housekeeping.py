"""`Housekeeper`: returns unused memory, on request and when an idle engine uses too much of it.

Owns when that happens, and which blocks of the cache hold nothing. Never runs beside a step: the work is queued behind
it on the model's thread. Called on the engine's thread, by `EngineCore` and for `InferenceEngine.optimize_memory`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future

from penstock.cache.manager import CacheManager
from penstock.config import EngineConfig
from penstock.engine.loop.worker import Job
from penstock.models.protocol import ModelRunner

# Least time between two tidyings of an idle engine, in seconds: collecting garbage holds the interpreter lock, 0.1 s
# with torch loaded.
TIDY_PAUSE_S = 60.0
Run = Callable[..., Job[int]]


class Housekeeper:
    """`run(function, *arguments)` queues a job on the model's thread.

    There, `trim_draft` returns a draft model's unused memory; how many bytes.
    """

    def __init__(
        self,
        config: EngineConfig,
        runner: ModelRunner,
        cache: CacheManager,
        clock: Callable[[], float],
        run: Run,
        trim_draft: Callable[[], int] = int,
    ) -> None:
        self._config = config
        self._runner = runner
        self._cache = cache
        self._clock = clock
        self._run = run
        self._trim_draft = trim_draft
        self._next_tidy = -math.inf

    async def tidy(self) -> None:
        """The engine is idle: if more than `gc_threshold` of the memory is in use, give back what nobody can miss."""
        now = self._clock()
        if now >= self._next_tidy and self._runner.memory_usage() > self._config.gc_threshold:
            self._next_tidy = now + TIDY_PAUSE_S
            await self._run(self._trim, *self._cache.unused()).done

    def clean(self, freed: Future[int]) -> None:
        """Give back what no running sequence needs, cached prefixes included; `freed` gets the bytes, or the error.

        It gets them on the model's thread, which does its last jobs even when the engine's loop is gone.
        """
        self._cache.drop_unused()
        try:
            self._run(self._trim_for, freed, *self._cache.unused())
        except RuntimeError:  # the model's thread has ended
            freed.set_result(0)

    def reset_cache(self) -> None:
        """Reuse no K/V computed until now."""
        self._cache.reset()

    def _trim(self, blocks: list[int], places: list[int]) -> int:
        """On the model's thread. Blocks that held nothing when this was asked for are not used before the next step."""
        return self._runner.trim_memory(blocks, places) + self._trim_draft()

    def _trim_for(self, freed: Future[int], blocks: list[int], places: list[int]) -> int:
        try:
            freed.set_result(self._trim(blocks, places))
        except Exception as error:
            freed.set_exception(error)
        return 0
