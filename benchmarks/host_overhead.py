"""How much time per step does the engine take in addition to the model?

`ScriptedModel` costs next to nothing, so the remainder is the host's work: planning the step, committing its result,
and delivering the deltas to the readers. Measured on 256 running requests that each get one token per step:

  direct   the engine's core driven step by step on one thread; each part is timed separately, without the model's call,
           and readers take their deltas in between. The goal is 1.5 ms for the three parts together.
  live     the engine with its threads, and 256 readers on a loop: how long the model waits from the end of one step to
           the start of the next. Deltas are delivered while the next step runs, but share the interpreter's lock with
           it. Once with steps of 10 ms, during which the lock is free as in a kernel, and once with steps of no time,
           between which the readers have to do all their work.

Both with token ids only, and with text, by the tokenizer of the small model in the package.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from harness.console import finish, progress, show
from harness.options import parser_for
from harness.stats import percentile
from penstock import EngineConfig, InferenceEngine, SamplingParams, ScriptedModel
from penstock.api.channel import Channel
from penstock.api.log import make_logger
from penstock.api.prompt import PromptInput
from penstock.demo import MODEL_DIR
from penstock.engine.assembly import Parts, assemble
from penstock.engine.loop.core import CoreParts, EngineCore
from penstock.engine.loop.gate import ModelJobs
from penstock.engine.loop.housekeeping import Housekeeper
from penstock.engine.loop.worker import Job, Worker
from penstock.engine.observe.metrics import Metrics
from penstock.engine.requests.request import Request
from penstock.scheduling.admission import Admission, QueuePlace
from penstock.step import StepPlan, StepResult

TARGET_MS = 1.5
PROMPT_TOKENS, VOCABULARY, SKIPPED_STEPS = 16, 4096, 8
SCRIPT = [5 + 37 * i % 4000 for i in range(512)]  # ordinary tokens of the small model
PARTS = ("plan", "commit", "fan-out", "together")
STEPS_S = {"live, steps of 10 ms": 0.01, "live, steps of no time": 0.0}


@dataclass(slots=True)
class Stopwatch:
    """Delegates to `inner`; `seconds` has the times of the calls of the methods in `timed`, by name."""

    inner: Any
    timed: tuple[str, ...]
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.inner, name)
        return self._watched(name, attribute) if name in self.timed else attribute

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        durations = self.seconds.setdefault(name, [])

        def watched(*args: Any) -> Any:
            begin = time.perf_counter()
            result = function(*args)
            durations.append(time.perf_counter() - begin)
            return result

        return watched


class TimedModel(ScriptedModel):
    """Records steps as (start, end, rows)."""

    def __init__(self, step_s: float = 0.0) -> None:
        super().__init__(SCRIPT, vocab_size=VOCABULARY, step_s=step_s)
        self.steps: list[tuple[float, float, int]] = []

    def execute(self, plan: StepPlan) -> StepResult:
        """A scripted step."""
        begin = time.perf_counter()
        result = super().execute(plan)
        self.steps.append((begin, time.perf_counter(), len(plan.rows)))
        return result


def make_config(requests: int, new_tokens: int) -> EngineConfig:
    """A configuration in which all requests fit into one step."""
    return EngineConfig(
        max_batch_size=requests,
        max_queue_size=max(1000, requests),
        max_num_batched_tokens=requests * PROMPT_TOKENS,
        kv_cache_tokens=requests * (PROMPT_TOKENS + new_tokens + 32),
        log_level="ERROR",
    )


def prompts(requests: int) -> list[list[int]]:
    """One per request, all different."""
    return [[5 + (number + place) % 4000 for place in range(PROMPT_TOKENS)] for number in range(requests)]


def asked(new_tokens: int, texts: bool) -> SamplingParams:
    """Parameters of every request."""
    return SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=texts)


async def direct(requests: int, steps: int, tokenizer: Any) -> dict[str, list[float]]:
    """Seconds of the parts of every step, without the model's."""
    new_tokens = steps + SKIPPED_STEPS + 1
    config, model, log = make_config(requests, new_tokens), TimedModel(), make_logger("ERROR")
    admission = Admission(config)
    parts = assemble(model, tokenizer, config, admission, log)
    scheduler: Any = Stopwatch(parts.scheduler, ("plan", "commit"))
    core = make_core(config, model, scheduler, admission, parts, log)
    readers = [
        submit(core, admission, i, ids, asked(new_tokens, tokenizer is not None)) for i, ids in prompted(requests)
    ]
    step_times = [await step_s(core, model) for _ in range(SKIPPED_STEPS + steps)][SKIPPED_STEPS:]
    for reader in readers:
        reader.cancel()
    await asyncio.gather(*readers, return_exceptions=True)
    parts.close()
    plan, commit = (scheduler.seconds[name][SKIPPED_STEPS:] for name in ("plan", "commit"))
    fan_out = [total - a - b for total, a, b in zip(step_times, plan, commit, strict=True)]
    return dict(zip(PARTS, (plan, commit, fan_out, step_times), strict=True))


