"""Updates, pauses and sleep of an engine with a scripted model: who gets which weights, and which order may come when.

The reports that training programs made elsewhere have their number from the list in the names: T4 to T9 and T15.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from penstock import (
    LLM,
    CompletionOutput,
    DeadlineExceeded,
    EngineClosed,
    EngineStateError,
    InferenceEngine,
    RequestAborted,
    RequestError,
    RequestHandle,
    RequestOutput,
    SamplingParams,
    ScriptedModel,
    Trainable,
    WeightsError,
)
from penstock.api.weights import SleepLevel, WeightSource
from penstock.errors import PenstockError
from penstock.step import StepPlan, StepResult

PROMPT = list(range(2, 66))  # four blocks
SCRIPT = [*range(100, 200)]
LONG = 100_000  # tokens: more than are generated before whatever a test waits for


class Model(ScriptedModel):
    """Records its plans, and fails where a step runs while the weights are being written."""

    def __init__(self, **options: Any) -> None:
        super().__init__(SCRIPT, **options)
        self.rows: list[tuple[int, int]] = []  # (version, first position) of every row
        self.is_writing = False
        self.unloaded: list[SleepLevel] = []
        self.num_reloads = 0
        self.num_allocations = 0

    def execute(self, plan: StepPlan, *masks: Any) -> StepResult:
        assert not self.is_writing
        self.rows += [(self.weight_version, row.start) for row in plan.rows]
        return super().execute(plan, *masks)

    def allocate(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        self.num_allocations += 1

    def unload(self, level: SleepLevel) -> None:
        self.unloaded.append(level)

    def reload(self) -> None:
        self.num_reloads += 1


def engine_of(model: ScriptedModel | None = None, **settings: Any) -> InferenceEngine:
    options = {
        "batch_timeout_ms": 0,
        "max_sequence_length": 2 * LONG,
        "skip_tokenizer_init": True,
        "enable_speculative_decoding": False,
    }
    return InferenceEngine(Model() if model is None else model, **{**options, **settings})


def params(max_tokens: int = LONG, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **fields)


async def outcome(handle: Awaitable[Any]) -> Any:
    """The error that awaiting raises; AssertionError if it raises none."""
    with pytest.raises(PenstockError) as caught:
        await handle
    return caught.value


async def read_until(handle: RequestHandle, version: int) -> None:
    """Read until a token has this version."""
    async for delta in handle:
        assert len(delta.weight_versions) == len(delta.token_ids) == len(delta.token_logprobs)
        if version in delta.weight_versions:
            return
    raise AssertionError(f"no token of version {version}")


def check_record(completion: CompletionOutput) -> None:
    """As many versions and logprobs as ids, and the ids of the script."""
    count = len(completion.token_ids)
    assert completion.token_ids == [SCRIPT[i % len(SCRIPT)] for i in range(count)]
    lists = completion.token_logprobs, completion.sampled_logprobs, completion.weight_versions
    assert [len(values) for values in lists] == [count] * 3


async def aborted(handle: RequestHandle) -> RequestOutput:
    """The partial output of a request that an update ended."""
    error = await outcome(handle)
    assert isinstance(error, RequestAborted)
    assert "to go on" in str(error)
    assert error.output is not None
    return error.output


# Versions.


async def test_t4_no_prefix_hit_crosses_weight_versions() -> None:
    async with engine_of() as engine:
        hits = []
        for update in (False, False, True, False, True):
            if update:
                await engine.update_weights()
            hits.append((await engine.generate(PROMPT, params(1))).num_cached_tokens)
        assert hits == [0, 63, 0, 63, 0]
        assert engine.weight_version == engine.get_stats()["weight_version"] == 2


@pytest.mark.parametrize("stale_kv", [False, True])
async def test_t4_no_prefix_hit_crosses_weight_versions_while_requests_go_on(stale_kv: bool) -> None:
    """Neither what was computed before the update, nor what its owner computes after it on top of that."""
    async with engine_of() as engine:
        running = engine.generate(PROMPT, params())
        await anext(running)
        await engine.update_weights(mode="keep", stale_kv=stale_kv)
        await read_until(running, 1)
        hit = (await engine.generate(PROMPT, params(1))).num_cached_tokens
        assert hit == (0 if stale_kv else 64 - 1)
        running.cancel()


async def test_t5_a_cache_reset_is_never_a_no_op_while_requests_run() -> None:
    async with engine_of() as engine:
        running = engine.generate(PROMPT, params())
        await anext(running)
        assert (await engine.generate(PROMPT, params(1))).num_cached_tokens == 63
        engine.reset_prefix_cache()
        assert (await engine.generate(PROMPT, params(1))).num_cached_tokens == 0
        engine.reset_prefix_cache()
        num_tokens = 0
        while num_tokens < 200:
            num_tokens += len((await anext(running)).token_ids)
        text = PROMPT + [SCRIPT[i % len(SCRIPT)] for i in range(200)]
        assert (await engine.generate(text, params(1))).num_cached_tokens == 0
        running.cancel()


async def test_t6_waiting_never_lets_a_rollout_span_an_update() -> None:
    """Of a group of three samples one has not started, and the request after it neither."""
    model = Held()
    async with engine_of(model, max_batch_size=2) as engine:
        group = engine.generate(PROMPT, SamplingParams(n=3, max_tokens=40, ignore_eos=True, seed=1))
        await anext(group)  # now two of its samples have taken all rows
        later = engine.generate(PROMPT, params(5))
        update = asyncio.ensure_future(engine.update_weights(mode="wait"))
        await asyncio.sleep(0)  # it is on its way to the engine's loop
        model.may_go_on.set()
        assert await update == 1
        versions = [out.weight_versions for out in (await group).outputs]
        assert versions == [[0] * 40] * 3
        assert (await later).outputs[0].weight_versions == [1] * 5
        assert engine.get_stats()["queue"]["num_preemptions"] == 0


async def test_t6_requests_that_come_while_an_update_waits_get_the_new_weights() -> None:
    async with engine_of() as engine:
        started = engine.generate(PROMPT, params(200))
        await anext(started)
        update = asyncio.ensure_future(engine.update_weights(mode="wait"))
        await asyncio.sleep(0)
        later = [engine.generate(PROMPT, params(5)) for _ in range(3)]
        assert await update == 1
        assert set((await started).outputs[0].weight_versions) == {0}
        for handle in later:  # which may have started before the order arrived
            assert (await handle).outputs[0].weight_versions in ([0] * 5, [1] * 5)
        assert (await engine.generate(PROMPT, params(5))).outputs[0].weight_versions == [1] * 5


async def test_t7_a_token_has_the_version_of_the_step_that_made_it() -> None:
    model = Model()
    async with engine_of(model) as engine:
        handle = engine.generate(PROMPT, params())
        for version in range(3):
            await read_until(handle, version)
            await engine.update_weights(mode="keep")
        await read_until(handle, 3)
        handle.cancel()
        error = await outcome(handle)
    completion = error.output.outputs[0]
    check_record(completion)
    assert completion.weight_versions == sorted(completion.weight_versions)
    assert set(completion.weight_versions) == {0, 1, 2, 3}
    assert not completion.stale_kv
    # The K/V of a version are computed from the first position.
    assert next(start for version, start in model.rows if version == 1) == 0


async def test_t8_ended_requests_go_on_only_when_they_are_submitted_again() -> None:
    model = Held()  # so that the output is short, and its prompt is one row
    async with engine_of(model) as engine:
        handle = engine.generate(PROMPT, params())
        await anext(handle)
        update = asyncio.ensure_future(engine.update_weights())
        await asyncio.sleep(0)  # it is on its way to the engine's loop
        model.may_go_on.set()
        await update
        output = await aborted(handle)
        num_rows = len(model.rows)
        assert engine.get_stats()["queue"]["num_requests"] == 0
        rest = await engine.generate(output.output_ids[0], params(3))
        assert rest.outputs[0].weight_versions == [1] * 3
        assert len(model.rows) == num_rows + 3
        assert {version for version, _ in model.rows[num_rows:]} == {1}


async def test_t9_an_update_loses_no_token_and_no_logprob_of_any_request() -> None:
    async with engine_of(max_batch_size=1) as engine:
        running = engine.generate(PROMPT, params())
        queued = [engine.generate(PROMPT, params()) for _ in range(3)]
        await anext(running)
        async with engine.updating():
            arriving = engine.generate(PROMPT, params(5))
        output = await aborted(running)
        check_record(output.outputs[0])
        assert output.outputs[0].token_ids
        assert output.outputs[0].finish_reason == "abort"
        for handle in queued:
            output = await aborted(handle)
            check_record(output.outputs[0])
            assert output.outputs[0].token_ids == []
        assert (await arriving).outputs[0].weight_versions == [1] * 5


async def test_t9_a_request_whose_text_is_being_encoded_has_a_partial_output_too() -> None:
    """It had none."""
    begun, may_end = threading.Event(), threading.Event()

    class Tokenizer:
        def __len__(self) -> int:
            return 200

        def __deepcopy__(self, memo: object) -> Tokenizer:
            return self

        def encode(self, text: str, **options: Any) -> list[int]:
            begun.set()
            may_end.wait(60)
            return [1]

        def decode(self, ids: list[int], **options: Any) -> str:
            return "".join(f"<{i}>" for i in ids)

    engine = InferenceEngine(Model(), Tokenizer(), batch_timeout_ms=0)
    async with engine:
        handle = engine.generate("word " * 10_000, params())
        await asyncio.to_thread(begun.wait, 60)
        await engine.update_weights()
        output = await aborted(handle)
        check_record(output.outputs[0])
        may_end.set()


async def test_beams_have_the_version_of_each_step() -> None:
    async with engine_of() as engine:
        search = engine.generate(PROMPT, SamplingParams(use_beam_search=True, best_of=2, temperature=0, max_tokens=200))
        beside = engine.generate(PROMPT, params())
        await anext(beside)
        await engine.update_weights(mode="keep")
        versions = (await search).outputs[0].weight_versions
        assert versions == sorted(versions)
        assert len(versions) == 200
        beside.cancel()


# Going on.


async def test_stale_requests_go_on_without_computing_anything_again_and_say_so() -> None:
    model = Model()
    async with engine_of(model) as engine:
        handle, fresh = engine.generate(PROMPT, params(300)), None
        await anext(handle)
        async with engine.updating("keep", stale_kv=True):
            fresh = engine.generate(PROMPT, params(3))
        output = await handle
        assert output.outputs[0].stale_kv == (1 in output.outputs[0].weight_versions)
        assert not (await fresh).outputs[0].stale_kv
        starts = [start for version, start in model.rows if version == 1]
        assert starts.count(0) == 1, "the fresh request's"
        assert engine.get_stats()["queue"]["num_preemptions"] == 0


class Held(Model):
    """Holds the third step until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.may_go_on = threading.Event(), threading.Event()

    def execute(self, plan: StepPlan, *masks: Any) -> StepResult:
        if self.plans == 2:
            self.begun.set()
            self.may_go_on.wait(60)
        return super().execute(plan, *masks)


