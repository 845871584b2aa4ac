"""A scheduler over 10 blocks of 4 tokens, with the test as its engine and model."""

from __future__ import annotations

from typing import Any

from penstock.cache.manager import CacheManager
from penstock.config import EngineConfig
from penstock.sampling import RequestPriority, SamplingParams
from penstock.scheduling.scheduler import Scheduler
from penstock.sequence import Sequence
from penstock.step import Event, Row, RowResult, StepPlan, StepResult

LOW, NORMAL, HIGH, CRITICAL = RequestPriority
TOKEN = 7  # what the model says when the test does not care
Results = dict[int, RowResult | tuple[int, ...]]


class World:
    """`plan` shows the last plan; `step` runs one to its end."""

    plan: StepPlan

    def __init__(
        self,
        num_blocks: int = 10,
        block_size: int = 4,
        *,
        caching: bool = True,
        max_logit_rows: int | None = None,
        **settings: Any,
    ) -> None:
        self.config = EngineConfig(**settings)
        self.cache = CacheManager(num_blocks, block_size, enable_prefix_caching=caching)
        self.scheduler = Scheduler(self.config, self.cache, max_logit_rows=max_logit_rows)

    def add(
        self, number: int, prompt: int | list[int], new: int = 4, *, now: float | None = None, **fields: Any
    ) -> Sequence:
        """Queue a sequence; a prompt given as a length shares with nobody. `arrival` defaults to its number / 1000."""
        tokens = [100 * number + i for i in range(prompt)] if isinstance(prompt, int) else list(prompt)
        arrival = number / 1000 if now is None else now
        values: dict[str, Any] = {
            "request_id": str(number),
            "params": SamplingParams(max_tokens=new or 1),  # parameters that generate nothing are in `fields`
            "arrival": arrival,
        } | fields
        seq = Sequence(id=number, tokens=tokens, max_len=len(tokens) + new, **values)
        self.scheduler.add(seq, arrival)
        return seq

    def begin(self, now: float = 1.0) -> dict[int, tuple[int, int]]:
        """Plan a step; the planned half-open range of positions by sequence, best first."""
        self.plan = self.scheduler.plan(now)
        self.cache.check(self.scheduler.sequences())
        return {row.seq_id: (row.start, row.end) for row in self.plan.rows}

    def end(self, results: Results | None = None) -> list[Event]:
        """Commit the planned step; every sampling row without a result of its own says TOKEN."""
        rows = tuple(self.result_of(row, results or {}) for row in self.plan.rows)
        events = self.scheduler.commit(self.plan, StepResult(rows))
        self.cache.check(self.scheduler.sequences())
        return events

    def result_of(self, row: Row, results: Results) -> RowResult:
        """What a row comes to, and its siblings with it."""
        out = results.get(row.seq_id, (TOKEN,) if row.samples else ())
        result = out if isinstance(out, RowResult) else RowResult(out)
        return result._replace(siblings=tuple(self.result_of(sibling, results) for sibling in row.siblings))

    def step(self, now: float = 1.0) -> dict[int, tuple[int, int]]:
        """Plan and commit."""
        planned = self.begin(now)
        self.end()
        return planned

    def drain(self, now: float = 1.0, max_steps: int = 200) -> list[list[int]]:
        """Step until nothing is left; which sequences ran in each step."""
        steps = []
        while self.scheduler.has_work:
            steps.append(list(self.step(now)))
            assert len(steps) < max_steps, "it never ends"
        return steps
