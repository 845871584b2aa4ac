"""The door's counts: who is let in, who gives way to a higher class, and what the refused are advised."""

from __future__ import annotations

import itertools
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.config import EngineConfig
from penstock.errors import EngineOverloaded
from penstock.sampling import RequestPriority
from penstock.scheduling.admission import Admission, QueuePlace

LOW, NORMAL, HIGH, CRITICAL = RequestPriority


class Room:
    """An admission, and places of it by name."""

    def __init__(self, **settings: int) -> None:
        self.config = EngineConfig(**settings)
        self.admission = Admission(self.config)
        self.names = itertools.count()

    def enter(self, num_tokens: int = 1, priority: int = NORMAL, deadline: float = float("inf")) -> QueuePlace:
        """One request comes in, and nobody has to leave."""
        place = QueuePlace(f"r{next(self.names)}", num_tokens, priority, deadline)
        assert self.admission.reserve([place]) == []
        return place

    def displaced(self, num_tokens: int = 1, priority: int = NORMAL, count: int = 1) -> list[str]:
        """So many requests come in; who has to leave."""
        places = [QueuePlace(f"r{next(self.names)}", num_tokens, priority) for _ in range(count)]
        lost = self.admission.reserve(places)
        assert all(place.is_held and not place.is_lost for place in places)
        assert all(place.is_lost and not place.is_held for place in lost)
        return [place.request_id for place in lost]

    @property
    def counts(self) -> tuple[int, int]:
        """Requests and tokens that wait."""
        return self.admission.num_requests, self.admission.num_tokens


def test_a_full_queue_refuses_and_counts_nothing() -> None:
    room = Room(max_queue_size=2)
    first, _ = room.enter(5), room.enter(5)
    with pytest.raises(EngineOverloaded, match="Request queue is full: 2 of 2 requests"):
        room.enter(10)
    assert room.counts == (2, 10)
    room.admission.release(first)
    room.enter(5)


def test_tokens_are_limited_except_for_the_only_one_that_waits() -> None:
    room = Room(max_queued_tokens=100)
    first = room.enter(1000)
    with pytest.raises(EngineOverloaded, match="1000 of 100 prompt tokens"):
        room.enter(1)
    room.admission.adjust(first, 50)
    room.enter(50)
    with pytest.raises(EngineOverloaded):
        room.enter(1)


def test_limits_may_change_while_it_runs() -> None:
    room = Room(max_queue_size=1)
    room.enter()
    with pytest.raises(EngineOverloaded):
        room.enter()
    room.config.max_queue_size = 2
    room.enter()
    assert room.admission.num_requests == 2


def test_a_place_is_given_back_once() -> None:
    room = Room()
    place = room.enter(7)
    room.admission.release(place)
    room.admission.release(place)
    room.admission.adjust(place, 9)
    assert room.counts == (0, 0)


def test_a_higher_class_takes_the_place_of_the_worst_of_the_lowest_class() -> None:
    """With the queue full of LOW, CRITICAL was refused."""
    room = Room(max_queue_size=4)
    room.enter(priority=NORMAL)
    room.enter(priority=LOW, deadline=5.0)  # r1: urgent
    room.enter(priority=LOW)  # r2: older
    room.enter(priority=LOW)  # r3: newest
    assert [room.displaced(priority=CRITICAL) for _ in range(4)] == [["r3"], ["r2"], ["r1"], ["r0"]]
    assert room.counts == (4, 4)
    with pytest.raises(EngineOverloaded):
        room.displaced(priority=CRITICAL)


@pytest.mark.parametrize("priority", [LOW, NORMAL])
def test_an_equal_or_lower_class_displaces_nobody(priority: RequestPriority) -> None:
    room = Room(max_queue_size=1)
    place = room.enter(priority=NORMAL)
    with pytest.raises(EngineOverloaded):
        room.displaced(priority=priority)
    assert place.is_held


def test_several_that_come_together_displace_as_many_or_nobody() -> None:
    room = Room(max_queue_size=3)
    held = [room.enter(priority=priority) for priority in (LOW, HIGH, LOW)]
    with pytest.raises(EngineOverloaded, match="3 of 3 requests"):
        room.displaced(priority=HIGH, count=3)
    assert all(place.is_held for place in held)
    assert room.displaced(priority=HIGH, count=2) == ["r2", "r0"]


