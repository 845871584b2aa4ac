"""Forks of a running request: where they branch off, what they share and inherit, and when forking is refused."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.api.channel import Channel, RequestStatus
from penstock.api.prompt import PromptInput
from penstock.engine.requests.forking import Fork, check_num_forks, forkable
from penstock.engine.requests.request import Request
from penstock.errors import RequestError
from penstock.sampling import RequestPriority, SamplingParams
from penstock.scheduling.admission import QueuePlace
from tests.unit.engine.loop.test_core import Rig, ending, ids_of


def fork(rig: Rig, origin: str = "a", *, name: str = "f", params: Any = None, **where: Any) -> Channel:
    """Fork a request as a caller's thread would."""
    values = {"index": 0, "at": None, "append": ()} | where
    return branch(rig, Fork(origin, **values), name, params)


def branch(rig: Rig, made: Fork, name: str, params: Any = None) -> Channel:
    place = QueuePlace(name, 3)
    rig.admission.reserve([place])
    request = Request(
        id=name, prompt=PromptInput(token_ids=[]), params=params, channel=Channel(name), arrival=rig.now, place=place
    )
    rig.core.submit([request], fork=made)
    return request.channel


def counting(tokens: Any, index: int) -> int:
    """A model whose next token is the length of the text."""
    return len(tokens)


async def test_a_fork_continues_from_the_generated_tokens() -> None:
    rig = Rig(counting)
    origin = rig.submit(max_tokens=8)
    await rig.steps(3)
    forked = fork(rig)
    await rig.finish()
    assert ids_of(origin) == [3, 4, 5, 6, 7, 8, 9, 10]
    assert forked.prompt_token_ids == [1, 2, 3, 3, 4, 5]
    assert ids_of(forked) == [6, 7, 8, 9, 10], "what was left of max_tokens"
    assert rig.is_clean()


async def test_a_fork_shares_blocks_and_computes_one_token() -> None:
    rig = Rig(counting)
    rig.submit(prompt=tuple(range(1, 20)), max_tokens=8)
    await rig.steps(4)
    used = 32 - rig.cache.num_free_blocks
    fork(rig)
    await rig.steps(1)
    assert [(row.start, row.end) for row in rig.plans[-1].rows] == [(22, 23), (22, 23)]
    assert 32 - rig.cache.num_free_blocks == used + 1, "the partly filled block is copied"


async def test_all_branches_of_a_fork_begin_at_one_point() -> None:
    rig = Rig(counting)
    rig.submit(max_tokens=9)
    await rig.steps(2)
    made = Fork("a", index=0, at=None, append=())
    first = branch(rig, made, "f1")
    await rig.steps(2)
    second = branch(rig, made, "f2")
    assert first.prompt_token_ids == second.prompt_token_ids == [1, 2, 3, 3, 4]


async def test_an_earlier_point_and_appended_tokens() -> None:
    rig = Rig(counting)
    rig.submit(max_tokens=8)
    await rig.steps(4)
    forked = fork(rig, at=1, append=[20, 21])
    await rig.finish()
    assert forked.prompt_token_ids == [1, 2, 3, 3, 20, 21]
    assert ids_of(forked) == [6, 7, 8, 9, 10]


async def test_parameters_of_its_own_count_from_the_fork() -> None:
    rig = Rig(counting)
    rig.submit(max_tokens=8)
    await rig.steps(2)
    forked = fork(rig, params=SamplingParams(max_tokens=2, n=2))
    await rig.finish()
    assert [out.token_ids for out in forked.outcome().outputs] == [[5, 6], [5, 6]]


async def test_samples_differ_by_unique_sample_indices() -> None:
    rig = Rig(lambda tokens, index: index)
    rig.submit(max_tokens=9, n=2, seed=5)
    await rig.steps(1)
    forks = [fork(rig, name=f"f{i}", index=i) for i in range(2)]
    await rig.steps(1)
    grandchild = fork(rig, "f0", name="g")
    await rig.steps(1)
    rows = {row.seq_id: (row.seed, row.sample_index) for row in rig.plans[-1].rows}
    assert sorted(rows.values()) == [(5, index) for index in range(5)]
    await rig.finish()
    assert [forked.prompt_token_ids[3:] for forked in forks] == [[0], [1]]
    assert grandchild.prompt_token_ids[3:] == [0, 2]


async def test_a_fork_inherits_namespace_priority_and_deadline() -> None:
    rig = Rig(counting)
    channel = Channel("a")
    place = QueuePlace("a", 3)
    rig.admission.reserve([place])
    kin = {"priority": RequestPriority.HIGH, "deadline": 50.0, "namespace": "tenant"}
    params = SamplingParams(max_tokens=9)
    prompt = PromptInput(token_ids=[1, 2, 3])
    origin = Request(id="a", prompt=prompt, params=params, channel=channel, arrival=0.0, place=place, **kin)
    rig.core.submit([origin])
    await rig.steps(2)
    fork(rig)
    first, second = rig.scheduler.sequences()
    assert (second.priority, second.deadline, second.namespace) == (first.priority, 50.0, "tenant")
    assert second.parent is first
    assert second.arrival == rig.now
    await rig.finish()