@pytest.mark.parametrize("stale_kv", [False, True])
async def test_a_score_belongs_to_one_version_of_the_weights(stale_kv: bool) -> None:
    """With `stale_kv`, the parts from before an update were joined to those after it."""
    model, completion = Held(), [3 + i % 90 for i in range(4000)]  # of 250 steps
    async with engine_of(model, max_num_batched_tokens=16) as engine:
        score = asyncio.ensure_future(engine.score([2], completion))
        await asyncio.to_thread(model.begun.wait, 60)
        update = asyncio.ensure_future(engine.update_weights(mode="keep", stale_kv=stale_kv))
        await asyncio.sleep(0)
        model.may_go_on.set()
        await update
        (result,) = await score
    assert next(start for version, start in model.rows if version == 1) == 0, "it is computed from the beginning"
    assert (len(result), result.weight_version) == (4000, 1)


async def test_paused_requests_go_on_with_the_kv_that_they_have() -> None:
    model = Model()
    async with engine_of(model) as engine:
        handle = engine.generate(PROMPT, params())
        await anext(handle)
        await engine.pause("keep")
        num_rows = len(model.rows)
        waiting = engine.generate(PROMPT, params(2))
        await asyncio.to_thread(engine.optimize_memory)  # the engine's loop and the model's thread have had a turn
        assert len(model.rows) == num_rows
        assert engine.get_stats()["engine_status"] == "paused"
        await engine.resume()
        await anext(handle)
        assert len((await waiting).generated_ids) == 2
        assert engine.get_stats()["engine_status"] == "running"
        assert engine.get_stats()["queue"]["num_preemptions"] == 0
        handle.cancel()


