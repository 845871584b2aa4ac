"""`EngineContract`: what callers may rely on with any engine. Subclass it in a test module; pytest runs it.

    class TestMyEngine(EngineContract):
        def make_engine(self) -> Engine:
            return MyEngine()

Needs no pytest plugin: every test runs its own event loop. Makes no assumption about the generated tokens.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Awaitable, Callable
from typing import ClassVar

from penstock.api.channel import RequestStatus
from penstock.api.handle import RequestHandle
from penstock.api.protocols import Engine
from penstock.errors import DeadlineExceeded, EngineClosed, RequestAborted, RequestError
from penstock.outputs import Delta, RequestOutput
from penstock.sampling import RequestPriority, SamplingParams

PATIENCE_S = 30.0


class EngineContract:
    """`make_engine` creates a fresh engine, which generates at least `LENGTH` tokens for `prompt` within a few seconds.

    A request for `LENGTH` tokens should take at least 0.2 s, so that it can be ended while it runs.
    """

    LENGTH = 400
    prompt: ClassVar[list[int]] = [1 + token % 20 for token in range(400)]

    def make_engine(self) -> Engine:
        """A new engine for one test."""
        raise NotImplementedError

    # Streaming and awaiting.

    def test_deltas_add_up_to_the_output(self) -> None:
        async def main(engine: Engine) -> None:
            deltas = [delta async for delta in engine.generate(self.prompt, self._params(9), request_id="a")]
            output = await engine.generate(self.prompt, self._params(9))
            (completion,) = output.outputs
            assert [token for delta in deltas for token in delta.token_ids] == list(completion.token_ids)
            assert "".join(delta.text for delta in deltas) == completion.text
            assert {delta.request_id for delta in deltas} == {"a"}
            reasons = [delta.finish_reason for delta in deltas]
            assert reasons[-1] == completion.finish_reason == "length"
            assert reasons[:-1] == [None] * (len(reasons) - 1)
            assert len(completion.token_ids) == 9
            assert output.prompt_token_ids == self.prompt

        self._run(main)

    def test_a_handle_is_awaited_and_iterated_at_once(self) -> None:
        async def main(engine: Engine) -> None:
            handle = engine.generate(self.prompt, self._params(9))
            tokens, output = await asyncio.gather(_tokens(handle), handle)
            assert tokens == output.generated_ids
            assert await handle == output
            assert handle.status is RequestStatus.COMPLETED
            assert handle.done()

        self._run(main)

    def test_a_slow_reader_gets_everything_in_fewer_deltas(self) -> None:
        async def main(engine: Engine) -> None:
            handle = engine.generate(self.prompt, self._params(self.LENGTH))
            output = await handle
            deltas = [delta async for delta in handle]
            assert len(deltas) == 1
            assert list(deltas[0].token_ids) == output.generated_ids

        self._run(main)

    def test_many_requests_run_at_once_and_keep_apart(self) -> None:
        async def main(engine: Engine) -> None:
            alone = await engine.generate(self.prompt, self._params(9))
            crowd = await asyncio.gather(*(engine.generate(self.prompt, self._params(9)) for _ in range(8)))
            assert all(output.generated_ids == alone.generated_ids for output in crowd)
            assert len({output.request_id for output in crowd}) == 8

        self._run(main)

    def test_a_result_can_be_waited_for_without_an_event_loop(self) -> None:
        engine = self.make_engine()
        try:
            engine.start()
            assert len(engine.generate(self.prompt, self._params(9)).result(PATIENCE_S).generated_ids) == 9
        finally:
            engine.stop(0)

    # Callbacks.

    def test_a_callback_gets_every_delta(self) -> None:
        async def main(engine: Engine) -> None:
            deltas: list[Delta] = []
            end = asyncio.Event()

            def callback(delta: Delta) -> None:
                deltas.append(delta)
                if delta.finish_reason:
                    end.set()

            handle = engine.generate(self.prompt, self._params(9), callback=callback)
            await asyncio.wait_for(end.wait(), PATIENCE_S)
            output = await handle
            assert [token for delta in deltas for token in delta.token_ids] == output.generated_ids

        self._run(main)

    def test_a_callback_that_raises_ends_its_request_alone(self) -> None:
        async def main(engine: Engine) -> None:
            def callback(delta: Delta) -> None:
                raise LookupError("no")

            neighbour = engine.generate(self.prompt, self._params(9))
            failing = engine.generate(self.prompt, self._params(self.LENGTH), callback=callback)
            assert isinstance(await _error(failing), RequestError)
            assert len((await neighbour).generated_ids) == 9

        self._run(main)

    # Ending a request early.

    def test_cancelling_aborts_with_the_partial_output(self) -> None:
        async def main(engine: Engine) -> None:
            for cancel in (RequestHandle.cancel, lambda handle: engine.abort(handle.request_id)):
                handle = engine.generate(self.prompt, self._params(self.LENGTH))
                first_delta = await anext(handle)
                cancel(handle)
                error = await _error(handle)
                assert isinstance(error, RequestAborted)
                assert error.output is not None
                assert list(error.output.generated_ids[: len(first_delta.token_ids)]) == list(first_delta.token_ids)
                assert handle.status is RequestStatus.CANCELLED

        self._run(main)

    def test_cancelling_a_task_that_reads_aborts_the_request(self) -> None:
        async def main(engine: Engine) -> None:
            for reader in (_await, _tokens):
                handle = engine.generate(self.prompt, self._params(self.LENGTH))
                task = asyncio.ensure_future(reader(handle))
                await asyncio.sleep(0.02)
                task.cancel()
                await asyncio.wait([task])
                assert isinstance(await _error(handle), RequestAborted)

        self._run(main)

    def test_leaving_a_handle_aborts_the_request(self) -> None:
        async def main(engine: Engine) -> None:
            async def close(handle: RequestHandle) -> None:
                await handle.aclose()

            async def leave_block(handle: RequestHandle) -> None:
                async with handle:
                    pass

            for leave in (close, leave_block):
                handle = engine.generate(self.prompt, self._params(self.LENGTH))
                await leave(handle)
                assert isinstance(await _error(handle), RequestAborted)

        self._run(main)

    def test_dropping_a_handle_aborts_the_request_unless_it_was_detached(self) -> None:
        async def main(engine: Engine) -> None:
            reasons: asyncio.Queue[str] = asyncio.Queue()

            def note(delta: Delta) -> None:
                if delta.finish_reason:
                    reasons.put_nowait(delta.finish_reason)

            engine.generate(self.prompt, self._params(9), request_id="kept", callback=note).detach()
            assert await asyncio.wait_for(reasons.get(), PATIENCE_S) == "length"
            async for _ in engine.generate(self.prompt, self._params(self.LENGTH), request_id="dropped"):
                break
            gc.collect()
            # The id can be used again once the request has ended, long before it would complete.
            begin = asyncio.get_running_loop().time()
            while True:
                try:
                    output = await engine.generate(self.prompt, self._params(9), request_id="dropped")
                    break
                except RequestError:
                    assert asyncio.get_running_loop().time() - begin < 0.15
                    await asyncio.sleep(0.01)
            assert len(output.generated_ids) == 9

        self._run(main)

    def test_a_deadline_ends_a_request_with_what_it_has(self) -> None:
        async def main(engine: Engine) -> None:
            handle = engine.generate(self.prompt, self._params(self.LENGTH), deadline=0.1)
            error = await _error(handle)
            assert isinstance(error, DeadlineExceeded)
            assert error.output is None or len(error.output.generated_ids) < self.LENGTH
            assert handle.status is RequestStatus.FAILED

        self._run(main)

    def test_every_request_ends_once_and_ending_it_again_changes_nothing(self) -> None:
        async def main(engine: Engine) -> None:
            handle = engine.generate(self.prompt, self._params(9))
            output = await handle
            handle.cancel()
            engine.abort(handle.request_id)
            engine.abort("nobody")
            assert await handle == output
            assert handle.status is RequestStatus.COMPLETED

        self._run(main)

    # Invalid arguments.

    def test_bad_arguments_are_refused_at_once_and_lose_nothing(self) -> None:
        async def main(engine: Engine) -> None:
            busy = engine.generate(self.prompt, self._params(9), request_id="busy")
            bad_arguments: tuple[dict[str, object], ...] = (
                {"prompt": []},
                {"prompt": [-1]},
                {"prompt": ["a"]},
                {"params": 3},
                {"priority": 99},
                {"deadline": "soon"},
                {"callback": 3},
                {"request_id": 3},
                {"request_id": "busy"},
            )
            for arguments in bad_arguments:
                refused = {"prompt": self.prompt, "params": self._params(9)} | arguments
                try:
                    engine.generate(**refused)  # type: ignore[arg-type]
                except RequestError:
                    continue
                raise AssertionError(f"{arguments} was accepted")
            assert len((await busy).generated_ids) == 9

        self._run(main)

    # Threads, loops and stopping.

    def test_requests_come_from_several_threads_and_loops(self) -> None:
        async def main(engine: Engine) -> None:
            outputs: list[RequestOutput] = []

            async def read() -> None:
                outputs.extend(await asyncio.gather(*(engine.generate(self.prompt, self._params(9)) for _ in range(3))))

            threads = [threading.Thread(target=lambda: asyncio.run(read())) for _ in range(3)]
            for thread in threads:
                thread.start()
            await read()
            for thread in threads:
                await asyncio.to_thread(thread.join, PATIENCE_S)
            assert [len(output.generated_ids) for output in outputs] == [9] * 12

        self._run(main)

    def test_stopping_drains_and_then_refuses(self) -> None:
        async def main(engine: Engine) -> None:
            accepted = engine.generate(self.prompt, self._params(9), priority=RequestPriority.LOW)
            await asyncio.to_thread(engine.stop, PATIENCE_S)
            assert len((await accepted).generated_ids) == 9
            engine.stop(0)
            try:
                engine.generate(self.prompt, self._params(9))
            except EngineClosed:
                return
            raise AssertionError("a stopped engine took a request")

        self._run(main)

    def test_stopping_without_a_drain_ends_what_runs(self) -> None:
        async def main(engine: Engine) -> None:
            running = engine.generate(self.prompt, self._params(self.LENGTH))
            await anext(running)
            await asyncio.to_thread(engine.stop, 0)
            error = await _error(running)
            assert isinstance(error, EngineClosed)
            assert error.output is not None
            assert error.output.generated_ids
            assert running.status is RequestStatus.FAILED

        self._run(main)

    def _params(self, max_tokens: int) -> SamplingParams:
        return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)

    def _run(self, main: Callable[[Engine], Awaitable[None]]) -> None:
        async def body() -> None:
            async with self.make_engine() as engine:
                await asyncio.wait_for(main(engine), 2 * PATIENCE_S)

        asyncio.run(body())


async def _await(handle: RequestHandle) -> RequestOutput:
    return await handle


async def _tokens(handle: RequestHandle) -> list[int]:
    return [token async for delta in handle for token in delta.token_ids]


async def _error(handle: RequestHandle) -> Exception | None:
    try:
        await asyncio.wait_for(_await(handle), PATIENCE_S)
    except Exception as error:
        return error
    return None
