"""Drafts are requested, offered and judged around each step, and cost only time, whatever happens to them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from penstock.cache.manager import CacheManager
from penstock.config import EngineConfig
from penstock.engine.loop.speculator import AUTO_MAX_ROWS, Speculator
from penstock.engine.loop.worker import Job
from penstock.models.scripted import ScriptedModel
from penstock.optimizers.beam_search import BeamSearch
from penstock.optimizers.speculation.drafter import Draft, DraftRequest
from penstock.sampling import SamplingParams
from penstock.scheduling.scheduler import Scheduler
from penstock.scheduling.searches import Beams
from penstock.sequence import Sequence

LEVEL = 7


def follow(tokens: Any, index: int = 0) -> int:
    """The model's next token."""
    return (tokens[-1] * 5 + 1) % 97


class Knowing:
    """Drafts the model's next tokens; raises `errors` first. Records the sequences asked about and forgotten."""

    name = "knowing"

    def __init__(self, runs_model: bool = False) -> None:
        self.runs_model = runs_model
        self.asked: list[list[tuple[int, int]]] = []
        self.forgotten: list[int] = []
        self.errors: list[Exception] = []

    def propose(self, requests: Any) -> list[Draft]:
        self.asked.append([(request.seq.id, request.max_tokens) for request in requests])
        if self.errors:
            raise self.errors.pop()
        return [self._one(request) for request in requests]

    def forget(self, seq_id: int) -> None:
        self.forgotten.append(seq_id)

    def _one(self, request: DraftRequest) -> Draft:
        tokens = list(request.seq.tokens)
        for _ in range(request.max_tokens):
            tokens.append(follow(tokens))
        return Draft(tuple(tokens[request.seq.length :]), (LEVEL,) * request.max_tokens)


class Mistaken(Knowing):
    """Drafts that are wrong, with full confidence. Takes `drafting_s` on the clock of `loop`."""

    drafting_s = 0.02
    loop: Loop

    def _one(self, request: DraftRequest) -> Draft:
        self.loop.now += self.drafting_s / len(self.asked[-1])
        draft = super()._one(request)
        return Draft(tuple(token + 1 for token in draft.tokens), draft.confidences)


class Log:
    """Keeps log events."""

    def __init__(self) -> None:
        self.errors: list[tuple[str, dict[str, Any]]] = []

    def error(self, event: str, **fields: Any) -> None:
        self.errors.append((event, fields))


class Loop:
    """Runs steps as the engine does; a step of n tokens takes 1 + `token_s` n on its clock, drafting takes nothing."""

    token_s = 0.01

    def __init__(
        self, drafter: Knowing, *, num_blocks: int = 256, is_batch_invariant: bool = True, **settings: Any
    ) -> None:
        self.config = EngineConfig(**{"enable_speculative_decoding": True, "max_batch_size": 8, **settings})
        self.scheduler = Scheduler(self.config, CacheManager(num_blocks, 4))
        self.model = ScriptedModel(follow)
        self.drafter, self.log, self.now = drafter, Log(), 0.0
        self.trace: list[str] = []
        self.steps = self.drafted = self.accepted = 0
        self.ended = 0.0  # when the last step did
        parts = (self.config, self.scheduler, drafter, self.run_job, lambda: self.now, self.log)
        self.speculator = Speculator(*parts, is_batch_invariant=is_batch_invariant)

    def run_job(self, function: Callable[..., list[Draft]], *arguments: Any) -> Job[list[Draft]]:
        """The model's thread, which begins at the next loop iteration."""
        loop = asyncio.get_running_loop()
        job: Job[list[Draft]] = Job(loop.create_future(), loop.create_future())
        loop.call_soon(self.begin, job, function, arguments)
        return job

    def begin(self, job: Job[list[Draft]], function: Callable[..., list[Draft]], arguments: Any) -> None:
        self.trace.append("begin")
        job.begun.set_result(None)
        asyncio.get_running_loop().call_soon(asyncio.get_running_loop().call_soon, self.end, job, function, arguments)

    def end(self, job: Job[list[Draft]], function: Callable[..., list[Draft]], arguments: Any) -> None:
        self.trace.append("end")
        try:
            job.done.set_result(function(*arguments))
        except Exception as error:
            job.done.set_exception(error)

    def add(self, number: int, new: int = 40, **options: Any) -> Sequence:
        params = SamplingParams(max_tokens=new, **options)
        seq = Sequence(id=number, request_id=str(number), params=params, tokens=[number + 1, 2, 3], max_len=3 + new)
        self.scheduler.add(seq, self.now)
        return seq

    async def step(self) -> None:
        await self.speculator.draft(on_begun=lambda: self.trace.append("meanwhile"))
        plan = self.scheduler.plan(self.now)
        result = self.model.execute(plan)
        self.scheduler.commit(plan, result)
        self.steps += 1
        self.drafted += sum(len(row.draft) for row in plan.rows)
        self.accepted += sum(out.num_accepted for out in result.rows)
        self.now += 1 + plan.num_tokens * self.token_s
        seconds, self.ended = self.now - self.ended, self.now
        self.speculator.record(plan, result, seconds)

    async def finish(self) -> None:
        while self.scheduler.has_work:
            await self.step()


