"""The worked example of docs/design.md: 10 blocks of 4 tokens, three requests, one of them preempted.

The numbers below are the document's. The first test runs them, the last one reads them in the document.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.cache.manager import CacheManager
from penstock.config import EngineConfig
from penstock.sampling import SamplingParams
from penstock.scheduling.scheduler import Scheduler
from penstock.sequence import Sequence
from penstock.step import Event, Row, RowResult, StepPlan, StepResult

DESIGN = Path(__file__).resolve().parents[3] / "docs" / "design.md"
PREFIX = list(range(1, 9))
PROMPTS = {"A": [*PREFIX, 21, 22], "B": [*PREFIX, 31, 32, 33], "C": list(range(41, 55))}
MAX_TOKENS = {"A": 8, "B": 5, "C": 6}
SAMPLED = 7  # the token that every step draws

# (positions through the model, block table) of A, B and C, then the free blocks, after `plan` of each step.
STEPS = (
    ({"A": ("0-10", "0 1 2"), "B": ("8-11", "0 1 3"), "C": ("0-3", "4 5 6 7")}, 2),
    ({"A": ("10-11", "0 1 2"), "B": ("11-12", "0 1 3"), "C": ("3-14", "4 5 6 7")}, 2),
    ({"A": ("11-12", "0 1 2"), "B": ("12-13", "0 1 3 8"), "C": ("14-15", "4 5 6 7")}, 1),
    ({"A": ("12-13", "0 1 2 9"), "B": ("13-14", "0 1 3 8"), "C": ("15-16", "4 5 6 7")}, 0),
    ({"A": ("13-14", "0 1 2 9"), "B": ("14-15", "0 1 3 8")}, 4),
    ({"A": ("14-15", "0 1 2 9"), "C": ("16-17", "4 5 6 7 8")}, 1),
    ({"A": ("15-16", "0 1 2 9"), "C": ("17-18", "4 5 6 7 8")}, 1),
    ({"A": ("16-17", "0 1 2 9 3"), "C": ("18-19", "4 5 6 7 8")}, 0),
)


class Example:
    """The three requests over one cache; a step of the model is a constant."""

    def __init__(self) -> None:
        self.cache = CacheManager(num_blocks=10, block_size=4)
        self.scheduler = Scheduler(EngineConfig(max_num_batched_tokens=16), self.cache)
        for number, name in enumerate(PROMPTS):
            self.scheduler.add(sequence(number, name), now=0.0)

    def commit(self, plan: StepPlan) -> list[Event]:
        return self.scheduler.commit(plan, drawn(plan))


def sequence(number: int, name: str) -> Sequence:
    prompt = PROMPTS[name]
    limit = len(prompt) + MAX_TOKENS[name]
    return Sequence(id=number, request_id=name, params=SamplingParams(), tokens=list(prompt), max_len=limit)


def drawn(plan: StepPlan) -> StepResult:
    return StepResult(tuple(RowResult((SAMPLED,) if row.samples else ()) for row in plan.rows))


def name_of(row: Row | Event) -> str:
    return list(PROMPTS)[row.seq_id]


def shown(row: Row) -> tuple[str, str]:
    return f"{row.start}-{row.end}", " ".join(map(str, row.blocks))


def table_row(number: int, rows: dict[str, tuple[str, str]], free: int) -> str:
    cells = (f"{' in '.join(rows[name])}" if name in rows else "" for name in PROMPTS)
    return f"| {number} | {' | '.join(cells)} | {free} |".replace("|  |", "| |")


def test_every_step_plans_the_positions_and_blocks_of_the_document() -> None:
    example = Example()
    for rows, free in STEPS:
        plan = example.scheduler.plan(now=0.0)
        assert {name_of(row): shown(row) for row in plan.rows} == rows
        assert example.cache.num_free_blocks == free
        example.commit(plan)
        example.cache.check(list(example.scheduler.sequences()))
    assert not example.scheduler.has_work


def test_b_ends_in_step_5_and_the_others_in_step_8() -> None:
    example, ends = Example(), dict[str, int]()
    for number in range(1, len(STEPS) + 1):
        events = example.commit(example.scheduler.plan(now=0.0))
        ends |= {name_of(event): number for event in events if event.reason}
    assert ends == {"B": 5, "A": 8, "C": 8}


def test_c_alone_is_preempted_and_one_cached_block_is_evicted() -> None:
    example = Example()
    for _ in STEPS:
        example.commit(example.scheduler.plan(now=0.0))
    assert example.scheduler.stats()["num_preemptions"] == 1
    assert example.cache.stats()["evictions"] == 1


def test_c_resumes_with_all_sixteen_computed_tokens_found() -> None:
    example = Example()
    for _ in STEPS[:5]:
        example.commit(example.scheduler.plan(now=0.0))
    waiting = example.scheduler.get(2)
    assert waiting is not None
    assert (waiting.length, waiting.computed, list(waiting.blocks)) == (17, 0, [])
    assert example.cache.lookup(waiting) == 16


def test_a_resumed_victim_goes_before_its_equals() -> None:
    example = Example()
    for _ in STEPS[:6]:
        example.commit(example.scheduler.plan(now=0.0))
    assert [name_of(row) for row in example.scheduler.plan(now=0.0).rows] == ["C", "A"]


def test_a_later_sample_copies_the_shared_block_it_writes() -> None:
    """The document's second example: a prompt of 6 tokens, n=2, and 6 tokens per step."""
    scheduler = Scheduler(EngineConfig(max_num_batched_tokens=6), CacheManager(num_blocks=10, block_size=4))
    params, prompt = SamplingParams(n=2), [1, 2, 3, 4, 5, 6]
    first = Sequence(id=0, request_id="r", params=params, tokens=list(prompt), max_len=9)
    second = Sequence(id=1, request_id="r", params=params, tokens=list(prompt), max_len=9, sample_index=1, parent=first)
    scheduler.add(first, now=0.0)
    scheduler.add(second, now=0.0)
    plan = scheduler.plan(now=0.0)
    assert [shown(row) for row in plan.rows] == [("0-6", "0 1")]
    assert [row.sample_index for row in plan.rows[0].siblings] == [1]
    scheduler.commit(plan, StepResult((RowResult((7,), siblings=(RowResult((8,)),)),)))
    plan = scheduler.plan(now=0.0)
    assert [shown(row) for row in plan.rows] == [("6-7", "0 1"), ("6-7", "0 2")]
    assert plan.copies == ((1, 2),)


@pytest.mark.parametrize("number", range(1, len(STEPS) + 1))
def test_the_document_says_the_same(number: int) -> None:
    assert table_row(number, *STEPS[number - 1]) in DESIGN.read_text(encoding="utf-8")
