"""Which replica a request goes to, with numbers by hand: blocks of 4 tokens, caches of 10 blocks."""

from __future__ import annotations

import itertools
import math

import pytest

from penstock.scheduling.routing import (
    Candidate,
    Choice,
    KnownPrefixes,
    Pending,
    RoundRobin,
    Router,
    by_load,
    by_prefix,
)

NUMBERS = itertools.count()


def router(replicas: int = 2, capacity: int = 4, choose: Choice = by_prefix, max_blocks: int = 10) -> Router:
    return Router([max_blocks] * replicas, capacity=capacity, block_size=4, boost_s=5.0, choose=choose)


def pending(
    routes: Router,
    tokens: list[int] | None = None,
    *,
    name: str = "",
    priority: int = 1,
    arrival: float = 0.0,
    deadline: float = math.inf,
    width: int = 1,
    namespace: str = "",
) -> Pending:
    number = next(NUMBERS)
    tokens = tokens or [number] * 8
    digests = routes.digests(namespace, "", tokens)
    return Pending(number, name or f"r{number}", priority, arrival, deadline, len(tokens), width, digests)


def assign(routes: Router, *requests: Pending, now: float = 0.0) -> list[tuple[str, int | None]]:
    for request in requests:
        routes.add(request, now)
    return [(request.request_id, request.replica) for request in routes.assign(now)]


def test_requests_without_a_common_prefix_go_to_the_least_loaded() -> None:
    routes = router()
    requests = [pending(routes, name=name) for name in "abcde"]
    assert assign(routes, *requests) == [("a", 0), ("b", 1), ("c", 0), ("d", 1), ("e", 0)]
    routes.end(requests[0])
    routes.end(requests[2])
    assert assign(routes, pending(routes, name="f")) == [("f", 0)]  # 1 against 2


def test_a_request_goes_to_the_replica_with_the_longest_prefix() -> None:
    routes = router()
    short, long = [1] * 8, [1] * 8 + [2] * 8
    assign(routes, pending(routes, short), pending(routes, [9] * 8), pending(routes, long))  # long: replica 0 has half
    request = pending(routes, [*long, 3])
    assert assign(routes, request) == [(request.request_id, 0)]
    assert request.hit_tokens == 16
    assert routes.stats()[0]["expected_hit_tokens"] == 8 + 16


def test_a_prefix_of_less_than_half_of_the_prompt_does_not_count() -> None:
    candidates = [Candidate(0, 1, 4, 5), Candidate(1, 0, 0, 5)]
    assert by_prefix(candidates, 8).number == 0
    assert by_prefix(candidates, 9).number == 1
    assert by_prefix([Candidate(0, 1, 4, 5), Candidate(1, 1, 0, 1)], 9).number == 0  # of equal loads, it does


def test_a_replica_that_is_busier_by_far_is_not_chosen_for_its_prefix() -> None:
    def chosen(busy: int, idle: int) -> int:
        return by_prefix([Candidate(0, busy, 16, 5), Candidate(1, idle, 0, 0)], 16).number

    assert (chosen(8, 0), chosen(9, 0)) == (0, 1)  # at most 8 more,
    assert (chosen(60, 40), chosen(61, 40)) == (0, 1)  # or half as many again
    assert by_prefix([Candidate(0, 9, 16, 5), Candidate(1, 0, 0, 0), Candidate(2, 1, 12, 0)], 16).number == 2


def test_ties_go_to_fewer_prefixes_and_then_to_the_first() -> None:
    assert by_load([Candidate(0, 1, 0, 3), Candidate(1, 1, 0, 2), Candidate(2, 2, 8, 0)], 8).number == 1
    assert by_load([Candidate(1, 1, 0, 2), Candidate(0, 1, 0, 2)], 8).number == 0


def test_round_robin_takes_turns_among_those_with_room() -> None:
    routes = router(3, capacity=2, choose=RoundRobin())
    requests = [pending(routes, [1] * 8, name=name) for name in "abcd"]
    assert [number for _, number in assign(routes, *requests)] == [0, 1, 2, 0]
    assert [number for _, number in assign(routes, pending(routes), pending(routes))] == [1, 2]


def test_requests_wait_while_no_replica_has_room() -> None:
    routes = router(capacity=1)
    requests = [pending(routes, name=name) for name in "abc"]
    assert assign(routes, *requests) == [("a", 0), ("b", 1)]
    assert routes.num_waiting == 1
    routes.end(requests[1])
    assert assign(routes) == [("c", 1)]


def test_samples_count_and_a_request_wider_than_the_room_goes_to_an_idle_replica() -> None:
    routes = router(capacity=4)
    wide, huge, last = pending(routes, width=3), pending(routes, width=9), pending(routes, width=2)
    assert [number for _, number in assign(routes, wide, huge, last)] == [0, 1]
    routes.end(wide)
    assert assign(routes) == [(last.request_id, 0)]


def test_the_best_of_the_queue_goes_first() -> None:
    routes = router(1, capacity=1)
    first = pending(routes, name="first")
    assign(routes, first)
    late = pending(routes, name="late", arrival=1.0)
    urgent = pending(routes, name="urgent", arrival=3.0, deadline=10.0)
    high = pending(routes, name="high", arrival=4.0, priority=2)
    order = []
    last, requests = first, (late, urgent, high)
    for request in requests:
        routes.add(request, 4.0)
    for _ in requests:
        routes.end(last)
        (last,) = routes.assign(4.0)
        order.append(last.request_id)
    assert order == ["high", "urgent", "late"]