def test_tokens_of_lower_classes_give_way_too_and_no_more_than_needed() -> None:
    room = Room(max_queued_tokens=100)
    for priority in (HIGH, LOW, LOW, LOW):
        room.enter(25, priority)
    assert room.displaced(30, NORMAL) == ["r3", "r2"]
    assert room.counts == (3, 80)
    with pytest.raises(EngineOverloaded, match="80 of 100 prompt tokens"):
        room.displaced(50, NORMAL)
    assert room.counts == (3, 80)


def test_whoever_left_or_changed_is_not_displaced_again() -> None:
    room = Room(max_queue_size=2)
    first, second = room.enter(priority=LOW), room.enter(3, priority=LOW)
    room.admission.release(second)
    room.enter(priority=LOW)
    assert room.displaced(priority=HIGH) == ["r2"]
    room.admission.adjust(first, 10)
    assert room.counts == (2, 11)


def advice(room: Room, num_tokens: int = 1) -> EngineOverloaded:
    with pytest.raises(EngineOverloaded) as caught:
        room.enter(num_tokens)
    return caught.value


def test_advice_says_so_when_nothing_is_known_yet() -> None:
    """It said 0.05 s because the first requests had left at once."""
    room = Room(max_queue_size=1)
    room.enter()
    assert "not known yet" in str(advice(room))
    assert advice(room).retry_after_s == 1.0


def test_advice_asks_for_as_many_requests_as_have_to_start() -> None:
    room = Room(max_queue_size=4, max_queued_tokens=100)
    asked: list[tuple[int, float]] = []

    def estimate(num_requests: int, num_tokens: float) -> float:
        asked.append((num_requests, num_tokens))
        return 7.5

    room.admission.estimate_wait = estimate
    for _ in range(4):
        room.enter(20)
    assert advice(room).retry_after_s == 7.5
    assert "Retry in about 7.5 s" in str(advice(room))
    room.config.max_queue_size = 9
    advice(room, 75)  # 55 tokens too many, at 20 a request
    assert asked == [(1, 20.0), (1, 20.0), (3, 60.0)]


def test_counts_survive_many_threads_and_classes() -> None:
    """No overshoot, and nobody lost or counted twice, whoever displaces whom."""
    room, peak = Room(max_queue_size=20, max_queued_tokens=150), [0]
    outcomes: list[tuple[int, int, int]] = []

    def come_and_go(seed: int) -> None:
        entered = refused = lost = 0
        mine: list[QueuePlace] = []
        for turn in range(400):
            place = QueuePlace(f"{seed}-{turn}", 1 + (seed * turn) % 13, 1 + (seed + turn) % 4)
            try:
                lost += len(room.admission.reserve([place]))
                entered += 1
                mine.append(place)
            except EngineOverloaded:
                refused += 1
            peak[0] = max(peak[0], room.admission.num_requests)
            if turn % 3 == 0 and mine:
                room.admission.adjust(mine[-1], 5)
                room.admission.release(mine.pop(0))
        room.admission.release(*mine)
        outcomes.append((entered, refused, lost))

    threads = [threading.Thread(target=come_and_go, args=(seed,)) for seed in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert room.counts == (0, 0)
    assert peak[0] <= 20
    assert len(outcomes) == 6
    assert all(sum(column) for column in zip(*outcomes, strict=True)), "some came in, some were refused, some displaced"


@given(st.lists(st.tuples(st.sampled_from([LOW, NORMAL, HIGH]), st.integers(1, 40), st.booleans()), max_size=60))
def test_the_limits_hold_and_only_lower_classes_pay(arrivals: list[tuple[RequestPriority, int, bool]]) -> None:
    room, held = Room(max_queue_size=6, max_queued_tokens=100), list[QueuePlace]()
    for number, (priority, num_tokens, leaves) in enumerate(arrivals):
        place = QueuePlace(str(number), num_tokens, priority)
        below = [other for other in held if other.priority < priority]
        try:
            lost = room.admission.reserve([place])
        except EngineOverloaded:
            above = [other for other in held if other.priority >= priority]
            tokens = sum(other.num_tokens for other in above)
            assert len(above) == 6 or (above and tokens + num_tokens > 100), "lower classes had room for it"
        else:
            assert set(lost) <= set(below)
            held = [*(other for other in held if other not in lost), place]
        if leaves and held:
            room.admission.release(held.pop(len(held) // 2))
        assert room.counts == (len(held), sum(other.num_tokens for other in held))
        assert len(held) <= 6
        assert len(held) < 2 or room.admission.num_tokens <= 100