async def test_an_update_in_a_pause_recomputes_what_goes_on() -> None:
    model = Model()
    async with engine_of(model) as engine:
        handle = engine.generate(PROMPT, params())
        await anext(handle)
        await engine.pause("keep")
        assert await engine.update_weights(mode="keep") == 1
        assert engine.get_stats()["engine_status"] == "paused"
        await engine.resume()
        await read_until(handle, 1)
        assert next(start for version, start in model.rows if version == 1) == 0
        handle.cancel()


@pytest.mark.parametrize(
    ("level", "num_reloads", "num_allocations"),
    [("cache", 0, 2), ("weights", 1, 1), ("all", 1, 2), ("discard", 1, 2)],
)
async def test_sleep_frees_what_its_level_says_and_wake_takes_it_back(
    level: SleepLevel, num_reloads: int, num_allocations: int
) -> None:
    model = Model()
    async with engine_of(model) as engine:
        handle = engine.generate(PROMPT, params())
        await anext(handle)
        await engine.sleep(level, mode="keep")
        assert engine.get_stats()["engine_status"] == "asleep"
        assert model.unloaded == [level]
        assert (model.num_reloads, model.num_allocations) == (0, 1)
        assert await engine.update_weights(mode="keep") == 1
        await engine.wake()
        assert (model.num_reloads, model.num_allocations) == (num_reloads, num_allocations)
        await read_until(handle, 1)
        assert next(start for version, start in model.rows if version == 1) == 0
        handle.cancel()