def said(seq: Sequence) -> list[int]:
    """The expected tokens of a sequence."""
    tokens = seq.tokens[: seq.prompt_len]
    for _ in range(seq.max_len - seq.prompt_len):
        tokens.append(follow(tokens))
    return tokens


@pytest.mark.parametrize("runs_model", [False, True])
async def test_drafts_save_steps_and_change_no_token(runs_model: bool) -> None:
    loop = Loop(Knowing(runs_model))
    seqs = [loop.add(0), loop.add(1)]
    await loop.finish()
    assert [seq.tokens for seq in seqs] == [said(seq) for seq in seqs]
    assert loop.steps < 20
    assert loop.accepted == loop.drafted > 40


async def test_the_setting_is_read_before_every_step() -> None:
    loop = Loop(Knowing())
    loop.add(0, new=200)
    for _ in range(5):
        await loop.step()
    asked = len(loop.drafter.asked)
    assert asked
    loop.config.enable_speculative_decoding = False
    for _ in range(5):
        await loop.step()
    assert len(loop.drafter.asked) == asked
    loop.config.enable_speculative_decoding = True
    loop.config.speculation_length = 3
    await loop.step()
    assert loop.drafter.asked[asked:] == [[(0, 3)]]


async def test_a_request_may_ask_for_fewer_draft_tokens_or_none_but_not_more() -> None:
    loop = Loop(Knowing(), speculation_length=6)
    for number, length in enumerate((None, 0, 2, 50)):
        loop.add(number, speculation_length=length)
    loop.add(4, new=8)
    for _ in range(4):
        await loop.step()
    assert loop.drafter.asked[0] == [(0, 6), (2, 2), (3, 6), (4, 5)], "no guess goes beyond the end"


async def test_beams_and_first_draws_are_not_asked_about() -> None:
    loop = Loop(Knowing())
    params = SamplingParams(use_beam_search=True, best_of=2, temperature=0.0, max_tokens=12)
    members = [Sequence(id=10 + i, request_id="b", params=params, tokens=[1, 2, 3], max_len=15) for i in range(2)]
    loop.scheduler.search(Beams(BeamSearch(params, 12, frozenset()), members), 0.0)
    loop.add(0)
    await loop.finish()
    assert {seq_id for requests in loop.drafter.asked for seq_id, _ in requests} == {0}


@pytest.mark.parametrize("runs_model", [False, True])
async def test_a_drafter_that_fails_is_left_out_from_then_on(runs_model: bool) -> None:
    loop = Loop(Knowing(runs_model))
    loop.drafter.errors = [RuntimeError("out of ideas")]
    seq = loop.add(0)
    await loop.finish()
    assert seq.tokens == said(seq)
    assert len(loop.drafter.asked) == 1
    [(event, fields)] = loop.log.errors
    assert "continuing without speculation" in event
    assert (fields["drafter"], fields["error"]) == ("knowing", "out of ideas")


@pytest.mark.parametrize("runs_model", [False, True])
async def test_a_drafter_that_answers_too_little_has_failed(runs_model: bool) -> None:
    loop = Loop(Knowing(runs_model))
    loop.drafter.propose = lambda requests: []  # type: ignore[method-assign]
    seq = loop.add(0)
    await loop.finish()
    assert seq.tokens == said(seq)
    assert len(loop.log.errors) == 1


async def test_what_fails_meanwhile_is_not_the_drafters_fault() -> None:
    """If publishing fails, its events are lost: the error must reach the loop."""

    def publish() -> None:
        raise RuntimeError("nobody reads")

    loop = Loop(Knowing(runs_model=True))
    loop.add(0)
    for _ in range(2):
        await loop.step()
    with pytest.raises(RuntimeError, match="nobody reads"):
        await loop.speculator.draft(on_begun=publish)
    assert not loop.log.errors


async def test_while_a_model_drafts_the_last_step_is_published() -> None:
    loop = Loop(Knowing(runs_model=True))
    loop.add(0)
    for _ in range(3):
        await loop.step()
    assert loop.trace == ["begin", "meanwhile", "end"]