def prompted(requests: int) -> list[tuple[int, list[int]]]:
    """Numbers and prompts."""
    return list(enumerate(prompts(requests)))


def make_core(
    config: EngineConfig, model: TimedModel, scheduler: Any, admission: Admission, parts: Parts, log: Any
) -> EngineCore:
    """A core whose model runs on this very thread."""

    def execute(plan: StepPlan) -> Job[StepResult]:
        job: Job[StepResult] = Job(*(asyncio.get_running_loop().create_future() for _ in Job._fields))
        job.begun.set_result(None)
        job.done.set_result(model.execute(plan))
        return job

    worker = Worker("penstock-model")
    housekeeper = Housekeeper(config, model, parts.cache, time.monotonic, worker.run)
    metrics = Metrics()
    core_parts = CoreParts(
        jobs=ModelJobs(runner=model, run=worker.run),
        scheduler=scheduler,
        admission=admission,
        inputs=parts.inputs,
        housekeeper=housekeeper,
        metrics=metrics,
        observe=metrics.step,
        log=log,
    )
    return EngineCore(core_parts, execute, time.monotonic)


def submit(
    core: EngineCore, admission: Admission, number: int, ids: list[int], params: SamplingParams
) -> asyncio.Task[None]:
    """Submit a request, as a caller's thread would; the task of a reader that takes every delta."""
    name = f"r{number}"
    place = QueuePlace(name, len(ids))
    admission.reserve([place])
    channel = Channel(name)
    prompt = PromptInput(token_ids=ids)
    core.submit(
        [Request(id=name, prompt=prompt, params=params, channel=channel, arrival=time.monotonic(), place=place)]
    )
    return asyncio.create_task(take_all(channel))


async def take_all(channel: Channel) -> None:
    """Read to the end."""
    while await channel.take() is not None:
        pass


async def step_s(core: EngineCore, model: TimedModel) -> float:
    """Seconds of one step without the model; then every reader takes its delta."""
    begin = time.perf_counter()
    await core.step()
    took = time.perf_counter() - begin
    for _ in range(4):  # a hop, a future, a task: each is a turn of the loop
        await asyncio.sleep(0)
    executed = model.steps[-1]
    return took - (executed[1] - executed[0])


async def live(requests: int, steps: int, tokenizer: Any, step_s: float) -> list[float]:
    """Seconds from the end of every full step to the beginning of the next."""
    new_tokens, model = steps + SKIPPED_STEPS + 1, TimedModel(step_s)
    params = asked(new_tokens, tokenizer is not None)

    async def read(ids: list[int]) -> None:
        async for _ in engine.generate(ids, params):
            pass

    async with InferenceEngine(model, tokenizer, make_config(requests, new_tokens)) as engine:
        await asyncio.gather(*map(read, prompts(requests)))
    full = [(begin, end) for begin, end, rows in model.steps if rows == requests][SKIPPED_STEPS:]
    return [following[0] - step[1] for step, following in pairwise(full)]


def milliseconds(seconds: list[float]) -> dict[str, float]:
    """Median and p99."""
    return {f"p{q}": round(1000 * percentile(seconds, q), 4) for q in (50, 99)}


def measure(requests: int, steps: int) -> dict[str, dict[str, Any]]:
    """By kind of request, then by what was timed."""
    from transformers import AutoTokenizer

    results: dict[str, dict[str, Any]] = {}
    with progress(2 * (1 + len(STEPS_S))) as step:
        for kind, tokenizer in (("ids", None), ("texts", AutoTokenizer.from_pretrained(str(MODEL_DIR)))):
            step(f"{kind}, direct")
            parts = asyncio.run(direct(requests, steps, tokenizer))
            for name, step_s in STEPS_S.items():
                step(f"{kind}, {name}")
                parts[name] = asyncio.run(live(requests, steps, tokenizer, step_s))
            results[kind] = {name: milliseconds(values) for name, values in parts.items()}
    return results


def main() -> None:
    """Measure, and print the table and the JSON line."""
    parser = parser_for(__doc__)
    parser.add_argument("--requests", type=int, metavar="N", default=256, help="running at once (default: 256)")
    parser.add_argument("--steps", type=int, metavar="N", default=200, help="measured steps (default: 200)")
    args = parser.parse_args()
    results = measure(args.requests, args.steps)
    rows = [[kind, name, *ms.values()] for kind, parts in results.items() for name, ms in parts.items()]
    show(f"host work per step, {args.requests} requests, ms", ("requests", "part", "p50", "p99"), rows)
    finish({"requests": args.requests, "steps": args.steps, "target_ms": TARGET_MS, "ms": results})


if __name__ == "__main__":
    main()
