"""Replicas with scripted models, for the tests of this folder."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from penstock import OutOfMemory, PenstockError, ReplicatedEngine, SamplingParams, ScriptedModel
from penstock.constraints.masks import Masks
from penstock.step import StepPlan, StepResult
from tests.tokenizers_for_tests import byte_level

LONG = SamplingParams(max_tokens=100_000, ignore_eos=True)
PATIENCE_S = 60.0
# An engine that fails by a bug says so on its thread.
DYING = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


class Mortal(ScriptedModel):
    """A model that ends its whole engine: after `die()` it returns a step that the scheduler cannot read."""

    is_dying = False

    def execute(self, plan: StepPlan, masks: Masks | None = None) -> StepResult:
        result = super().execute(plan, masks)
        return StepResult((), 0) if self.is_dying else result


class Large(ScriptedModel):
    """A model for which there is no memory."""

    def allocate(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        raise OutOfMemory("out of memory")


def models(count: int = 2, kind: type[ScriptedModel] = ScriptedModel) -> list[Any]:
    return [kind([5, 6, 7], vocab_size=len(byte_level())) for _ in range(count)]


def held(kind: type[ScriptedModel] = ScriptedModel, count: int = 2) -> list[Any]:
    """Models whose steps wait for `release`."""
    replicas = models(count, kind)
    for model in replicas:
        model.hold()
    return replicas


def release(replicas: list[Any]) -> None:
    for model in replicas:
        model.release()


def engine_of(replicas: list[Any], **settings: Any) -> ReplicatedEngine:
    defaults = {"batch_timeout_ms": 0, "max_sequence_length": None, "kv_cache_tokens": 200_000}
    settings = {**defaults, "enable_speculative_decoding": False, **settings}
    return ReplicatedEngine(replicas, settings.pop("tokenizer", byte_level()), **settings)


def run(
    main: Callable[[ReplicatedEngine], Awaitable[None]], engine: ReplicatedEngine, replicas: list[Any] | None = None
) -> None:
    """Run a test in an engine. Models that are held are released at its end, however it ends."""

    async def body() -> None:
        async with engine:
            try:
                await asyncio.wait_for(main(engine), PATIENCE_S)
            finally:
                release(replicas or [])

    asyncio.run(body())


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds that no awaitable announces."""
    while not condition():  # noqa: ASYNC110 - the router signals no event
        await asyncio.sleep(0.001)


def short(count: int = 3) -> SamplingParams:
    return SamplingParams(max_tokens=count, temperature=0)


def counts(engine: ReplicatedEngine) -> list[int]:
    return [replica["num_requests"] for replica in engine.get_stats()["routing"]]


async def error_of(handle: Awaitable[object]) -> PenstockError | None:
    try:
        await handle
    except PenstockError as error:
        return error
    return None
