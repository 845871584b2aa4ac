"""The same handles under trio and under anyio on either event loop."""

from __future__ import annotations

import anyio
import pytest
import trio

from penstock import InferenceEngine, RequestAborted, RequestHandle, SamplingParams, ScriptedModel
from penstock.outputs import RequestOutput

MANY = SamplingParams(temperature=0.0, max_tokens=1_000_000, ignore_eos=True)
FEW = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


def engine() -> InferenceEngine:
    return InferenceEngine(ScriptedModel([7, 8, 9], step_s=0.001), max_sequence_length=None)


def test_a_handle_is_awaited_and_iterated_under_trio() -> None:
    async def main() -> tuple[RequestOutput, list[int]]:
        async with engine() as served:
            output = await served.generate([1, 2], FEW)
            tokens = [token async for delta in served.generate([1, 2], FEW) for token in delta.token_ids]
            return output, tokens

    output, tokens = trio.run(main)
    assert output.generated_ids == tokens == [7, 8, 9, 7]


def test_cancelling_a_trio_scope_aborts_the_request() -> None:
    async def await_it(handle: RequestHandle) -> None:
        await handle

    async def iterate(handle: RequestHandle) -> None:
        async for _ in handle:
            pass

    async def main() -> None:
        async with engine() as served:
            for read in (await_it, iterate):
                handle = served.generate([1], MANY)
                with trio.move_on_after(0.05) as scope:
                    await read(handle)
                assert scope.cancelled_caught
                with pytest.raises(RequestAborted):
                    await trio.to_thread.run_sync(handle.result, 60)

    trio.run(main)


def test_trio_and_asyncio_read_from_one_engine_at_once() -> None:
    served = engine()
    outputs: dict[str, list[RequestOutput]] = {}

    async def many(name: str) -> None:
        outputs[name] = []

        async def read() -> None:
            outputs[name].append(await served.generate([1], FEW))

        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(read)

    async def both() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(many, "asyncio")
            await anyio.to_thread.run_sync(trio.run, many, "trio")

    anyio.run(both)
    served.stop()
    assert {name: len(some) for name, some in outputs.items()} == {"asyncio": 20, "trio": 20}


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_exception_in_the_block_closes_the_engine_without_waiting(backend: str) -> None:
    async def main() -> None:
        async with engine() as served:
            served.generate([1], MANY).detach()
            raise LookupError

    with pytest.raises(LookupError):
        anyio.run(main, backend=backend)


def test_awaiting_outside_an_event_loop_says_so() -> None:
    served = engine()
    handle = served.generate([1], FEW)
    with pytest.raises(RuntimeError, match="async"):
        handle.__await__().send(None)
    served.stop()


def test_weights_are_updated_under_trio_and_a_cancelled_scope_lets_the_engine_go_on() -> None:
    """In a cancelled scope of trio every await raises at once, also that for the end of the update."""

    async def main() -> list[list[int]]:
        async with engine() as served:
            running = served.generate([1], MANY)
            await anext(running)
            with trio.CancelScope() as waiting:
                waiting.cancel()
                await served.update_weights(mode="wait")
            with trio.CancelScope() as inside:
                async with served.updating("keep"):
                    inside.cancel()
                    await trio.sleep_forever()
            assert waiting.cancelled_caught
            assert inside.cancelled_caught
            first = await served.generate([1, 2], FEW)
            await served.update_weights(mode="keep")
            second = await served.generate([1, 2], FEW)
            running.cancel()
            return [output.outputs[0].weight_versions for output in (first, second)]

    assert trio.run(main) == [[1] * 4, [2] * 4]