async def test_an_engine_that_slept_in_a_pause_wakes_into_it() -> None:
    async with engine_of() as engine:
        await engine.pause()
        await engine.sleep()
        await engine.wake()
        assert engine.get_stats()["engine_status"] == "paused"
        await engine.resume()
        assert len((await engine.generate(PROMPT, params(2))).generated_ids) == 2


async def test_requests_of_a_paused_engine_pass_their_deadlines_and_can_be_cancelled() -> None:
    async with engine_of() as engine:
        await engine.pause()
        late, cancelled = engine.generate(PROMPT, params(), deadline=0.01), engine.generate(PROMPT, params())
        assert isinstance(await outcome(late), DeadlineExceeded)
        cancelled.cancel()
        assert isinstance(await outcome(cancelled), RequestAborted)


# Orders.


async def ignore(engine: InferenceEngine) -> None:
    """Running."""


STATES: dict[str, Callable[[InferenceEngine], Awaitable[Any]]] = {
    "running": ignore,
    "paused": lambda engine: engine.pause(),
    "asleep": lambda engine: engine.sleep(),
    "updating": lambda engine: engine.updating().__aenter__(),
}
ORDERS: dict[str, Callable[[InferenceEngine], Awaitable[Any]]] = {
    "update": lambda engine: engine.update_weights(),
    "pause": lambda engine: engine.pause(),
    "resume": lambda engine: engine.resume(),
    "sleep": lambda engine: engine.sleep(),
    "wake": lambda engine: engine.wake(),
    "block": lambda engine: engine.updating().__aenter__(),
}
LEGAL = {
    "running": {"update", "pause", "sleep", "block"},
    "paused": {"update", "resume", "sleep", "block"},
    "asleep": {"update", "wake", "block"},
    "updating": set(),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("order", ORDERS)
async def test_t15_every_order_that_does_not_fit_the_state_raises(state: str, order: str) -> None:
    """A weight sync of a sleeping engine was skipped without a word."""
    async with engine_of() as engine:
        await STATES[state](engine)
        version = engine.weight_version
        if order in LEGAL[state]:
            await ORDERS[order](engine)
            assert engine.weight_version == version + (order == "update")
        else:
            error = await outcome(ORDERS[order](engine))
            assert isinstance(error, EngineStateError)
            assert f"the engine is {state}" in str(error)
            assert engine.weight_version == version


@pytest.mark.parametrize("state", ["paused", "asleep"])
async def test_t15_requests_that_stand_still_cannot_be_waited_for(state: str) -> None:
    async with engine_of() as engine:
        handle = engine.generate(PROMPT, params())
        await anext(handle)
        await (engine.pause("keep") if state == "paused" else engine.sleep(mode="keep"))
        assert isinstance(await outcome(engine.update_weights(mode="wait")), EngineStateError)
        assert engine.get_stats()["engine_status"] == state
        await (engine.resume() if state == "paused" else engine.wake())
        await anext(handle)
        handle.cancel()


async def test_a_block_that_was_not_entered_ends_no_update() -> None:
    """It updated the weights, and ended the block of whoever was updating them."""
    async with InferenceEngine(Model()) as engine:
        block = engine.updating()
        with pytest.raises(EngineStateError, match="has not begun, or has ended"):
            await block.__aexit__(None, None, None)
        async with block:
            with pytest.raises(EngineStateError, match="has not begun"):
                await engine.updating().__aexit__(None, None, None)
        with pytest.raises(EngineStateError, match="has not begun"):
            await block.__aexit__(None, None, None)
        assert engine.weight_version == 1
        async with block:
            pass
        assert engine.weight_version == 2


async def test_a_stopped_engine_keeps_its_weight_version() -> None:
    engine = InferenceEngine(Model())
    async with engine, engine.updating():
        pass
    assert engine.weight_version == engine.get_stats()["weight_version"] == 1
    assert InferenceEngine(Model()).weight_version == 0


async def test_of_two_updates_at_once_one_is_refused_and_the_other_succeeds() -> None:
    async with engine_of() as engine:
        results = await asyncio.gather(*(engine.update_weights() for _ in range(8)), return_exceptions=True)
        succeeded = [result for result in results if isinstance(result, int)]
        assert succeeded == list(range(1, len(succeeded) + 1))
        assert all(isinstance(result, EngineStateError) for result in results if not isinstance(result, int))
        async with engine.updating():
            assert isinstance(await outcome(engine.update_weights()), EngineStateError)
        assert engine.weight_version == len(succeeded) + 1


@pytest.mark.parametrize("arguments", [{"mode": "now"}, {"mode": "wait", "stale_kv": True}, {"stale_kv": True}])
async def test_arguments_that_say_nothing_are_refused(arguments: dict[str, Any]) -> None:
    async with engine_of() as engine:
        assert isinstance(await outcome(engine.update_weights(**arguments)), RequestError)
        with pytest.raises(RequestError):
            engine.updating(**arguments)
        assert isinstance(await outcome(engine.sleep("deep")), RequestError)  # type: ignore[arg-type]


async def test_an_update_that_is_cancelled_while_it_waits_leaves_no_trace() -> None:
    async with engine_of() as engine:
        running = engine.generate(PROMPT, params())
        await anext(running)
        for order in (engine.update_weights(mode="wait"), engine.pause("wait"), engine.sleep(mode="wait")):
            task = asyncio.ensure_future(order)
            await asyncio.sleep(0)  # it begins before the next order,
            assert isinstance(await outcome(engine.pause()), EngineStateError)  # which finds it being carried out
            while engine.get_stats()["queue"]["num_requests"] < 2:
                held = engine.generate(PROMPT, params(3))
                await anext(running)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await held).outputs[0].weight_versions == [0] * 3
        running.cancel()
        assert await engine.update_weights() == 1


