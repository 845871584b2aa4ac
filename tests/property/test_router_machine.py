"""Random arrivals, ends, aborts and failures: the router loses no request, exceeds no bound and starves nothing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.scheduling.policy import AgingPolicy
from penstock.scheduling.routing import Choice, Pending, RoundRobin, Router, by_load, by_prefix

BLOCK, CAPACITY, BOOST_S, MAX_BLOCKS = 2, 4, 5.0, 6
INDICES = st.integers(0, 1000)


class RouterMachine(RuleBasedStateMachine):
    """The model: which requests wait, which replica has which, and which replicas are live."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = AgingPolicy(BOOST_S)
        self.waiting: list[Pending] = []
        self.running: list[tuple[Pending, int]] = []
        self.live = {0, 1, 2}
        self.now = 0.0
        self.numbers = itertools.count()

    @initialize(choose=st.sampled_from([lambda: by_prefix, lambda: by_load, RoundRobin]))
    def start(self, choose: Callable[[], Choice]) -> None:
        sizes = {"capacity": CAPACITY, "block_size": BLOCK}
        self.router = Router([MAX_BLOCKS] * 3, **sizes, boost_s=BOOST_S, choose=choose())

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9),
        priority=st.integers(0, 3),
        deadline=st.sampled_from([math.inf, 50.0, 100.0]),
        width=st.integers(1, CAPACITY + 2),
    )
    def arrive(self, tokens: list[int], priority: int, deadline: float, width: int) -> None:
        number = next(self.numbers)
        request = Pending(
            *(number, f"r{number}", priority, self.now, deadline),
            length=len(tokens),
            width=width,
            digests=self.router.digests("", "", tokens),
        )
        self.router.add(request, self.now)
        self.waiting.append(request)

    @rule()
    def assign(self) -> None:
        before = {number: self.load(number) for number in self.live}
        for request in self.router.assign(self.now):
            best = min(self.waiting, key=lambda each: self.policy.waiting_key(each, self.now))
            assert request is best, "a worse request went first"
            number = request.replica
            assert number in self.live
            assert before[number] == 0 or before[number] + request.width <= CAPACITY
            before[number] += request.width
            self.waiting.remove(request)
            self.running.append((request, number))
        if self.waiting:
            best = min(self.waiting, key=lambda each: self.policy.waiting_key(each, self.now))
            assert all(load and load + best.width > CAPACITY for load in before.values()), "there was room"

    @precondition(lambda self: self.running)
    @rule(index=INDICES, has_failed=st.none() | st.booleans(), output=st.lists(st.integers(0, 1), max_size=4))
    def end(self, index: int, has_failed: bool | None, output: list[int]) -> None:
        request, _ = self.running.pop(index % len(self.running))
        self.router.end(request, digests=self.router.digests("", "", output), has_failed=has_failed)
        assert request.replica is None

    @precondition(lambda self: self.running)
    @rule(index=INDICES)
    def come_back(self, index: int) -> None:
        request, _ = self.running.pop(index % len(self.running))
        self.router.add(request, self.now)
        self.waiting.append(request)

    @precondition(lambda self: self.waiting)
    @rule(index=INDICES)
    def leave(self, index: int) -> None:
        self.router.remove(self.waiting.pop(index % len(self.waiting)))

    @rule(number=st.integers(0, 2))
    def lose(self, number: int) -> None:
        self.router.lose(number)
        self.live.discard(number)

    @rule(seconds=st.floats(0, 7))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(of_running=st.booleans())
    def forget(self, of_running: bool) -> None:
        self.router.forget_prefixes(of_running=of_running)

    @invariant()
    def the_router_knows_what_there_is(self) -> None:
        assert self.router.live == sorted(self.live)
        assert self.router.num_waiting == len(self.waiting)
        stats = self.router.stats()
        assert [replica["load"] for replica in stats] == [self.load(number) for number in range(3)]
        assert all(replica["num_prefix_blocks"] <= MAX_BLOCKS for replica in stats)
        assert all(replica["expected_hit_tokens"] <= replica["prompt_tokens"] for replica in stats)

    def teardown(self) -> None:
        """With newcomers of the highest class at every turn, everything that waits has its own."""
        old = list(self.waiting) if self.live else []
        while self.running:
            self.end(0, False, [])
        for _ in range(3 * len(old)):
            self.arrive([0], 3, math.inf, 1)
            self.now += BOOST_S
            self.assign()
            while self.running:
                self.end(0, False, [])
        assert not any(request in self.waiting for request in old), "a request starved"

    def load(self, number: int) -> int:
        return sum(request.width for request, replica in self.running if replica == number)


TestRouterMachine = RouterMachine.TestCase
TestRouterMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