async def test_a_sequence_that_ends_while_a_model_drafts_is_no_matter() -> None:
    loop = Loop(Knowing(runs_model=True))
    seqs = [loop.add(0), loop.add(1)]
    for _ in range(2):
        await loop.step()
    await loop.speculator.draft(on_begun=lambda: loop.scheduler.finish(0) and None)
    await loop.finish()
    assert seqs[0].length == 5
    assert seqs[1].tokens == said(seqs[1])


async def test_what_ended_is_forgotten() -> None:
    loop = Loop(Knowing())
    for number in range(200):
        loop.add(number, new=6)
    await loop.finish()
    assert len(loop.drafter.forgotten) > 100
    assert len(set(loop.drafter.forgotten)) == len(loop.drafter.forgotten)


@pytest.mark.parametrize("fails", [False, True])
async def test_ended_sequences_are_forgotten_when_no_drafts_are_requested(fails: bool) -> None:
    loop = Loop(Knowing(), max_batch_size=16)
    for number in range(16):
        loop.add(number, new=200)
    for _ in range(4):
        await loop.step()
    assert loop.drafter.asked
    if fails:
        loop.drafter.errors = [RuntimeError("out of ideas")]
    loop.config.enable_speculative_decoding = fails
    await loop.finish()
    assert loop.drafter.forgotten
    loop.speculator.forget_ended()
    assert sorted(loop.drafter.forgotten) == list(range(16))


def auto_loop(drafter: Knowing, num_streams: int, new: int = 40, **options: Any) -> Loop:
    loop = Loop(drafter, num_blocks=8192, enable_speculative_decoding="auto", max_batch_size=64)
    for number in range(num_streams):
        loop.add(number, new=new, **options)
    return loop


def test_auto_is_the_default() -> None:
    assert EngineConfig().enable_speculative_decoding == "auto"


@pytest.mark.parametrize(("num_streams", "drafts"), [(1, True), (AUTO_MAX_ROWS, True), (AUTO_MAX_ROWS + 1, False)])
async def test_auto_drafts_for_a_few_streams(num_streams: int, drafts: bool) -> None:
    loop = auto_loop(Knowing(), num_streams)
    await loop.finish()
    assert bool(loop.accepted) == bool(loop.drafter.asked) == drafts


async def test_auto_drafts_once_few_streams_are_left() -> None:
    loop = auto_loop(Knowing(), 1, new=100)
    for number in range(1, 8):
        loop.add(number, new=20)
    await loop.finish()
    assert {seq_id for requests in loop.drafter.asked for seq_id, _ in requests} == {0}


async def test_auto_is_off_for_a_model_whose_results_depend_on_the_batch() -> None:
    loop = Loop(Knowing(), is_batch_invariant=False, enable_speculative_decoding="auto")
    loop.add(0)
    await loop.finish()
    assert not loop.drafter.asked


async def test_auto_runs_no_draft_model() -> None:
    loop = auto_loop(Knowing(runs_model=True), 1)
    await loop.finish()
    assert not loop.drafter.asked


async def test_auto_leaves_requests_with_logits_processors_alone() -> None:
    """A caller's processor may count its calls: one per token."""
    loop = auto_loop(Knowing(), 1, logits_processors=[lambda output, logits: logits])
    loop.add(1)
    await loop.finish()
    assert {seq_id for requests in loop.drafter.asked for seq_id, _ in requests} == {1}


@pytest.mark.parametrize("token_s", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("num_streams", [1, 4, 8, 32])
async def test_auto_loses_at_most_three_percent_where_drafts_never_help(num_streams: int, token_s: float) -> None:
    seconds: dict[object, float] = {}
    for setting in ("auto", False):
        drafter = Mistaken()
        loop = drafter.loop = auto_loop(drafter, num_streams, new=600)
        loop.token_s, loop.config.enable_speculative_decoding = token_s, setting
        await loop.finish()
        seconds[setting] = loop.now
        assert loop.accepted == 0
        assert bool(loop.drafter.asked) == (setting == "auto" and num_streams <= AUTO_MAX_ROWS)
    assert seconds["auto"] <= seconds[False] / 0.97


async def test_a_pause_asks_nothing_and_ends_with_a_plain_step() -> None:
    drafter = Mistaken()
    drafter.loop = loop = auto_loop(drafter, 1, new=600)
    asked_at = []
    while loop.scheduler.has_work:
        num_asked = len(drafter.asked)
        await loop.step()
        if len(drafter.asked) > num_asked:
            asked_at.append(loop.steps)
    assert max(later - earlier for earlier, later in pairwise(asked_at)) >= 128
