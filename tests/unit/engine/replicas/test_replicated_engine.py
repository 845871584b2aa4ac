"""Several replicas with scripted models: routing, the one queue, failures, lifetime and statistics."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import pytest

from penstock import (
    ConfigurationError,
    DeadlineExceeded,
    EngineClosed,
    EngineOverloaded,
    ExecutionError,
    GenerationConfig,
    InferenceEngine,
    OutOfMemory,
    ReplicatedEngine,
    RequestAborted,
    RequestError,
    RequestPriority,
    RequestTooLarge,
    SamplingParams,
    ScriptedModel,
)
from tests.scripted_engine import join_threads
from tests.tokenizers_for_tests import byte_level
from tests.unit.engine.replicas.scripted import (
    DYING,
    LONG,
    PATIENCE_S,
    Large,
    Mortal,
    counts,
    engine_of,
    error_of,
    held,
    models,
    release,
    run,
    short,
    until,
)

# Routing.


def test_requests_that_share_a_prefix_share_a_replica() -> None:
    async def main(engine: ReplicatedEngine) -> None:
        for first in (1, 2):
            for turn in range(4):
                output = await engine.generate([first] * 64 + [turn], short())
                assert output.num_cached_tokens == (64 if turn else 0)
        routing = engine.get_stats()["routing"]
        assert [each["num_requests"] for each in routing] == [4, 4]
        assert [each["expected_hit_tokens"] for each in routing] == [3 * 64] * 2

    run(main, engine_of(models()))


def test_texts_and_chats_are_routed_by_their_tokens() -> None:
    async def main(engine: ReplicatedEngine) -> None:
        text = " ".join(map(str, range(60)))
        for prompt in (text, [{"role": "user", "content": text}]):
            output = await engine.generate(prompt, short())
            assert output.prompt is not None
            assert text in output.prompt
            for again in (prompt, output.prompt_token_ids):
                repeated = await engine.generate(again, short())
                assert repeated.num_cached_tokens == (len(output.prompt_token_ids) - 1) // 16 * 16
                assert repeated.text == output.text
        assert counts(engine) == [3, 3]

    tokenizer = byte_level()
    tokenizer.chat_template = "user: {{ messages[0].content }}"
    run(main, engine_of(models(), tokenizer=tokenizer))


def test_a_burst_without_common_prefix_is_shared_out() -> None:
    async def main(engine: ReplicatedEngine) -> None:
        handles = [engine.generate([number] * 20, short()) for number in range(12)]
        for handle in handles:
            await handle.admitted()
        assert counts(engine) == [4, 4, 4]
        release(replicas)
        await asyncio.gather(*handles)

    replicas = held(count=3)
    run(main, engine_of(replicas), replicas)


def test_a_burst_with_one_prefix_spills_over_once_its_replica_is_busier_by_far() -> None:
    async def main(engine: ReplicatedEngine) -> None:
        handles = [engine.generate([1] * 32 + [number], short()) for number in range(30)]
        for handle in handles:
            await handle.admitted()
        assert min(counts(engine)) >= 8
        release(replicas)
        await asyncio.gather(*handles)

    replicas = held()
    run(main, engine_of(replicas), replicas)


def test_samples_of_a_request_count_for_the_load() -> None:
    async def main(engine: ReplicatedEngine) -> None:
        config = GenerationConfig(num_return_sequences=4, do_sample=True)
        wide = [engine.generate([1], SamplingParams(n=4, max_tokens=2)), engine.generate([2], config)]
        narrow = engine.generate([3], short())
        for handle in (*wide, narrow):
            await handle.admitted()
        assert sorted(replica["load"] for replica in engine.get_stats()["routing"]) == [4, 5]
        release(replicas)
        await asyncio.gather(*wide, narrow)

    replicas = held()
    run(main, engine_of(replicas), replicas)


def test_namespaces_are_kept_apart() -> None:
    async def main(engine: ReplicatedEngine) -> None:
        for namespace in ("a", "b", "a"):
            await engine.generate([1] * 64, short(), namespace=namespace)
        output = await engine.generate([1] * 64, short(), namespace="c")
        assert output.num_cached_tokens == 0

    run(main, engine_of(models()))


def test_a_reset_forgets_prefixes() -> None:
    async def main(engine: ReplicatedEngine) -> None:
        await engine.generate([1] * 64, short())
        engine.reset_prefix_cache()
        assert (await engine.generate([1] * 64, short())).num_cached_tokens == 0
        assert engine.get_stats()["routing"][0]["expected_hit_tokens"] == 0

    run(main, engine_of(models()))


# The one queue.


def num_queued(engine: ReplicatedEngine) -> int:
    return engine.get_stats()["queue"]["num_queued_requests"]


def test_a_request_of_a_higher_class_overtakes_all_that_wait_for_any_replica() -> None:
    order: list[int] = []

    def script(tokens: Sequence[int], index: int) -> int:
        order.append(tokens[0])
        return 5

    async def main(engine: ReplicatedEngine) -> None:
        running = [engine.generate([number] * 4, short(1)) for number in range(4)]
        for handle in running:
            await handle.admitted()  # each replica has one that runs and one that is next
        low = engine.generate([8] * 4, short(1), priority=RequestPriority.LOW)
        high = engine.generate([9] * 4, short(1), priority=RequestPriority.HIGH)
        replicas[0].release()
        await asyncio.gather(low, high)
        release(replicas)
        await asyncio.gather(*running)
        assert order.index(9) < order.index(8)

    replicas = [ScriptedModel(script, vocab_size=len(byte_level())) for _ in range(2)]
    for model in replicas:
        model.hold()
    # However slow the machine is, waiting lifts nobody to a higher class.
    run(main, engine_of(replicas, max_batch_size=1, priority_boost_threshold=1e6), replicas)


def test_deadlines_aborts_and_callbacks_count_while_a_request_waits() -> None:
    async def main(engine: ReplicatedEngine) -> None:
        running = [engine.generate([number] * 4, LONG) for number in range(4)]
        for handle in running:
            await handle.admitted()
        late, first_late = engine.generate([7], LONG, deadline=0.01), engine.generate([7], LONG, ttft_deadline=0.01)
        cancelled = engine.generate([8], LONG)
        assert cancelled.status.value == "queued"
        cancelled.cancel()
        assert isinstance(await error_of(late), DeadlineExceeded)
        assert isinstance(await error_of(first_late), DeadlineExceeded)
        error = await error_of(cancelled)
        assert isinstance(error, RequestAborted)
        assert error.output is not None
        assert error.output.generated_ids == []
        assert engine.get_stats()["queue"]["num_requests"] == 4
        release(replicas)
        for handle in running:
            handle.cancel()
            assert isinstance(await error_of(handle), RequestAborted)

    replicas = held()
    run(main, engine_of(replicas, max_batch_size=1), replicas)


def test_a_full_queue_refuses_or_makes_room_by_class() -> None:
    async def main(engine: ReplicatedEngine) -> None:
        running = [engine.generate([number] * 4, short(1)) for number in range(4)]
        for handle in running:
            await handle.admitted()
        await until(lambda: num_queued(engine) == 2)  # two run, and the others have places in the queue
        waiting = [engine.generate([7], short(1)) for _ in range(2)]
        with pytest.raises(EngineOverloaded, match="Request queue is full"):
            engine.generate([8], short(1))
        high = engine.generate([9], short(1), priority=RequestPriority.HIGH)
        assert isinstance(await error_of(waiting[1]), EngineOverloaded)
        assert engine.get_stats()["totals"]["displaced_requests"] == 1
        release(replicas)
        await asyncio.gather(*running, waiting[0], high)
        stats = engine.get_stats()
        assert stats["queue"]["num_queued_requests"] == 0
        assert stats["refusals"]["EngineOverloaded"] == 1

    replicas = held()
    # Those that have not started count: two in the replicas, and two that wait for one.
    run(main, engine_of(replicas, max_batch_size=1, max_queue_size=4), replicas)


def test_who_waits_for_room_is_let_in_when_a_request_starts_or_the_engine_stops() -> None:
    async def main(engine: ReplicatedEngine) -> None:
        running = [engine.generate([number] * 4, short(1)) for number in range(4)]
        await until(lambda: num_queued(engine) == 2)  # two run, and the others have places in the queue
        waiting = [engine.generate([7], short(1)) for _ in range(2)]
        room = asyncio.ensure_future(engine.wait_for_room([1]))
        await asyncio.sleep(0)
        assert not room.done()
        release(replicas)
        await room
        await asyncio.gather(*running, *waiting)
        for model in replicas:
            model.hold()
        running = [engine.generate([number] * 4, short(1)) for number in range(4)]
        await until(lambda: num_queued(engine) == 2)  # two run, and the others have places in the queue
        waiting = [engine.generate([7], short(1)) for _ in range(2)]
        room = asyncio.ensure_future(engine.wait_for_room([1]))
        await asyncio.sleep(0)
        stop = asyncio.ensure_future(engine.aclose(drain=0))
        assert isinstance(await error_of(room), EngineClosed)
        release(replicas)
        await stop
        await asyncio.gather(*running, *waiting, return_exceptions=True)

    replicas = held()
    run(main, engine_of(replicas, max_batch_size=1, max_queue_size=4), replicas)


def test_an_id_in_use_is_refused() -> None:
    async def main(engine: ReplicatedEngine) -> None:
        handle = engine.generate([1], LONG, request_id="a")
        with pytest.raises(RequestError, match="'a' is already running"):
            engine.generate([1], LONG, request_id="a")
        handle.cancel()

    run(main, engine_of(models()))


def test_what_a_replica_refuses_fails_that_request_alone() -> None:
    async def main(engine: ReplicatedEngine) -> None:
        for prompt in ([1 << 20], "x" * 5000):
            assert isinstance(await error_of(engine.generate(prompt, short())), RequestError)
        assert len((await engine.generate([1], short())).generated_ids) == 3

    run(main, engine_of(models(), max_sequence_length=100))


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded() -> None:
    """It was encoded first, which takes a second per megabyte, and a bound of the bytes tells as much."""
    longest = max(map(len, byte_level().get_vocab()))

    async def main(engine: ReplicatedEngine) -> None:
        content = "a" * 41 * longest
        for prompt in ({"prompt": content}, [{"role": "user", "content": content}]):
            with pytest.raises(RequestTooLarge, match=r"the prompt has at least 4\d tokens and the limit is 40"):
                await engine.generate(prompt, short(1))  # type: ignore[arg-type]
        assert counts(engine) == [0, 0]

    run(main, engine_of(models(), max_sequence_length=40))


def test_a_tokenizer_that_raises_fails_its_request_alone() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = None

    async def main(engine: ReplicatedEngine) -> None:
        messages = [{"role": "user", "content": "hello"}]
        assert "no chat template" in str(await error_of(engine.generate(messages, short())))
        assert isinstance(await error_of(engine.generate("\ud800", short())), RequestError)
        assert len((await engine.generate("a", short())).generated_ids) == 3

    run(main, engine_of(models(), tokenizer=tokenizer))


def test_a_fork_is_refused_by_name() -> None:
    async def main(engine: ReplicatedEngine) -> None:
        handle = engine.generate([1], LONG)
        with pytest.raises(RequestError, match="cannot fork"):
            handle.fork()
        handle.cancel()

    run(main, engine_of(models()))


# Failures.


@DYING
def test_a_replica_that_fails_fails_its_requests_once_and_gets_no_more() -> None:
    async def main(engine: ReplicatedEngine) -> None:
        handles = [engine.generate([number] * 20, LONG) for number in range(4)]
        for handle in handles:
            await anext(handle)
        replicas[0].is_dying = True
        for handle in handles[::2]:
            error = await error_of(handle)
            assert isinstance(error, EngineClosed)
            assert error.output is not None
            assert handle.status.value == "failed"
        survivors = [await engine.generate([number] * 20, short()) for number in range(6)]
        assert [len(output.generated_ids) for output in survivors] == [3] * 6
        for handle in handles[1::2]:
            assert not handle.done()
            handle.cancel()
        stats = engine.get_stats()
        assert stats["engine_status"] == "running"
        assert [each["engine_status"] for each in stats["replicas"]] == ["failed", "running"]
        assert counts(engine) == [2, 8]
        assert await engine.tokenize("a") == byte_level().encode("a")

    replicas = models(kind=Mortal)
    run(main, engine_of(replicas))


@DYING
def test_requests_that_wait_go_to_the_replicas_that_are_left() -> None:
    async def main(engine: ReplicatedEngine) -> None:
        running = [engine.generate([number] * 4, short()) for number in range(4)]
        for handle in running:
            await handle.admitted()
        waiting = [engine.generate([9], short()) for _ in range(4)]
        replicas[0].is_dying = True
        release(replicas)
        outcomes = [await error_of(handle) for handle in running]
        assert [type(error) for error in outcomes] == [EngineClosed, type(None)] * 2
        assert [await error_of(handle) for handle in waiting] == [None] * 4

    replicas = held(Mortal)
    run(main, engine_of(replicas, max_batch_size=1), replicas)


@DYING
def test_without_any_replica_left_everything_is_refused() -> None:
    async def main(engine: ReplicatedEngine) -> None:
        running = [engine.generate([number] * 4, LONG) for number in range(4)]
        for handle in running:
            await handle.admitted()
        waiting = engine.generate([9], LONG)
        for model in replicas:
            model.is_dying = True
            model.release()
        for handle in (*running, waiting):
            assert isinstance(await error_of(handle), EngineClosed)
        with pytest.raises(EngineClosed, match="all replicas have failed"):
            engine.generate([1])
        with pytest.raises(EngineClosed):
            await engine.pause()
        with pytest.raises(EngineClosed):
            await engine.tokenize("a")
        assert engine.get_stats()["engine_status"] == "failed"

    replicas = held(Mortal)
    run(main, engine_of(replicas, max_batch_size=1), replicas)


def test_a_replica_whose_steps_keep_failing_is_not_preferred_for_being_idle() -> None:
    async def main(engine: ReplicatedEngine) -> None:
        busy = engine.generate([1] * 20, LONG)
        await anext(busy)
        number = counts(engine).index(0)  # the idle one
        for _ in range(3):
            replicas[number].fail_next(RuntimeError("broken"))
            assert isinstance(await error_of(engine.generate([2] * 20, short())), ExecutionError)
        assert [await error_of(engine.generate([3] * 20, short())) for _ in range(4)] == [None] * 4
        assert counts(engine)[number] == 3
        busy.cancel()

    replicas = models()
    run(main, engine_of(replicas))


# Lifetime.


def test_a_replica_that_cannot_load_fails_the_start_and_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    engine = ReplicatedEngine([ScriptedModel([1]), Large([1])])
    waiting = engine.generate([1])
    with pytest.raises(OutOfMemory, match="out of memory"):
        engine.start()
    with pytest.raises(EngineClosed, match="the engine failed: out of memory"):
        waiting.result(PATIENCE_S)
    with pytest.raises(EngineClosed, match="the engine failed: out of memory"):
        engine.generate([1])
    assert engine.get_stats()["engine_status"] == "failed"
    engine.stop()
    join_threads(before)


class Loading(ScriptedModel):
    """A model that takes its memory only after `event`, and has begun to once `is_allocating` is set."""

    def __init__(self) -> None:
        super().__init__([5], vocab_size=32)
        self.event, self.is_allocating, self.is_closed = threading.Event(), threading.Event(), False

    def allocate(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        self.is_allocating.set()
        self.event.wait(PATIENCE_S)
        super().allocate(num_blocks, block_size, num_host_blocks)

    def close(self) -> None:
        self.is_closed = True
        super().close()


@pytest.mark.parametrize("count", [1, 2])
def test_a_caller_who_is_cancelled_while_replicas_load_leaves_nothing_behind(count: int) -> None:
    """They were loaded to their end, and served nobody until the engine was closed."""
    before = set(threading.enumerate())
    replicas = [Loading() for _ in range(count)]
    engine = ReplicatedEngine(replicas) if count > 1 else InferenceEngine(replicas[0])

    async def enter() -> None:
        async with engine:
            raise AssertionError("it is not loaded yet")

    async def main() -> None:
        task = asyncio.create_task(enter())
        for replica in replicas:
            await until(replica.is_allocating.is_set)
        task.cancel()
        assert isinstance((await asyncio.gather(task, return_exceptions=True))[0], asyncio.CancelledError)

    asyncio.run(main())
    for replica in replicas:
        replica.event.set()
    join_threads(before)
    assert all(replica.is_closed for replica in replicas)
    with pytest.raises(EngineClosed, match="was stopped"):
        engine.generate([1])
    engine.stop()


def test_an_engine_that_could_not_be_entered_leaves_no_thread() -> None:
    """The thread of the router stayed until the engine was collected."""
    before = set(threading.enumerate())
    engine = ReplicatedEngine([ScriptedModel([1]), Large([1])])

    async def main() -> None:
        with pytest.raises(OutOfMemory):
            await engine.__aenter__()

    asyncio.run(main())
    join_threads(before)
    assert engine.get_stats()["engine_status"] == "failed"


def test_stopping_drains_what_runs_and_what_waits() -> None:
    engine = engine_of(models(), max_batch_size=1)
    handles = [engine.generate([number], short()) for number in range(9)]
    engine.stop()
    assert [len(handle.result(0).generated_ids) for handle in handles] == [3] * 9
    with pytest.raises(EngineClosed, match="was stopped"):
        engine.generate([1])
    assert engine.get_stats()["engine_status"] == "stopped"
    engine.stop()


def test_stopping_at_once_aborts_what_runs_and_what_waits() -> None:
    before = set(threading.enumerate())
    engine = engine_of(models(), max_batch_size=1)
    handles = [engine.generate([number], LONG) for number in range(9)]
    engine.stop(drain=0)
    for handle in handles:
        with pytest.raises(EngineClosed):
            handle.result(0)
    join_threads(before)


def test_stopping_a_paused_engine_waits_for_nothing() -> None:
    engine = engine_of(models())
    engine.start()
    asyncio.run(engine.pause())
    handle = engine.generate([1])
    engine.stop(drain=1e6)
    with pytest.raises(EngineClosed):
        handle.result(0)


def test_an_engine_that_never_started_stops() -> None:
    engine = engine_of(models())
    engine.stop()
    with pytest.raises(EngineClosed, match="was stopped"):
        engine.start()
    with pytest.raises(RequestError, match="drain"):
        engine.stop(-1)


@pytest.mark.parametrize("is_stopped", [False, True])
def test_an_engine_that_never_started_keeps_no_model_alive(is_stopped: bool) -> None:
    """The exit handlers of its replicas did."""
    replicas = models()
    reference, engine = weakref.ref(replicas[0]), engine_of(replicas)
    del replicas
    if is_stopped:
        engine.stop()
    else:
        del engine
    gc.collect()
    assert reference() is None


def test_a_dropped_engine_ends_its_threads() -> None:
    before = set(threading.enumerate())
    engine = engine_of(models())
    engine.start()
    reference = weakref.ref(engine)
    del engine
    gc.collect()
    assert reference() is None
    join_threads(before)


def test_a_callback_may_stop_the_engine() -> None:
    engine = engine_of(models())
    ended = threading.Event()

    def stop(delta: object) -> None:
        engine.stop()
        ended.set()

    engine.generate([1], LONG, callback=stop).detach()
    assert ended.wait(PATIENCE_S)


# Settings and statistics.


def test_wrong_arguments_are_refused_with_what_to_change() -> None:
    scripted = ScriptedModel([1])
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "say how many replicas there are"),
        ({"replicas": 0}, "replicas must be an integer from 1"),
        ({"replicas": True}, "replicas must be an integer from 1"),
        ({"replicas": "two"}, "replicas must be an integer from 1"),
        ({"model": []}, "there are 0 models"),
        ({"model": [scripted, ScriptedModel([1])], "replicas": 3}, "2 models and 3 replicas"),
        ({"devices": ["cpu"], "replicas": 2}, "1 devices and 2 replicas"),
        ({"devices": "cpu", "replicas": 2}, "devices must be a list"),
        ({"devices": [0, 1]}, "devices must be a list"),
        ({"model": scripted, "replicas": 2}, "2 replicas cannot share one ScriptedModel: pass a list"),
        ({"model": [scripted, 3]}, "a model cannot be of type int"),
        ({"model": "./no/such/folder", "replicas": 2}, "there is no model folder"),
        ({"replicas": 2, "routing": "random"}, "routing='random' is unknown: use 'prefix', 'load', 'round_robin'"),
        ({"replicas": 2, "routing": []}, r"routing=\[\] is unknown"),
        ({"replicas": 2, "max_batch_size": 0}, "max_batch_size"),
    ]
    for arguments, message in cases:
        with pytest.raises(ConfigurationError, match=message):
            ReplicatedEngine(**arguments)


@pytest.mark.parametrize("routing", ["load", "round_robin"])
def test_other_rules_of_routing_pay_no_regard_to_prefixes(routing: Any) -> None:
    async def main(engine: ReplicatedEngine) -> None:
        handles = [engine.generate([1] * 64, short()) for _ in range(6)]
        for handle in handles:
            await handle.admitted()
        assert counts(engine) == [3, 3]
        release(replicas)
        await asyncio.gather(*handles)

    replicas = held()
    run(main, engine_of(replicas, routing=routing), replicas)


def test_statistics_are_those_of_all_replicas_and_of_each() -> None:
    async def main(engine: ReplicatedEngine) -> None:
        handles = [engine.generate([number] * 20, short()) for number in range(6)]
        for handle in handles:
            await handle.admitted()
        release(replicas)
        await asyncio.gather(*handles)
        stats = engine.get_stats()
        assert stats["engine_status"] == "running"
        assert [each["totals"]["requests"] for each in stats["replicas"]] == [3, 3]
        assert stats["totals"]["requests"] == 6
        assert stats["totals"]["generated_tokens"] == 18
        assert stats["queue"]["num_finished_length"] == 6
        assert stats["queue"]["num_requests"] == stats["queue"]["num_waiting"] == 0
        cache = stats["cache_info"]
        assert cache["query_tokens"] == 6 * 20
        assert cache["num_blocks"] == 2 * stats["replicas"][0]["cache_info"]["num_blocks"]
        assert 0 <= cache["usage"] <= 1
        assert stats["performance_metrics"]["end_to_end_latency"]["count"] == 6
        assert stats["model"] == "scripted"
        assert stats["max_sequence_length"] == 1000

    replicas = held()
    engine = engine_of(replicas, max_sequence_length=1000)
    assert engine.get_stats()["engine_status"] == "stopped"
    assert engine.get_stats()["routing"] == []
    run(main, engine, replicas)


def test_the_defaults_of_the_model_are_those_of_one_replica() -> None:
    engine = engine_of(models())
    assert engine.default_params().max_tokens == 256
    assert engine.default_params(7).max_tokens == 7
    assert engine.tokenizer is not None
    engine.stop()
