"""A request under vLLM's names: everything so far, only what is new, or the final result."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from penstock.errors import ConfigurationError, RequestAborted
from penstock.facades.async_llm import AsyncEngineArgs, AsyncLLMEngine
from penstock.models.scripted import ScriptedModel
from penstock.outputs import RequestOutput
from penstock.sampling import OutputKind, RequestPriority, SamplingParams


@pytest.fixture
def model() -> ScriptedModel:
    """A model that repeats 5, 6, 7."""
    return ScriptedModel([5, 6, 7], vocab_size=32, max_length=64)


@pytest.fixture
async def engine(model: ScriptedModel) -> AsyncIterator[AsyncLLMEngine]:
    """An engine with that model; a held step is released after the test."""
    made = AsyncLLMEngine.from_engine_args(AsyncEngineArgs(model, skip_tokenizer_init=True))
    yield made
    model.release()
    await asyncio.to_thread(made.shutdown)


async def outputs_of(engine: AsyncLLMEngine, kind: OutputKind, **params: Any) -> list[RequestOutput]:
    """Every output of a stream of three tokens, as it was when yielded."""
    params = {"max_tokens": 3, "output_kind": kind} | params
    return [output async for output in engine.generate([1, 2], SamplingParams(**params))]


@pytest.mark.parametrize("logprobs", [None, 0])
async def test_an_output_holds_everything_so_far_and_is_not_changed_by_later_ones(
    engine: AsyncLLMEngine, logprobs: int | None
) -> None:
    outputs = await outputs_of(engine, OutputKind.CUMULATIVE, logprobs=logprobs)
    lengths = [len(output.outputs[0].token_ids) for output in outputs]
    assert lengths == sorted(lengths)
    assert lengths[-1] == 3
    for output, length in zip(outputs, lengths, strict=True):
        (text,) = output.outputs
        assert text.token_ids == [5, 6, 7][:length]
        assert len(text.token_logprobs) == length
        assert len(text.logprobs or ()) == (length if logprobs is not None else 0)
        assert output.finished is (length == 3)


async def test_the_end_of_an_aborted_request_holds_what_came_before() -> None:
    """The last delta has no tokens."""

    def stall(tokens: Sequence[int], index: int) -> int:
        if len(tokens) == 3:
            model.hold()  # the step after this one
        return 5

    model = ScriptedModel(stall, vocab_size=32, max_length=64)
    engine = AsyncLLMEngine.from_engine_args(AsyncEngineArgs(model, skip_tokenizer_init=True))
    stream, outputs = engine.generate([1, 2], SamplingParams(max_tokens=9, logprobs=0), "a"), list[RequestOutput]()
    with contextlib.suppress(RequestAborted):
        async for output in stream:
            outputs.append(output)
            if len(output.outputs[0].token_ids) == 2:
                await engine.abort("a")
    model.release()
    await asyncio.to_thread(engine.shutdown)
    (last,) = outputs[-1].outputs
    assert (last.token_ids, last.finish_reason, len(last.logprobs or ())) == ([5, 5], "abort", 2)


async def test_new_text_comes_once(engine: AsyncLLMEngine) -> None:
    outputs = await outputs_of(engine, OutputKind.DELTA)
    assert [token for output in outputs for token in output.outputs[0].token_ids] == [5, 6, 7]
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]


async def test_the_end_comes_alone(engine: AsyncLLMEngine) -> None:
    (output,) = await outputs_of(engine, OutputKind.FINAL_ONLY)
    assert (output.outputs[0].token_ids, output.finished) == ([5, 6, 7], True)


@pytest.mark.parametrize("several", [False, True])
async def test_requests_are_aborted_by_their_ids(engine: AsyncLLMEngine, model: ScriptedModel, several: bool) -> None:
    model.hold()
    streams = [engine.generate([1], SamplingParams(max_tokens=9), name) for name in ("a", "b")]
    if several:
        await engine.abort(["a", "unknown", "b"])
    else:
        await engine.abort("a")
        await engine.abort("b")
    for stream in streams:
        with pytest.raises(RequestAborted):
            await asyncio.wait_for(stream, 60)


def test_a_server_runs_as_many_requests_as_vllm_does_unless_told_otherwise() -> None:
    assert AsyncEngineArgs().config.max_batch_size == 256
    assert AsyncEngineArgs(max_num_seqs=3).config.max_batch_size == 3
    assert AsyncEngineArgs().config.max_sequence_length is None


@pytest.mark.parametrize(
    ("number", "priority"),
    [(-9, "CRITICAL"), (-2, "CRITICAL"), (-1, "HIGH"), (0, "NORMAL"), (1, "LOW"), (7, "LOW")],
)
async def test_lower_numbers_are_served_first(engine: AsyncLLMEngine, number: int, priority: str) -> None:
    given: list[RequestPriority] = []
    generate = engine.engine.generate

    def spy(*args: Any, **options: Any) -> Any:
        given.append(options["priority"])
        return generate(*args, **options)

    engine.engine.generate = spy  # type: ignore[method-assign]
    await engine.generate([1], SamplingParams(max_tokens=1), priority=number)
    assert given == [RequestPriority[priority]]


def test_arguments_of_another_type_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="engine_args must be AsyncEngineArgs, got"):
        AsyncLLMEngine.from_engine_args({"model": None})  # type: ignore[arg-type]
