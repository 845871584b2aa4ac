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
import time
from collections.abc import Awaitable, Callable
from typing import ClassVar

from penstock.api.channel import RequestStatus
from penstock.api.handle import RequestHandle
from penstock.api.protocols import Callback, Engine
from penstock.errors import DeadlineExceeded, EngineClosed, RequestAborted, RequestError
from penstock.outputs import Delta, RequestOutput
from penstock.sampling import RequestPriority, SamplingParams
from penstock.testing.outcomes import (
    ATTEMPTS,
    PATIENCE_S,
    ended,
    error_of,
    nothing,
    output_of,
    seconds_until_accepted,
    tokens_of,
)


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
            tokens, output = await asyncio.gather(tokens_of(handle), handle)
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
            _, error = await self._ended(engine, nothing, callback=callback)
            assert isinstance(error, RequestError)
            assert len((await neighbour).generated_ids) == 9

        self._run(main)

    # Ending a request early.

    def test_cancelling_aborts_with_the_partial_output(self) -> None:
        async def main(engine: Engine) -> None:
            first_ids: list[int] = []
            for cancel in (RequestHandle.cancel, lambda handle: engine.abort(handle.request_id)):

                async def end(handle: RequestHandle, cancel: Callable[[RequestHandle], None] = cancel) -> None:
                    first_ids[:] = (await anext(handle)).token_ids
                    cancel(handle)

                handle, error = await self._ended(engine, end)
                assert isinstance(error, RequestAborted)
                assert error.output is not None
                assert list(error.output.generated_ids[: len(first_ids)]) == first_ids
                assert handle.status is RequestStatus.CANCELLED

        self._run(main)

    def test_cancelling_a_task_that_reads_aborts_the_request(self) -> None:
        async def main(engine: Engine) -> None:
            for reader in (output_of, tokens_of):

                async def end(handle: RequestHandle, reader: Callable[..., Awaitable[object]] = reader) -> None:
                    task = asyncio.ensure_future(reader(handle))
                    await asyncio.sleep(0.02)
                    task.cancel()
                    await asyncio.wait([task])

                _, error = await self._ended(engine, end)
                assert isinstance(error, RequestAborted)

        self._run(main)

    def test_leaving_a_handle_aborts_the_request(self) -> None:
        async def main(engine: Engine) -> None:
            async def close(handle: RequestHandle) -> None:
                await handle.aclose()

            async def leave_block(handle: RequestHandle) -> None:
                async with handle:
                    pass

            for leave in (close, leave_block):
                _, error = await self._ended(engine, leave)
                assert isinstance(error, RequestAborted)

        self._run(main)

    def test_dropping_a_handle_aborts_the_request_unless_it_was_detached(self) -> None:
        async def main(engine: Engine) -> None:
            reasons: asyncio.Queue[str] = asyncio.Queue()

            def note(delta: Delta) -> None:
                if delta.finish_reason:
                    reasons.put_nowait(delta.finish_reason)

            engine.generate(self.prompt, self._params(9), request_id="kept", callback=note).detach()
            assert await asyncio.wait_for(reasons.get(), PATIENCE_S) == "length"

            def reuse() -> RequestHandle:
                return engine.generate(self.prompt, self._params(9), request_id="dropped")

            # The id can be used again once the request has ended, long before it would complete.
            for _ in range(ATTEMPTS):
                begin_s = time.monotonic()
                await engine.generate(self.prompt, self._params(self.LENGTH))
                whole_s = time.monotonic() - begin_s
                async for _ in engine.generate(self.prompt, self._params(self.LENGTH), request_id="dropped"):
                    break
                gc.collect()
                if await seconds_until_accepted(reuse) < whole_s / 2:
                    return
            raise AssertionError(f"the id of a request of {whole_s:.2f} s was in use for more than half of it")

        self._run(main)

    def test_a_deadline_ends_a_request_with_what_it_has(self) -> None:
        async def main(engine: Engine) -> None:
            handle = engine.generate(self.prompt, self._params(self.LENGTH), deadline=0.1)
            error = await error_of(handle)
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
            busy = engine.generate(self.prompt, self._params(9))
            bad_arguments: tuple[dict[str, object], ...] = (
                {"prompt": []},
                {"prompt": [-1]},
                {"prompt": ["a"]},
                {"params": 3},
                {"priority": 99},
                {"deadline": "soon"},
                {"callback": 3},
                {"request_id": 3},
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

    def test_an_id_in_use_is_refused(self) -> None:
        async def main(engine: Engine) -> None:
            for _ in range(ATTEMPTS):
                busy = engine.generate(self.prompt, self._params(self.LENGTH), request_id="busy")
                try:
                    other = engine.generate(self.prompt, self._params(9), request_id="busy")
                except RequestError:
                    assert len((await busy).generated_ids) == self.LENGTH
                    return
                assert busy.done(), "an id in use was accepted"
                await other
            raise AssertionError("every request completed before its id was used again")

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
        errors: list[Exception | None] = []

        async def main(engine: Engine) -> None:
            running = engine.generate(self.prompt, self._params(self.LENGTH))
            await anext(running)
            await asyncio.to_thread(engine.stop, 0)
            errors.append(await error_of(running))
            assert running.status is (RequestStatus.COMPLETED if errors[-1] is None else RequestStatus.FAILED)

        while not any(errors):
            assert len(errors) < ATTEMPTS, "every request completed before the engine was stopped"
            self._run(main)
        error = errors[-1]
        assert isinstance(error, EngineClosed)
        assert error.output is not None
        assert error.output.generated_ids

    async def _ended(
        self, engine: Engine, end: Callable[[RequestHandle], Awaitable[None]], callback: Callback | None = None
    ) -> tuple[RequestHandle, Exception]:
        """A request that `end` has ended while it ran, and its error."""
        return await ended(lambda: engine.generate(self.prompt, self._params(self.LENGTH), callback=callback), end)

    def _params(self, max_tokens: int) -> SamplingParams:
        return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)

    def _run(self, main: Callable[[Engine], Awaitable[None]]) -> None:
        async def body() -> None:
            async with self.make_engine() as engine:
                await asyncio.wait_for(main(engine), 2 * PATIENCE_S)

        asyncio.run(body())
