"""Weight updates, pauses and sleep of several replicas: all of them or none."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import trio

from penstock import (
    EngineClosed,
    EngineStateError,
    OutOfMemory,
    ReplicatedEngine,
    RequestAborted,
    RequestError,
    ScriptedModel,
    WeightsError,
)
from penstock.api.weights import SleepLevel, WeightSource
from tests.unit.engine.replicas.scripted import (
    DYING,
    LONG,
    Mortal,
    counts,
    engine_of,
    error_of,
    held,
    models,
    release,
    run,
    short,
)


class Refusing(ScriptedModel):
    """A model that refuses any weights, and has no memory to wake up while `is_poor`."""

    is_poor = False

    def read_weights(self, source: WeightSource) -> WeightSource:
        raise WeightsError("not these")

    def unload(self, level: SleepLevel) -> None:
        if self.is_poor:
            raise WeightsError("not now")

    def allocate(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        if self.is_poor:
            raise OutOfMemory("no memory")


async def versions(engine: ReplicatedEngine) -> set[int]:
    outputs = await asyncio.gather(*(engine.generate([number] * 20, short()) for number in range(4)))
    return {version for output in outputs for version in output.outputs[0].weight_versions}


def test_all_replicas_get_the_weights_of_an_iterator() -> None:
    async def main(engine: ReplicatedEngine) -> None:
        source = iter([("a", 1), ("b", 2)])
        assert await engine.update_weights(source) == 1
        assert [model.updates for model in replicas] == [[[("a", 1), ("b", 2)]]] * 2
        assert await versions(engine) == {1}
        assert engine.weight_version == 1
        assert [each["weight_version"] for each in engine.get_stats()["replicas"]] == [1, 1]

    replicas = models()
    run(main, engine_of(replicas))


def test_an_iterator_that_raises_changes_nothing() -> None:
    def source() -> Iterator[tuple[str, object]]:
        yield "a", 1
        raise LookupError("lost")

    async def main(engine: ReplicatedEngine) -> None:
        running = engine.generate([1], LONG)
        await anext(running)
        error = await error_of(engine.update_weights(source()))
        assert isinstance(error, WeightsError)
        assert not error.is_mixed
        assert "LookupError: lost; nothing was written" in str(error)
        assert not running.done()
        running.cancel()
        assert await versions(engine) == {0}

    run(main, engine_of(models()))


def test_weights_that_one_replica_refuses_reach_none() -> None:
    async def main(engine: ReplicatedEngine) -> None:
        running = engine.generate([1], LONG)
        await anext(running)
        for mode in ("wait", "keep", "abort"):
            error = await error_of(engine.update_weights({}, mode=mode))
            assert isinstance(error, WeightsError)
            assert not error.is_mixed
            if mode == "wait":  # this one still waited for the request
                assert not running.done()
                running.cancel()
        assert await versions(engine) == {0}

    run(main, engine_of([ScriptedModel([5], vocab_size=32), Refusing([5], vocab_size=32)], tokenizer=None))


def test_weights_that_all_replicas_fail_to_write_leave_the_old_ones() -> None:
    async def main(engine: ReplicatedEngine) -> None:
        for model in replicas:
            model.fail_next(WeightsError("no"))
        error = await error_of(engine.update_weights({}))
        assert isinstance(error, WeightsError)
        assert not error.is_mixed
        assert await versions(engine) == {0}
        assert await engine.update_weights({}) == 1

    replicas = models()
    run(main, engine_of(replicas))


@pytest.mark.parametrize("fault", [WeightsError("no"), WeightsError("half", is_mixed=True), RuntimeError("bug")])
def test_weights_that_one_replica_fails_to_write_close_the_engine(fault: Exception) -> None:
    async def main(engine: ReplicatedEngine) -> None:
        running = [engine.generate([number] * 20, LONG) for number in range(2)]
        for handle in running:
            await anext(handle)
        await engine.pause("keep")
        replicas[1].fail_next(fault)
        waiting = engine.generate([3], short())
        error = await error_of(engine.update_weights({}, mode="keep"))
        assert isinstance(error, WeightsError)
        assert error.is_mixed
        assert "close the engine" in str(error)
        for handle in (*running, waiting):
            assert isinstance(await error_of(handle), EngineClosed)
        with pytest.raises(EngineClosed, match="update of the weights failed half way"):
            engine.generate([1])
        assert isinstance(await error_of(engine.resume()), EngineClosed)
        assert engine.get_stats()["engine_status"] == "failed"

    replicas = models()
    run(main, engine_of(replicas))


def test_an_aborting_update_ends_what_waits_for_a_replica_too() -> None:
    async def main(engine: ReplicatedEngine) -> None:
        running = [engine.generate([number] * 4, LONG) for number in range(4)]
        for handle in running:
            await handle.admitted()
        waiting = [engine.generate([9], LONG) for _ in range(3)]
        update = asyncio.ensure_future(engine.update_weights({}))
        release(replicas)
        assert await update == 1
        for handle in (*running, *waiting):
            assert isinstance(await error_of(handle), RequestAborted)
        assert await versions(engine) == {1}

    replicas = held()
    run(main, engine_of(replicas, max_batch_size=1), replicas)


def test_a_waiting_update_comes_before_what_has_not_started() -> None:
    async def main(engine: ReplicatedEngine) -> None:
        running = [engine.generate([number] * 4, short(30)) for number in range(4)]
        for handle in running:
            await handle.admitted()
        waiting = [engine.generate([9], short()) for _ in range(3)]
        update = asyncio.ensure_future(engine.update_weights({}, mode="wait"))
        await asyncio.sleep(0)  # it begins before the next order,
        assert isinstance(await error_of(engine.pause()), EngineStateError)  # which finds it being carried out
        release(replicas)
        assert await update == 1
        outputs = await asyncio.gather(*running, *waiting)
        seen = [set(output.outputs[0].weight_versions) for output in outputs]
        assert all(len(each) == 1 for each in seen)
        assert seen[:2] == [{0}] * 2
        assert seen[4:] == [{1}] * 3

    replicas = held()
    run(main, engine_of(replicas, max_batch_size=1), replicas)


def test_a_caller_who_leaves_undoes_an_order_that_waits() -> None:
    async def main(engine: ReplicatedEngine) -> None:
        running = engine.generate([1] * 20, LONG)
        await anext(running)
        for order in (
            lambda: engine.update_weights({}, mode="wait"),
            lambda: engine.updating("wait").__aenter__(),
            lambda: engine.pause("wait"),
            lambda: engine.sleep(mode="wait"),
        ):
            task = asyncio.ensure_future(order())
            await asyncio.sleep(0)  # it begins before the next order,
            assert isinstance(await error_of(engine.pause()), EngineStateError)  # which finds it being carried out
            other = engine.generate([2] * 20, short())  # held: it has not started
            done, _ = await asyncio.wait([task], timeout=0.05)
            assert not done
            assert not other.done()
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
            assert len((await other).generated_ids) == 3
        assert not running.done()
        running.cancel()
        assert await versions(engine) == {0}

    run(main, engine_of(models()))


def test_a_cancelled_scope_of_trio_lets_the_engine_go_on() -> None:
    """In a cancelled scope every await raises at once, also that for the end of the update."""

    async def main() -> None:
        async with engine_of(models()) as engine:
            running = engine.generate([1] * 20, LONG)
            await anext(running)
            with trio.CancelScope() as waiting:
                waiting.cancel()
                await engine.update_weights({}, mode="wait")
            with trio.CancelScope() as inside:
                async with engine.updating("keep"):
                    inside.cancel()
                    await trio.sleep_forever()
            assert waiting.cancelled_caught
            assert inside.cancelled_caught
            output = await engine.generate([2] * 20, short())
            assert output.outputs[0].weight_versions == [1] * 3
            running.cancel()

    trio.run(main)


def test_a_replica_that_cannot_load_an_adapter_leaves_it_on_none() -> None:
    async def main(engine: ReplicatedEngine) -> None:
        for source in ("/no/such/folder", 3):
            assert isinstance(await error_of(engine.load_adapter("a", source)), WeightsError)
        assert engine.adapters == []
        assert isinstance(await error_of(engine.generate([1], short(), adapter="a")), RequestError)

    run(main, engine_of(models()))


def test_a_replica_that_cannot_sleep_or_wake_keeps_the_others_where_they_were() -> None:
    async def main(engine: ReplicatedEngine) -> None:
        poor.is_poor = True
        assert isinstance(await error_of(engine.sleep()), WeightsError)
        assert engine.get_stats()["engine_status"] == "running"
        assert await versions(engine) == {0}
        poor.is_poor = False
        await engine.sleep()
        poor.is_poor = True
        assert isinstance(await error_of(engine.wake()), OutOfMemory)
        assert {each["engine_status"] for each in engine.get_stats()["replicas"]} == {"asleep"}
        poor.is_poor = False
        await engine.wake()
        assert await versions(engine) == {0}

    poor = Refusing([5], vocab_size=32)
    run(main, engine_of([ScriptedModel([5], vocab_size=32), poor], tokenizer=None))


@DYING
def test_a_replica_that_failed_is_left_out_of_an_update() -> None:
    async def main(engine: ReplicatedEngine) -> None:
        running = [engine.generate([number] * 20, LONG) for number in range(2)]
        for handle in running:
            await anext(handle)
        replicas[0].is_dying = True
        assert isinstance(await error_of(running[0]), EngineClosed)
        assert await engine.update_weights({}) == 1
        assert await versions(engine) == {1}
        await engine.pause()
        await engine.resume()
        assert counts(engine)[0] == 1

    replicas = models(kind=Mortal)
    run(main, engine_of(replicas))


def test_an_update_makes_prefixes_unknown() -> None:
    async def main(engine: ReplicatedEngine) -> None:
        await engine.generate([1] * 64, short())
        await engine.update_weights({})
        assert (await engine.generate([1] * 64, short())).num_cached_tokens == 0
        assert sum(each["expected_hit_tokens"] for each in engine.get_stats()["routing"]) == 0

    run(main, engine_of(models()))


def test_requests_of_a_pause_are_shared_out_at_its_end() -> None:
    async def main(engine: ReplicatedEngine) -> None:
        await engine.pause()
        handles = [engine.generate([number] * 20, short()) for number in range(6)]
        await engine.resume()
        await asyncio.gather(*handles)
        assert counts(engine) == [3, 3]

    run(main, engine_of(models()))
