"""`TrainableContract`: what training programs may rely on with any `Trainable` engine. Subclass it in a test module.

    class TestMyEngine(TrainableContract):
        def make_engine(self) -> TrainableEngine:
            return MyEngine()

Like `EngineContract`, it needs no pytest plugin and makes no assumption about the generated tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import ClassVar, Protocol

from penstock.api.handle import RequestHandle
from penstock.api.protocols import Engine, Trainable
from penstock.api.weights import UpdateMode, WeightSource
from penstock.errors import EngineStateError, PenstockError, RequestAborted, RequestError
from penstock.outputs import CompletionOutput
from penstock.sampling import SamplingParams

PATIENCE_S = 60.0
ATTEMPTS = 10  # at updating while requests run: on a busy machine they may complete before the order arrives


class TrainableEngine(Engine, Trainable, Protocol):
    """An engine that generates, and whose weights can change."""


class TrainableContract:
    """`make_engine` creates a fresh engine, which can generate `LENGTH` tokens for `prompt`.

    `new_weights` gives a source for its next update. Generating `LENGTH` tokens has to take longer than an order takes
    to arrive.
    """

    LENGTH = 400
    prompt: ClassVar[list[int]] = [1 + token % 20 for token in range(64)]

    def make_engine(self) -> TrainableEngine:
        """A new engine for one test."""
        raise NotImplementedError

    def new_weights(self) -> WeightSource:
        """The weights of the next update; None for those of a live module."""
        return None

    def test_versions_count_the_updates_and_are_on_every_token(self) -> None:
        async def main(engine: TrainableEngine) -> None:
            for version in range(3):
                assert engine.weight_version == version
                handle = engine.generate(self.prompt, self._params(9))
                versions = [version async for delta in handle for version in delta.weight_versions]
                assert versions == (await handle).outputs[0].weight_versions == [version] * 9
                assert await engine.update_weights(self.new_weights()) == version + 1

        self._run(main)

    def test_aborting_ends_running_and_waiting_requests_with_equal_lengths(self) -> None:
        async def main(engine: TrainableEngine) -> None:
            for version in range(1, ATTEMPTS + 1):
                handles = [engine.generate(self.prompt, self._params(self.LENGTH)) for _ in range(4)]
                await anext(handles[0])
                async with engine.updating():
                    arriving = engine.generate(self.prompt, self._params(5))
                assert (await arriving).outputs[0].weight_versions == [version] * 5
                errors = [await _error(handle) for handle in handles]
                if None not in errors:
                    break
            for error in errors:
                assert isinstance(error, RequestAborted)
                assert error.output is not None
                _check(error.output.outputs[0])

        self._run(main)

    def test_waiting_lets_no_request_span_an_update(self) -> None:
        async def main(engine: TrainableEngine) -> None:
            running = engine.generate(self.prompt, self._params(self.LENGTH))
            await anext(running)
            assert await engine.update_weights(self.new_weights(), mode="wait") == 1
            assert (await running).outputs[0].weight_versions == [0] * self.LENGTH
            assert (await engine.generate(self.prompt, self._params(5))).outputs[0].weight_versions == [1] * 5

        self._run(main)

    def test_keeping_lets_a_request_go_on_under_the_new_weights(self) -> None:
        async def main(engine: TrainableEngine) -> None:
            running = engine.generate(self.prompt, self._params(self.LENGTH))
            first_delta = await anext(running)
            await engine.update_weights(self.new_weights(), mode="keep")
            completion = (await running).outputs[0]
            _check(completion)
            assert tuple(completion.token_ids[: len(first_delta.token_ids)]) == first_delta.token_ids
            assert completion.weight_versions == sorted(completion.weight_versions)
            assert completion.weight_versions[0] == 0
            assert len(completion.token_ids) == self.LENGTH

        self._run(main)

    def test_requests_wait_while_the_engine_is_paused_or_asleep(self) -> None:
        async def main(engine: TrainableEngine) -> None:
            for stop, go_on in ((engine.pause, engine.resume), (engine.sleep, engine.wake)):
                await stop()
                handle = engine.generate(self.prompt, self._params(5))
                assert await engine.update_weights(self.new_weights(), mode="wait") == engine.weight_version
                assert not handle.done()
                await go_on()
                assert (await handle).outputs[0].weight_versions == [engine.weight_version] * 5

        self._run(main)

    def test_orders_out_of_turn_raise_and_change_nothing(self) -> None:
        async def main(engine: TrainableEngine) -> None:
            await _refused(engine.resume, engine.wake)
            await engine.pause()
            await _refused(engine.pause, engine.wake)
            await engine.sleep()
            await _refused(engine.pause, engine.resume, engine.sleep)
            await engine.wake()
            await engine.resume()
            async with engine.updating():
                await _refused(engine.update_weights, engine.pause, engine.resume, engine.sleep, engine.wake)
            assert engine.weight_version == 1
            assert len((await engine.generate(self.prompt, self._params(5))).generated_ids) == 5

        self._run(main)

    def test_a_block_that_fails_lets_the_engine_go_on(self) -> None:
        async def main(engine: TrainableEngine) -> None:
            try:
                async with engine.updating():
                    raise LookupError("in the block")
            except LookupError:
                pass
            assert (await engine.generate(self.prompt, self._params(5))).outputs[0].weight_versions == [1] * 5

        self._run(main)

    def test_unknown_modes_are_refused(self) -> None:
        async def main(engine: TrainableEngine) -> None:
            unknown: UpdateMode = "later"  # type: ignore[assignment]
            assert isinstance(await _error(engine.update_weights(self.new_weights(), mode=unknown)), RequestError)
            assert isinstance(await _error(engine.pause(unknown)), RequestError)
            assert engine.weight_version == 0

        self._run(main)

    def _params(self, max_tokens: int) -> SamplingParams:
        return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)

    def _run(self, main: Callable[[TrainableEngine], Awaitable[None]]) -> None:
        async def body() -> None:
            async with self.make_engine() as engine:
                await asyncio.wait_for(main(engine), 2 * PATIENCE_S)

        asyncio.run(body())


def _check(completion: CompletionOutput) -> None:
    count = len(completion.token_ids)
    lists = completion.token_logprobs, completion.sampled_logprobs, completion.weight_versions
    assert [len(values) for values in lists] == [count] * 3


async def _refused(*orders: Callable[[], Awaitable[object]]) -> None:
    for order in orders:
        assert isinstance(await _error(order()), EngineStateError)


async def _error(awaitable: Awaitable[object] | RequestHandle) -> Exception | None:
    try:
        await awaitable
    except PenstockError as error:
        return error
    return None
