"""`Housekeeper`: releases unused memory, on request and when an idle engine uses too much.

Decides when to release, and finds the blocks of the cache that hold nothing. Never runs during a step: the work is
queued on the model's thread. Called on the engine's thread, by `EngineCore` and for `InferenceEngine.optimize_memory`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future

from penstock.cache.manager import CacheManager
from penstock.config import EngineConfig
from penstock.engine.loop.worker import Job
from penstock.models.protocol import ModelRunner

# Minimum time between two calls of `tidy` that release memory, in seconds: garbage collection holds the interpreter
# lock for 0.1 s with torch loaded.
TIDY_PAUSE_S = 60.0
Run = Callable[..., Job[int]]


class Housekeeper:
    """`run(function, *arguments)` queues a job on the model's thread.

    `trim_draft` runs there too; it releases a draft model's unused memory and returns the number of bytes.
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
        """Release unneeded memory of an idle engine if more than `gc_threshold` of the memory is in use."""
        now = self._clock()
        if now >= self._next_tidy and self._runner.memory_usage() > self._config.gc_threshold:
            self._next_tidy = now + TIDY_PAUSE_S
            await self._run(self._trim, *self._cache.unused()).done

    def clean(self, freed: Future[int]) -> None:
        """Release all memory that no running sequence needs, cached prefixes included.

        Sets `freed` to the number of bytes, or to the error, on the model's thread, which completes its queued jobs
        even after the engine's loop has ended.
        """
        self._cache.drop_unused()
        try:
            self._run(self._trim_for, freed, *self._cache.unused())
        except RuntimeError:  # the model's thread has ended
            freed.set_result(0)

    def reset_cache(self) -> None:
        """Reuse no K/V computed so far."""
        self._cache.reset()

    def _trim(self, blocks: list[int], places: list[int]) -> int:
        """Runs on the model's thread. Blocks that were empty when this was queued stay unused until the next step."""
        return self._runner.trim_memory(blocks, places) + self._trim_draft()

    def _trim_for(self, freed: Future[int], blocks: list[int], places: list[int]) -> int:
        try:
            freed.set_result(self._trim(blocks, places))
        except Exception as error:
            freed.set_exception(error)
        return 0