@pytest.mark.parametrize("num_turns", range(8))
async def test_a_block_whose_caller_leaves_while_it_begins_does_not_keep_the_engine(num_turns: int) -> None:
    async with engine_of() as engine:
        block = engine.updating()
        task = asyncio.ensure_future(block.__aenter__())
        for _ in range(num_turns):
            await asyncio.to_thread(int)
        has_begun = not task.cancel()
        await asyncio.wait([task])
        if has_begun:
            await block.__aexit__(None, None, None)
        assert len((await engine.generate(PROMPT, params(2))).generated_ids) == 2
        with engine.reading_weights():  # no update is open: the engine undid it before it ran the request
            pass


@pytest.mark.parametrize("kind", [ValueError, asyncio.CancelledError, KeyboardInterrupt])
async def test_a_block_that_is_left_by_an_exception_counts_as_an_update(kind: type[BaseException]) -> None:
    """Nobody but its owner knows how far the optimizer came."""
    async with engine_of() as engine:
        running = engine.generate(PROMPT, params())
        await anext(running)
        with pytest.raises(kind):
            async with engine.updating("keep"):
                raise kind("in the block")
        await read_until(running, 1)
        running.cancel()


async def test_a_block_whose_task_is_cancelled_lets_the_engine_go_on() -> None:
    inside = asyncio.Event()

    async def train(engine: InferenceEngine) -> None:
        async with engine.updating("keep"):
            inside.set()
            await asyncio.Event().wait()

    async with engine_of() as engine:
        task = asyncio.ensure_future(train(engine))
        await inside.wait()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert (await engine.generate(PROMPT, params(2))).outputs[0].weight_versions == [1] * 2


