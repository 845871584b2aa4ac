"""What one consumer does, or does not do, is nobody else's business: blocked loops, slow readers, floods, idleness."""

from __future__ import annotations

import asyncio
import gc
import resource
import threading
import time
from collections.abc import Callable

from penstock.api.handle import RequestHandle
from penstock.engine.inference import InferenceEngine
from penstock.errors import EngineOverloaded
from penstock.models.scripted import ScriptedModel
from penstock.outputs import Delta
from penstock.sampling import SamplingParams
from tests.scripted_engine import HoldingModel

ATTEMPTS = 3  # at what other programs on the machine may spoil
STEP_S = 0.002
PATIENCE_S = 60.0


class Reader(threading.Thread):
    """Reads one request in a loop of its own thread, and blocks that loop in `pause` after the first delta."""

    def __init__(self, engine: InferenceEngine, num_tokens: int, pause: Callable[[], object]) -> None:
        super().__init__()
        self.engine = engine
        self.num_tokens = num_tokens
        self.pause = pause
        self.deltas: list[Delta] = []

    def run(self) -> None:
        asyncio.run(self.read())

    async def read(self) -> None:
        async for delta in self.engine.generate([1], SamplingParams(max_tokens=self.num_tokens)):
            self.deltas.append(delta)
            if len(self.deltas) == 1:
                self.pause()  # the mistake that this is about

    @property
    def tokens(self) -> list[int]:
        """All tokens read."""
        return [token for delta in self.deltas for token in delta.token_ids]


def test_blocked_loop_delays_nobody_else_and_its_deltas_merge() -> None:
    """One loop is blocked until the request of another has ended, so any delay would be for ever."""
    model = HoldingModel([5, 6, 7], hold_at=2, step_s=STEP_S, max_length=4096)
    engine = InferenceEngine(model, batch_timeout_ms=0)
    engine.start()
    is_blocked, may_go_on = threading.Event(), threading.Event()

    def pause() -> None:
        is_blocked.set()
        may_go_on.wait()

    blocked, other = Reader(engine, 150, pause), Reader(engine, 150, lambda: None)
    blocked.start()
    assert is_blocked.wait(PATIENCE_S)
    model.release()  # its loop was blocked by the first of 150 tokens
    other.start()
    other.join(PATIENCE_S)
    has_ended = not other.is_alive()
    while has_ended and engine.get_stats()["queue"]["num_requests"]:
        time.sleep(STEP_S)
    may_go_on.set()
    blocked.join()
    engine.stop()
    assert has_ended
    assert blocked.tokens == other.tokens == [5, 6, 7] * 50
    assert len(blocked.deltas) == 2, "all that came while the loop was blocked is one delta"


async def test_reader_that_never_reads_gets_one_merged_delta() -> None:
    async with InferenceEngine(ScriptedModel([5, 6, 7, 8], max_length=4096)) as engine:
        handle = engine.generate([1], SamplingParams(max_tokens=1000))
        output = await handle
        deltas = [delta async for delta in handle]
        assert len(deltas) == 1
        assert list(deltas[0].token_ids) == output.generated_ids == [5, 6, 7, 8] * 250
        assert len(deltas[0].token_logprobs) == 1000
        assert deltas[0].finish_reason == "length"


class Flood:
    """Submits without a pause; notes who was let in, and how long each refusal took."""

    def __init__(self, engine: InferenceEngine) -> None:
        self.engine = engine
        self.num_submitted = 0
        self.accepted: list[RequestHandle] = []
        self.refusals_s: list[float] = []
        self.advice_s: list[float] = []

    def submit(self, count: int) -> None:
        self.num_submitted += count
        for _ in range(count):
            begin = time.perf_counter()
            try:
                self.accepted.append(self.engine.generate([1] * 1000, SamplingParams(max_tokens=3)))
            except EngineOverloaded as error:
                self.refusals_s.append(time.perf_counter() - begin)
                self.advice_s.append(error.retry_after_s)


async def test_flood_is_refused_quickly_and_the_engine_serves_afterwards() -> None:
    model = ScriptedModel([5, 6, 7], max_length=4096)
    async with InferenceEngine(model, max_queue_size=100, max_batch_size=1, batch_timeout_ms=0) as engine:
        flood = Flood(engine)
        model.hold()
        try:
            flood.submit(1000)
            before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            flood.submit(9000)
            growth_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
            while sorted(flood.refusals_s[-9000:])[8820] >= 0.005:  # 98 %: the others waited for other programs
                assert flood.num_submitted < ATTEMPTS * 10_000
                flood.submit(9000)
        finally:
            model.release()
        assert 100 <= len(flood.accepted) <= 101  # a hundred wait, and one may be running
        assert len(flood.accepted) + len(flood.refusals_s) == flood.num_submitted
        assert min(flood.advice_s) > 0
        assert growth_kib < 20 * 1024
        outputs = await asyncio.gather(*flood.accepted)
        assert all(output.generated_ids == [5, 6, 7] for output in outputs)
        assert (await engine.generate([1], SamplingParams(max_tokens=3))).generated_ids == [5, 6, 7]


async def test_idle_engine_uses_no_cpu() -> None:
    """Real time is what this is about, so it waits for a second."""
    async with InferenceEngine(ScriptedModel([5], max_length=4096)) as engine:
        engine.submit_request([1], SamplingParams(max_tokens=3), callback=lambda output: None)
        await engine.generate([1], SamplingParams(max_tokens=3))
        gc.collect()
        used_s: list[float] = []
        while not used_s or used_s[-1] >= 0.01:
            assert len(used_s) < ATTEMPTS, used_s
            begin = time.process_time()
            await asyncio.sleep(1)
            used_s.append(time.process_time() - begin)