def test_waiting_raises_the_class_so_that_nothing_starves() -> None:
    routes = router(1, capacity=1)
    first = pending(routes)
    assign(routes, first)
    low, high = pending(routes, name="low", priority=0), pending(routes, name="high", priority=1, arrival=9.0)
    routes.add(low, 0.0)
    routes.add(high, 9.0)
    routes.end(first)
    assert assign(routes, now=10.0) == [("low", 0)]  # two boosts of 5 s


def test_a_replica_that_failed_gets_nothing_more() -> None:
    routes = router()
    prompt = [1] * 8
    request = pending(routes, prompt)
    assert assign(routes, request) == [(request.request_id, 0)]
    routes.lose(0)
    routes.end(request, has_failed=True)
    assert routes.live == [1]
    assert [number for _, number in assign(routes, *(pending(routes, prompt) for _ in range(3)))] == [1, 1, 1]
    routes.lose(1)
    assert assign(routes, pending(routes)) == []
    assert routes.num_waiting == 1


def test_a_request_that_a_replica_did_not_take_waits_again() -> None:
    routes = router()
    request = pending(routes, name="a")
    assert assign(routes, request) == [("a", 0)]
    routes.lose(0)
    assert assign(routes, request) == [("a", 1)]
    assert [each["load"] for each in routes.stats()] == [0, 1]


def test_a_replica_whose_forward_pass_keeps_failing_is_chosen_last() -> None:
    routes = router(capacity=1)
    for _ in range(3):
        request = pending(routes, [5] * 8)
        assert assign(routes, request) == [(request.request_id, 0)]
        routes.end(request, has_failed=True)
    requests = [pending(routes, [5] * 8) for _ in range(2)]
    assert [number for _, number in assign(routes, *requests)] == [1, 0]  # replica 1 has no room left
    for request in requests:
        routes.end(request)  # aborted, for instance
    requests = [pending(routes, [5] * 8) for _ in range(2)]
    assert [number for _, number in assign(routes, *requests)] == [1, 0]
    routes.end(requests[0])
    routes.end(requests[1], has_failed=False)
    assert [number for _, number in assign(routes, pending(routes, [5] * 8))] == [0]  # it works again


def test_namespaces_and_forgotten_prefixes_are_not_found() -> None:
    routes = router()
    prompt = [1] * 8
    assign(routes, pending(routes, prompt, namespace="a"))
    other = pending(routes, prompt, namespace="b")
    assert assign(routes, other) == [(other.request_id, 1)]
    routes.forget_prefixes()
    again = pending(routes, prompt, namespace="a")
    assign(routes, again)
    assert again.hit_tokens == 0


@pytest.mark.parametrize(("of_running", "num_hits"), [(False, 8), (True, 0)])
def test_what_a_request_computes_across_a_reset_is_found_by_nobody(of_running: bool, num_hits: int) -> None:
    """The prefixes of a request that ended beside a reset were expected again, and drew requests to its replica."""
    routes = router()
    request = pending(routes, [1] * 8)
    assign(routes, request)
    routes.forget_prefixes(of_running=of_running)
    routes.end(request, digests=request.digests)
    following = pending(routes, [1] * 9)
    assign(routes, following)
    assert following.hit_tokens == num_hits
    routes.end(following, digests=following.digests)
    last = pending(routes, [1] * 9)
    assign(routes, last)
    assert last.hit_tokens == 8


def test_outputs_belong_to_the_prefix_of_the_next_turn() -> None:
    routes = router()
    request, turn = pending(routes, [1] * 8), [1] * 8 + [2] * 8
    assign(routes, request)
    routes.end(request, digests=routes.digests("", "", turn))
    following = pending(routes, [*turn, 3])
    assign(routes, following)
    assert following.hit_tokens == 16


def test_prefixes_are_forgotten_from_the_end_of_the_least_recently_used() -> None:
    prefixes = KnownPrefixes(3)
    prefixes.add([b"a1", b"a2"])
    prefixes.add([b"b1", b"b2"])
    assert len(prefixes) == 3
    assert (prefixes.match([b"a1", b"a2"]), prefixes.match([b"b1", b"b2"])) == (1, 2)
    prefixes.add([b"a1"])
    prefixes.add([b"c1", b"c2"])
    assert [prefixes.match([key]) for key in (b"a1", b"b1", b"b2", b"c1", b"c2")] == [1, 0, 0, 1, 1]


def test_a_replica_without_a_cache_knows_no_prefix() -> None:
    routes = router(max_blocks=0)
    assign(routes, pending(routes, [1] * 8), pending(routes, [2] * 8))
    request = pending(routes, [1] * 8)
    assign(routes, request)
    assert request.hit_tokens == 0


@pytest.mark.parametrize(("length", "num_blocks"), [(1, 0), (3, 0), (4, 1), (7, 1), (8, 2)])
def test_only_full_blocks_have_digests(length: int, num_blocks: int) -> None:
    assert len(router().digests("", "", [1] * length)) == num_blocks