async def test_no_step_runs_while_weights_are_written() -> None:
    model = Model()
    async with engine_of(model) as engine:
        handle = engine.generate(PROMPT, params())
        for _ in range(20):
            await anext(handle)
            async with engine.updating("keep", stale_kv=True):
                model.is_writing = True
                await asyncio.to_thread(engine.optimize_memory)
                model.is_writing = False
        handle.cancel()
        assert (await outcome(handle)).output.outputs[0].finish_reason == "abort"


# Failures.


async def test_a_refused_source_disturbs_nobody() -> None:
    class Picky(Model):
        def read_weights(self, source: WeightSource) -> WeightSource:
            raise WeightsError("no such name")

    async with engine_of(Picky()) as engine:
        handle = engine.generate(PROMPT, params(300))
        await anext(handle)
        assert isinstance(await outcome(engine.update_weights({})), WeightsError)
        assert isinstance(await outcome(engine.updating().__aenter__()), WeightsError)
        assert (await handle).outputs[0].weight_versions == [0] * 300


async def test_an_update_that_writes_nothing_leaves_the_old_weights() -> None:
    model = Model()
    async with engine_of(model) as engine:
        model.fail_next(WeightsError("the first tensor does not fit"))
        assert isinstance(await outcome(engine.update_weights({})), WeightsError)
        assert (await engine.generate(PROMPT, params(2))).outputs[0].weight_versions == [0, 0]
        assert await engine.update_weights({}) == 1


@pytest.mark.parametrize("error", [WeightsError("half way", is_mixed=True), MemoryError("packing")])
async def test_an_update_that_fails_half_way_closes_the_engine_to_requests(error: Exception) -> None:
    class Failing(Model):
        def update_weights(self, source: WeightSource) -> None:
            raise error

    async with engine_of(Failing(), max_batch_size=1) as engine:
        handles = [engine.generate(PROMPT, params()) for _ in range(2)]
        await anext(handles[0])
        raised = await outcome(engine.update_weights({}, mode="keep"))
        assert isinstance(raised, WeightsError)
        assert raised.is_mixed
        for handle in (*handles, engine.generate(PROMPT, params(2))):
            assert isinstance(await outcome(handle), EngineClosed)
        assert isinstance(await outcome(engine.update_weights()), EngineStateError)
        with pytest.raises(EngineStateError, match="failed half way"), engine.reading_weights():
            pass
        assert engine.get_stats()["engine_status"] == "failed"


