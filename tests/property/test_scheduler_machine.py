"""The scheduler and the cache against a model of what every K/V slot holds, under random traffic and faults."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.cache.manager import CacheManager
from penstock.config import EngineConfig
from penstock.errors import RequestTooLarge
from penstock.optimizers.beam_search import BeamSearch
from penstock.sampling import RequestPriority, SamplingParams
from penstock.scheduling.scheduler import Scheduler
from penstock.scheduling.searches import Beams
from penstock.scores import Score, ScorePart
from penstock.scoring import ScoringParams
from penstock.sequence import FinishReason, Sequence, Status
from penstock.step import Event, Row, RowResult, StepPlan, StepResult, TokenLogprobs
from tests.unit.scheduling.slots import Slots

Choose = Callable[[Any], Any]  # one of a sequence of options

STOP_TOKEN = 9
tokens_of = st.lists(st.integers(0, 2), min_size=1, max_size=24)
# Few distinct starts, so that prefixes are shared often.
starts = st.sampled_from([[], [0] * 8, [1] * 16, [0, 1, 2] * 5])


class Model(RuleBasedStateMachine):
    """Plays the engine and the executor."""

    @initialize(
        num_blocks=st.one_of(st.integers(4, 12), st.integers(4, 64)),
        block_size=st.integers(1, 8),
        batch=st.integers(1, 6),
        budget=st.integers(1, 40),
        caching=st.booleans(),
        max_cached=st.one_of(st.none(), st.integers(1, 6)),
        logit_rows=st.one_of(st.none(), st.integers(1, 12)),
        places=st.one_of(st.just(0), st.integers(1, 4), st.integers(1, 40)),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        batch: int,
        budget: int,
        caching: bool,
        max_cached: int | None,
        logit_rows: int | None,
        places: int = 0,
    ) -> None:
        self.config = EngineConfig(max_batch_size=batch, max_num_batched_tokens=budget, priority_boost_threshold=2.0)
        self.cache = CacheManager(
            num_blocks,
            block_size,
            enable_prefix_caching=caching,
            max_cached_blocks=max_cached,
            num_host_blocks=places,
        )
        self.scheduler = Scheduler(self.config, self.cache, max_logit_rows=logit_rows)
        self.caching, self.logit_rows = caching, logit_rows
        self.slots = Slots(block_size, places)
        self.now, self.version, self.next_id = 0.0, 0, 0
        self.plan: StepPlan | None = None
        self.born: dict[int, Sequence] = {}
        self.reported: dict[int, list[int]] = {}
        self.scored: dict[int, list[int]] = {}
        self.ended: dict[int, FinishReason] = {}
        self.started: list[int] = []
        self.oldest_version: dict[int, int] = {}
        self.beams: dict[int, Beams] = {}
        self.is_holding, self.admitted = False, set[int]()

    @rule(
        start=starts,
        suffix=tokens_of,
        namespace=st.sampled_from(["", "tenant"]),
        n=st.integers(1, 3),
        priority=st.sampled_from(RequestPriority),
        new=st.integers(1, 12),
        deadline=st.sampled_from([math.inf, math.inf, 3.0, 20.0]),
        ttft=st.sampled_from([math.inf, math.inf, math.inf, 2.0]),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
    )
    def add(
        self,
        start: list[int],
        suffix: list[int],
        namespace: str,
        n: int,
        priority: RequestPriority,
        new: int,
        deadline: float,
        ttft: float,
        prompt_logprobs: int | None,
    ) -> None:
        prompt, first = start + suffix, None
        params = SamplingParams(n=n, max_tokens=new, prompt_logprobs=prompt_logprobs)
        for index in range(n):
            seq = self.sequence(
                prompt,
                params,
                new,
                request_id=str(self.next_id - index),
                sample_index=index,
                priority=priority,
                arrival=self.now,
                deadline=self.now + deadline,
                ttft_deadline=self.now + ttft,
                namespace=namespace,
                parent=first,
            )
            first = first or seq
            self.add_one(seq)

    @rule(
        start=starts,
        suffix=tokens_of,
        num_scored=st.integers(1, 24),
        namespace=st.sampled_from(["", "tenant"]),
        priority=st.sampled_from(RequestPriority),
        deadline=st.sampled_from([math.inf, math.inf, 3.0, 20.0]),
    )
    def score(
        self,
        start: list[int],
        suffix: list[int],
        num_scored: int,
        namespace: str,
        priority: RequestPriority,
        deadline: float,
    ) -> None:
        params = ScoringParams(num_scored=min(num_scored, len(start) + len(suffix)))
        fields = {"request_id": str(self.next_id), "namespace": namespace, "priority": priority, "arrival": self.now}
        self.add_one(self.sequence([2, *start, *suffix], params, 0, deadline=self.now + deadline, **fields))

    def add_one(self, seq: Sequence) -> None:
        try:
            self.scheduler.add(seq, self.now)
        except RequestTooLarge:
            assert seq.max_len > self.cache.capacity
            return
        self.bear(seq)

    def bear(self, seq: Sequence) -> None:
        self.born[seq.id], self.reported[seq.id], self.scored[seq.id] = seq, [], []

    @precondition(lambda self: self.scheduler.has_work)
    @rule(
        which=st.integers(0, 50),
        at=st.integers(0, 12),
        extra=st.lists(st.integers(0, 2), max_size=5),
        new=st.integers(1, 12),
    )
    def fork(self, which: int, at: int, extra: list[int], new: int) -> None:
        """Another request goes on from what one has output until now, or from earlier."""
        live = list(self.scheduler.sequences())
        parent = live[which % len(live)]
        if not parent.num_generated or parent.id in self.beams:
            return
        prompt = parent.tokens[: parent.prompt_len + min(at, parent.num_generated)] + extra
        fields = {"request_id": str(self.next_id), "namespace": parent.namespace, "parent": parent, "arrival": self.now}
        params = SamplingParams(max_tokens=new)
        self.add_one(self.sequence(prompt, params, new, **fields))

    @rule(
        start=starts,
        suffix=tokens_of,
        width=st.integers(2, 4),
        new=st.integers(1, 12),
        early_stopping=st.sampled_from([True, False, "never"]),
        length_penalty=st.sampled_from([0.0, 1.0, 2.0, -1.0]),
        deadline=st.sampled_from([math.inf, math.inf, 3.0, 20.0]),
    )
    def add_beams(
        self,
        start: list[int],
        suffix: list[int],
        width: int,
        new: int,
        early_stopping: bool | str,
        length_penalty: float,
        deadline: float,
    ) -> None:
        choices = {"early_stopping": early_stopping, "length_penalty": length_penalty, "temperature": 0.0}
        params = SamplingParams(use_beam_search=True, best_of=width, max_tokens=new, **choices)
        fields = {"request_id": str(self.next_id), "deadline": self.now + deadline, "arrival": self.now}
        members = [self.sequence(start + suffix, params, new, **fields)]
        members += [self.sequence(start + suffix, params, new, **fields, parent=members[0]) for _ in range(width - 1)]
        beams = Beams(BeamSearch(params, new, members[0].stop_ids), members)
        try:
            self.scheduler.search(beams, self.now)
        except RequestTooLarge:
            return
        for seq in members:
            self.bear(seq)
            self.beams[seq.id] = beams

    def sequence(self, tokens: list[int], params: SamplingParams, new: int, **fields: Any) -> Sequence:
        self.next_id += 1
        stops, length = frozenset([STOP_TOKEN]), len(tokens) + new
        return Sequence(
            id=self.next_id - 1, tokens=list(tokens), params=params, max_len=length, stop_ids=stops, **fields
        )

    @precondition(lambda self: self.scheduler.has_work)
    @rule(which=st.integers(0, 50), reason=st.sampled_from([FinishReason.ABORT, FinishReason.STOP]))
    def end_from_outside(self, which: int, reason: FinishReason) -> None:
        live = list(self.scheduler.sequences())
        self.take(self.scheduler.finish(live[which % len(live)].id, reason))

    @rule(seconds=st.floats(0.0, 4.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.take(self.scheduler.expire(self.now))

    @rule(batch=st.integers(1, 6))
    def resize_the_batch(self, batch: int) -> None:
        self.config.max_batch_size = batch

    @precondition(lambda self: self.plan is None)
    @rule(is_told=st.booleans())
    def new_weights(self, is_told: bool) -> None:
        self.version += 1
        self.cache.reset(weight_version=self.version if is_told else None)

    @rule()
    def drop_unused(self) -> None:
        self.cache.drop_unused()
        stats = self.cache.stats()
        assert stats["num_host_entries"] == 0
        blocks, places = self.cache.unused()
        assert len(blocks) == self.cache.num_free_blocks
        assert len(set(places)) == len(places) <= stats["num_host_blocks"]

    @precondition(lambda self: self.plan is None and self.scheduler.has_work)
    @rule(which=st.integers(0, 50), draft=st.lists(st.integers(0, 2), max_size=6))
    def offer(self, which: int, draft: list[int]) -> None:
        """What is offered stays until the next step, whatever happens before it."""
        live = list(self.scheduler.sequences())
        seq = live[which % len(live)]
        before = seq.draft
        self.scheduler.offer(seq.id, draft)
        if seq in self.scheduler.decoding():
            assert seq.draft == tuple(draft[: len(seq.draft)])
        else:
            assert seq.draft == before

    @precondition(lambda self: self.plan is None)
    @rule()
    def make_plan(self) -> None:
        had_work = self.scheduler.has_work
        if self.is_holding:
            had_work = any(seq.id in self.admitted for seq in self.scheduler.sequences())
            assert had_work == (not self.scheduler.is_drained)
        running = [seq for seq in self.scheduler.sequences() if seq.status is Status.RUNNING]
        decoding = [seq for seq in running if seq.computed + 1 == seq.length]
        plan = self.scheduler.plan(self.now)
        self.started += [seq.id for seq in self.scheduler.take_started()]
        assert bool(plan.rows) == had_work, "a plan must make progress whenever there is work"
        if self.is_holding:
            assert {row.seq_id for row in plan.rows} <= self.admitted
        self.check_budget(plan)
        self.check_decodes(plan, decoding)
        for seq in self.scheduler.sequences():
            if seq.status is Status.RUNNING and seq not in running:
                self.oldest_version[seq.id] = self.version
        self.plan = plan if plan.rows else None

    def check_budget(self, plan: StepPlan) -> None:
        assert plan.num_tokens <= self.config.max_num_batched_tokens
        assert len(plan.rows) <= self.config.max_batch_size
        assert len({row.seq_id for row in plan.rows}) == len(plan.rows)
        logit_rows = 0
        for row in plan.rows:
            assert row.num_tokens > 0
            assert row.end <= self.born[row.seq_id].max_len
            assert row.samples == (row.end >= len(row.tokens) and row.params.generates)
            scored = self.born[row.seq_id].scored
            assert [*row.scored] == [p for p in scored if row.start < p <= row.end]
            assert row.end == len(row.tokens) + len(row.draft) or (not row.draft and row.end <= len(row.tokens))
            assert not row.draft or not (row.siblings or row.params.use_beam_search)
            logit_rows += len(row.scored) + row.samples * (1 + len(row.draft))
        assert self.logit_rows is None or logit_rows <= self.logit_rows

    def check_decodes(self, plan: StepPlan, decoding: list[Sequence]) -> None:
        places = min(self.config.max_num_batched_tokens, self.config.max_batch_size, self.logit_rows or math.inf)
        planned = {row.seq_id for row in plan.rows}
        if len(decoding) <= places and self.scheduler.num_running <= self.config.max_batch_size:
            assert all(seq.id in planned for seq in decoding if seq.status is Status.RUNNING), "a decode was starved"

    @precondition(lambda self: self.plan is not None)
    @rule(data=st.data())
    def commit(self, data: Any) -> None:
        self.execute(data.draw(st.randoms(use_true_random=False)).choice)

    @precondition(lambda self: self.plan is None and self.scheduler.has_work)
    @rule(rng=st.randoms(use_true_random=False), count=st.integers(1, 8))
    def run_steps(self, rng: random.Random, count: int) -> None:
        for _ in range(count):
            for seq in self.scheduler.sequences():
                if rng.random() < 0.5:
                    self.scheduler.offer(seq.id, [rng.randrange(3) for _ in range(rng.randint(1, 5))])
            self.now += 0.1
            self.make_plan()
            if self.plan is not None:
                self.execute(rng.choice)
            self.blocks_are_conserved()

    def execute(self, choose: Choose) -> None:
        plan = self.take_plan()
        self.slots.move(plan)
        self.slots.copy(plan.copies)
        self.slots.write(plan, self.scope, self.version)
        for row in plan.rows:
            self.slots.check(row, self.scope(row), self.oldest(row.seq_id))
        results = tuple(self.result_of(row, choose) for row in plan.rows)
        # Most of the time, moving looks cheaper than computing.
        timings = {"swap": choose([0.0] * 9 + [9.0]), "forward": 1.0}
        self.take(self.scheduler.commit(plan, StepResult(results, self.version, timings)))

    def scope(self, row: Row) -> str:
        """Who may share with this row."""
        seq = self.born[row.seq_id]
        while seq.parent is not None and not self.caching:
            seq = seq.parent
        return seq.namespace if self.caching else seq.request_id

    def oldest(self, seq_id: int) -> int:
        """The oldest weights that its K/V may come from; beams take each other's."""
        members = self.beams[seq_id].members if seq_id in self.beams else [self.born[seq_id]]
        return min(self.oldest_version.get(seq.id, self.version) for seq in members)

    def result_of(self, row: Row, choose: Choose) -> RowResult:
        siblings = tuple(self.result_of(sibling, choose) for sibling in row.siblings)
        if choose([False] * 19 + [True]):
            return RowResult(error=RuntimeError("a logits processor raised"), siblings=siblings)
        if isinstance(row.params, ScoringParams):
            begin = row.scored.start - self.born[row.seq_id].scored.start
            return RowResult(scores=ScorePart(begin, Score([*row.scored])) if row.scored else None)
        scores = tuple(TokenLogprobs(position, 0.0, 0.0) for position in row.scored)
        if not row.samples:
            return RowResult(prompt_logprobs=scores)
        if row.params.use_beam_search:
            return RowResult(candidates=self.candidates(choose))
        accepted = choose(range(len(row.draft) + 1))
        tokens = (*row.draft[:accepted], choose([0, 0, 1, 2, STOP_TOKEN]))
        return RowResult(tokens, prompt_logprobs=scores, siblings=siblings)

    def candidates(self, choose: Choose) -> tuple[TokenLogprobs, ...]:
        tokens = [token for token in (0, 1, 2, STOP_TOKEN) if choose([True, True, False])] or [1]
        scores = sorted((choose([-0.5, -1.0, -2.0]) for _ in tokens), reverse=True)
        return tuple(TokenLogprobs(token, score, score) for token, score in zip(tokens, scores, strict=True))

    @precondition(lambda self: self.plan is not None)
    @rule()
    def fail(self) -> None:
        plan = self.take_plan()
        self.slots.spoil(plan)
        events = self.scheduler.fail(plan, RuntimeError("the forward pass failed"))
        assert [event.seq_id for event in events][: len(plan.rows)] == [row.seq_id for row in plan.rows]
        self.take(events)

    @precondition(lambda self: self.plan is not None)
    @rule()
    def restart(self) -> None:
        plan = self.take_plan()
        self.slots.spoil(plan)
        self.version += 1
        self.take(self.scheduler.restart(plan))
        self.check_recomputation()

    @precondition(lambda self: self.plan is None)
    @rule()
    def update_weights(self) -> None:
        """Between two steps, and every sequence is computed again."""
        self.version += 1
        self.scheduler.recompute(self.version)
        self.check_recomputation()

    def check_recomputation(self) -> None:
        assert not any(seq.blocks or seq.computed for seq in self.scheduler.sequences())
        for seq in self.scheduler.sequences():
            self.oldest_version[seq.id] = self.version
            if not seq.num_generated:
                self.scored[seq.id].clear()  # its prompt logprobs come from one version of the weights

    @precondition(lambda self: self.plan is None)
    @rule()
    def update_weights_and_keep(self) -> None:
        """Between two steps, and running sequences go on with the K/V that they have, but for those that score."""
        self.version += 1
        live = self.scheduler.sequences()
        running = {seq.id for seq in live if seq.status is Status.RUNNING and (seq.num_generated or not seq.scored)}
        assert set(self.scheduler.keep_stale(self.version)) == running
        for seq in live:
            if not seq.num_generated:
                self.scored[seq.id].clear()

    @precondition(lambda self: not self.is_holding)
    @rule(seed=st.integers(0, 50))
    def hold(self, seed: int) -> None:
        """Only the sequences of requests that have started, and of a few others, may start from now on."""
        rng = random.Random(seed)
        live = self.scheduler.sequences()
        lucky = {seq.request_id: rng.random() < 0.3 for seq in live}
        lucky |= dict.fromkeys((seq.request_id for seq in live if seq.id in self.started), True)
        admitted = [seq.id for seq in live if seq.id in self.beams or lucky[seq.request_id]]
        self.scheduler.hold(admitted)
        self.is_holding, self.admitted = True, set(admitted)

    @precondition(lambda self: self.is_holding)
    @rule()
    def release_held(self) -> None:
        self.scheduler.release_held()
        self.is_holding = False

    def take_plan(self) -> StepPlan:
        plan, self.plan = self.plan, None
        assert plan is not None
        return plan

    def take(self, events: list[Event]) -> None:
        for event in events:
            assert event.seq_id not in self.ended, "news after the terminal event"
            assert event.reason or event.tokens or event.prompt_logprobs or event.scores
            if event.scores is not None:
                del self.scored[event.seq_id][event.scores.begin :]
                self.scored[event.seq_id] += event.scores.score.logprobs
            self.reported[event.seq_id] += event.tokens
            self.scored[event.seq_id] += [score.token for score in event.prompt_logprobs]
            if event.reason is not None:
                self.ended[event.seq_id] = event.reason
                self.check_end(self.born[event.seq_id])

    def check_end(self, seq: Sequence) -> None:
        assert (seq.status, seq.reason) == (Status.FINISHED, self.ended[seq.id])
        assert not seq.blocks
        assert not seq.draft
        assert not seq.in_flight
        output = seq.tokens[seq.prompt_len :]
        reported = self.reported[seq.id]
        assert reported == output or (seq.id in self.beams and not reported), "a beam tells all or nothing"
        assert seq.length <= seq.max_len
        assert self.scored[seq.id] == [*seq.scored][: len(self.scored[seq.id])]
        if not seq.params.generates and seq.computed == seq.length:
            assert len(self.scored[seq.id]) == len(seq.scored)
        if seq.reason is FinishReason.LENGTH:
            assert seq.length == seq.max_len
            assert seq.params.prompt_logprobs is None or len(self.scored[seq.id]) == seq.prompt_len - 1

    @invariant()
    def blocks_are_conserved(self) -> None:
        if hasattr(self, "cache"):
            self.cache.check(self.scheduler.sequences())
            assert set(self.born) - set(self.ended) == {seq.id for seq in self.scheduler.sequences()}
            assert self.scheduler.num_running + self.scheduler.num_waiting == len(self.born) - len(self.ended)
            assert len(set(self.started)) == len(self.started)

    def teardown(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.scheduler.release_held()
        self.is_holding = False
        max_steps = 20 + 40 * sum(seq.max_len for seq in self.scheduler.sequences())
        while self.scheduler.has_work and max_steps:
            if self.plan is None:
                self.make_plan()
            self.execute(lambda options: options[0])
            self.blocks_are_conserved()
            max_steps -= 1
        assert not self.scheduler.has_work, "it never ends"
        assert self.cache.num_free_blocks == self.cache.num_blocks
        assert set(self.ended) == set(self.born)
        assert self.scheduler.next_deadline == math.inf


TestScheduler = Model.TestCase
TestScheduler.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def burst(model: Model, rng: random.Random) -> None:
    """Add requests at random, most of them alike."""
    for _ in range(rng.randint(1, 5)):
        model.add(
            start=rng.choice([[], [0] * 8, [0] * 8, [0, 1, 2] * 5, [2, 1, 0, 0] * 7]),
            suffix=[rng.randrange(3) for _ in range(rng.randint(1, 12))],
            namespace=rng.choice(["", "", "", "tenant"]),
            n=rng.choice([1, 1, 2, 4]),
            priority=rng.choice(list(RequestPriority)),
            new=rng.randint(1, 20),
            deadline=rng.choice([math.inf] * 5 + [5.0]),
            ttft=rng.choice([math.inf] * 9 + [2.0]),
            prompt_logprobs=rng.choice([None] * 5 + [0]),
        )
    for _ in range(rng.randint(0, 2)):
        model.score(
            start=rng.choice([[], [0] * 8, [0, 1, 2] * 5]),
            suffix=[rng.randrange(3) for _ in range(rng.randint(1, 12))],
            num_scored=rng.randint(1, 20),
            namespace=rng.choice(["", "", "tenant"]),
            priority=rng.choice(list(RequestPriority)),
            deadline=rng.choice([math.inf] * 5 + [5.0]),
        )
    for _ in range(rng.randint(0, 2)):
        model.add_beams(
            start=rng.choice([[], [0] * 8, [0, 1, 2] * 5]),
            suffix=[rng.randrange(3) for _ in range(rng.randint(1, 12))],
            width=rng.randint(2, 4),
            new=rng.randint(1, 20),
            early_stopping=rng.choice([True, False, "never"]),
            length_penalty=rng.choice([0.0, 1.0, 2.0]),
            deadline=rng.choice([math.inf] * 5 + [5.0]),
        )
    for _ in range(rng.randint(0, 3) if model.scheduler.has_work else 0):
        model.fork(which=rng.randrange(50), at=rng.randrange(12), extra=[0] * rng.randint(0, 3), new=rng.randint(1, 20))


@pytest.mark.parametrize("seed", range(40))
def test_crowds_share_and_preempt_without_harm(seed: int) -> None:
    """Denser traffic than the machine comes up with: full batches, scarce blocks, many siblings."""
    rng, model = random.Random(seed), Model()
    model.start(
        num_blocks=rng.randint(12, 40),
        block_size=rng.randint(1, 6),
        batch=rng.randint(3, 10),
        budget=rng.randint(4, 60),
        caching=rng.random() < 0.8,
        max_cached=rng.choice([None, None, 2]),
        logit_rows=rng.choice([None, None, 12]),
        places=rng.choice([0, 2, 10, 60]),
    )
    for _ in range(12):
        burst(model, rng)
        model.run_steps(rng, rng.randint(1, 12))
        model.make_plan()
        if model.plan is not None:
            for _ in range(rng.choice([0, 0, 1])):
                model.end_from_outside(rng.randrange(50), FinishReason.ABORT)
            model.time_passes(rng.random())
            rng.choice([model.fail, model.restart])() if rng.random() < 0.2 else model.execute(rng.choice)
        if rng.random() < 0.1:
            model.new_weights(rng.random() < 0.5)
    model.teardown()