async def test_alike_completions_can_be_forked_by_any_of_their_numbers() -> None:
    rig = Rig(counting)
    rig.submit(max_tokens=4, n=3, temperature=0.0)
    await rig.steps(2)
    forked = fork(rig, index=2)
    missing = fork(rig, index=3, name="g")
    await rig.finish()
    assert ids_of(forked) == [5, 6]
    assert "has no completion 3" in str(ending(missing))


async def test_a_fork_still_runs_when_its_origin_ends_before_it_starts() -> None:
    rig = Rig(counting, max_batch_size=1)
    rig.submit(max_tokens=3)
    await rig.steps(2)
    forked = fork(rig, params=SamplingParams(max_tokens=2))
    await rig.finish()
    assert ids_of(forked) == [5, 6]


async def test_the_fork_reports_what_cannot_be_forked() -> None:
    rig = Rig(counting, max_batch_size=2)
    rig.submit(name="early", max_tokens=3)
    early = fork(rig, "early", name="f1")
    await rig.steps(1)
    rig.submit(name="beams", max_tokens=3, use_beam_search=True, best_of=2, temperature=0.0)
    beams = fork(rig, "beams", name="f2")
    late = fork(rig, "early", name="f3", at=2)
    full = fork(rig, "early", name="f4", append=[1, 1])
    await rig.finish()
    gone = fork(rig, "early", name="f5")
    for forked, says in (
        (early, "has no tokens yet"),
        (beams, "is a beam search"),
        (late, "at=2 exceeds the 1 tokens"),
        (full, "max_tokens of request early leaves no room"),
        (gone, "has ended"),
    ):
        error = ending(forked)
        assert isinstance(error, RequestError)
        assert says in str(error)
    assert rig.is_clean()


async def test_a_completion_that_has_ended_cannot_be_forked_though_its_siblings_run() -> None:
    rig = Rig(lambda tokens, index: 9 if index == 0 else 5)
    rig.submit(max_tokens=5, n=2, stop_token_ids=[9])
    await rig.steps(2)
    ended, runs = fork(rig, index=0), fork(rig, index=1, name="g")
    await rig.finish()
    assert "completion 0 of request a has ended" in str(ending(ended))
    assert ids_of(runs) == [5, 5, 5]


async def test_an_id_in_use_is_refused_for_a_fork_too() -> None:
    rig = Rig(counting)
    origin = rig.submit(max_tokens=5)
    await rig.steps(1)
    twin = fork(rig, name="a")
    await rig.finish()
    assert "already running" in str(ending(twin))
    assert len(ids_of(origin)) == 5


@pytest.mark.parametrize("append", [["a"], [-1], "text"])
def test_what_are_no_token_ids_cannot_be_appended(append: Any) -> None:
    with pytest.raises(RequestError, match=r"append must be a (list|token id)"):
        Fork("a", index=0, at=None, append=append)


def test_errors_that_the_callers_thread_can_detect_are_raised_at_once() -> None:
    channel = Channel("a")
    for known, says in ((None, "has ended"), (channel, "no tokens yet")):
        with pytest.raises(RequestError, match=says):
            forkable(known, "a")
    channel.status = RequestStatus.PROCESSING
    assert forkable(channel, "a") is channel


@pytest.mark.parametrize("token", [30, 31], ids=["an error", "a panic"])
async def test_tokens_that_the_tokenizer_cannot_decode_end_each_fork_and_free_its_place(token: int) -> None:
    """Any error except a `RequestError` left the fork without an end, and its place in the queue was never released."""
    rig = Rig(counting)
    origin = rig.submit(max_tokens=9)
    await rig.steps(2)
    origin.prompt = "abc"  # the text is known, as for a text prompt
    made = Fork("a", index=0, at=None, append=[token])
    forks = [branch(rig, made, name) for name in ("f1", "f2")]
    assert all("could not be turned into text" in str(ending(fork)) for fork in forks)
    await rig.finish()
    assert len(ids_of(origin)) == 9
    assert rig.is_clean()


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ({"at": 1.5}, "at must be a number of tokens"),
        ({"at": "x"}, "at must be"),
        ({"at": -1}, "at must be"),
        ({"index": None}, "index must be the number of a completion"),
        ({"index": True}, "index must be"),
        ({"index": -1}, "index must be"),
        ({"append": 5}, "append must be a list"),
    ],
)
def test_what_makes_no_fork_is_refused_before_anything_is_submitted(where: Any, says: str) -> None:
    """These forks never ended, and their places in the queue were never released."""
    with pytest.raises(RequestError, match=says):
        Fork("a", **{"index": 0, "at": None, "append": (), **where})


@pytest.mark.parametrize("n", [0, -1, 1.5, "x", True, None])
def test_how_many_forks_must_be_a_number(n: Any) -> None:
    with pytest.raises(RequestError, match="n must be an integer >= 1"):
        check_num_forks(n, 10)