# Threads, loops, and the end of the engine.


async def test_updates_come_from_any_thread_and_loop() -> None:
    async with engine_of() as engine:
        handle = engine.generate(PROMPT, params())
        await anext(handle)

        async def train() -> None:
            async with engine.updating("keep"):
                pass

        await asyncio.to_thread(lambda: asyncio.run(train()))
        await read_until(handle, 1)
        handle.cancel()


async def test_a_stopped_engine_ends_what_waits_at_its_gate() -> None:
    engine = engine_of()
    async with engine:
        await engine.pause()
        handle = engine.generate(PROMPT, params())
        await asyncio.to_thread(engine.stop, 600.0)
        assert isinstance(await outcome(handle), RequestAborted | EngineClosed)
        assert isinstance(await outcome(engine.resume()), EngineClosed)


async def test_an_engine_that_is_closed_during_an_update_says_so() -> None:
    async with engine_of() as engine:
        with pytest.raises(EngineClosed):
            async with engine.updating():
                await asyncio.to_thread(engine.stop, 0.0)


async def test_an_error_of_the_block_is_more_important_than_the_end_of_the_engine() -> None:
    async with engine_of() as engine:
        with pytest.raises(KeyError) as caught:  # noqa: PT012
            async with engine.updating():
                await asyncio.to_thread(engine.stop, 0.0)
                raise KeyError("in the block")
        assert "the engine was stopped" in caught.value.__notes__[0]


async def test_an_update_that_waits_is_told_when_the_engine_ends() -> None:
    async with engine_of() as engine:
        handle = engine.generate(PROMPT, params())
        await anext(handle)
        update = asyncio.ensure_future(engine.update_weights(mode="wait"))
        await anext(handle)
        await asyncio.to_thread(engine.stop, 0.0)
        assert isinstance(await outcome(update), EngineClosed | EngineStateError)
        assert isinstance(await outcome(handle), RequestAborted | EngineClosed)


def test_an_llm_is_updated_without_a_coroutine() -> None:
    model = Model()
    llm = LLM(model, skip_tokenizer_init=True)
    with llm.updating():
        pass
    assert llm.update_weights({"a": 1}, mode="wait") == llm.weight_version == 2
    llm.pause()
    llm.resume()
    llm.sleep("cache")
    llm.wake()
    with pytest.raises(EngineStateError):
        llm.resume()
    with pytest.raises(ZeroDivisionError), llm.updating():
        1 / 0  # noqa: B018
    assert llm.generate(PROMPT, params(2))[0].outputs[0].weight_versions == [3, 3]
    assert model.updates == [None, {"a": 1}, None]
    llm.stop()


def test_a_blocking_call_inside_of_its_caller_s_update_is_refused() -> None:
    """`with llm.updating(): llm.generate(...)` waited for ever, for the end of its own block."""
    llm, other = LLM(Model(), skip_tokenizer_init=True), LLM(Model(), skip_tokenizer_init=True)
    with llm.updating(), other.updating():
        pass
    with llm.updating():
        calls: list[Callable[[], object]] = [lambda: llm.generate(PROMPT), lambda: llm.score([1], [2])]
        for call in (*calls, lambda: llm.embed(PROMPT)):
            with pytest.raises(EngineStateError, match="after the block"):
                call()
        assert other.generate(PROMPT, params(2))[0].outputs[0].weight_versions == [1, 1]
        waiting = llm.engine.generate(PROMPT, params(2))
    assert waiting.result().outputs[0].weight_versions == [2, 2]
    assert llm.generate(PROMPT, params(2))[0].outputs[0].weight_versions == [2, 2]
    llm.stop()
    other.stop()


def test_the_engine_is_trainable() -> None:
    engine: Trainable = engine_of()
    assert isinstance(engine, Trainable)
    assert engine.weight_version == 0
