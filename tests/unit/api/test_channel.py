"""The channel between the engine's thread and a reader: merging, one call per loop, one terminal event."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from penstock.api import channel as channel_module
from penstock.api.channel import Channel, RequestStatus
from penstock.api.transcript import Transcript
from penstock.api.waiting import Wakeups
from penstock.errors import ExecutionError
from penstock.outputs import CompletionOutput, Delta, Logprob, RequestOutput

COMPLETED = RequestStatus.COMPLETED
OUTPUT = RequestOutput("a", None, [1], [CompletionOutput()], True)


def written(token: int, index: int = 0) -> Transcript:
    """A transcript that holds one token."""
    transcript = Transcript("a", index, [])
    write(transcript, token)
    return transcript


def write(transcript: Transcript, token: int) -> None:
    """Add one token."""
    assert transcript.logprobs is not None
    transcript.add(f"<{token}>", (token,), (-0.5,), (-0.5,))
    transcript.logprobs.append({token: Logprob(-0.5, 1)})


def delta(token: int, index: int = 0) -> Delta:
    """What a reader receives for `written`."""
    return Delta("a", index, f"<{token}>", (token,), ({token: Logprob(-0.5, 1)},), (-0.5,), weight_versions=(0,))


def put(channel: Channel, *transcripts: Transcript) -> None:
    """Publish as the engine does in one step."""
    wakeups = Wakeups()
    for one in transcripts:
        channel.put(one, wakeups)
    wakeups.send()


def end(channel: Channel, error: BaseException | None = None) -> None:
    """Send the terminal event."""
    wakeups = Wakeups()
    channel.end(RequestStatus.FAILED if error else COMPLETED, None if error else OUTPUT, error, wakeups)
    wakeups.send()


class CountingLoop:
    """A loop that only counts calls from other threads."""

    def __init__(self) -> None:
        self.hops = 0

    def call_soon_threadsafe(self, function: Any, *args: Any) -> None:
        """Count."""
        self.hops += 1


class ClosedLoop:
    """A loop whose program has ended."""

    def call_soon_threadsafe(self, function: Any, *args: Any) -> None:
        """Raise the same error as asyncio."""
        raise RuntimeError("Event loop is closed")


def waiter_of(loop: Any) -> Any:
    """A future that belongs to that loop."""
    return SimpleNamespace(get_loop=lambda: loop, done=lambda: False)


async def test_single_delta_arrives_as_it_is() -> None:
    channel = Channel("a")
    put(channel, written(1))
    assert await channel.take() == delta(1)


async def test_untaken_deltas_merge_into_one() -> None:
    channel, transcript = Channel("a"), written(1)
    put(channel, transcript)
    write(transcript, 2)
    put(channel, transcript)
    write(transcript, 3)
    transcript.end("!", "stop", "!")
    put(channel, transcript)
    merged = await channel.take()
    assert merged is not None
    assert (merged.text, merged.token_ids) == ("<1><2><3>!", (1, 2, 3))
    assert merged.token_logprobs == (-0.5,) * 3
    assert [min(entry) for entry in merged.logprobs] == [1, 2, 3]
    assert (merged.finish_reason, merged.stop_reason) == ("stop", "!")


async def test_what_is_written_but_not_put_is_not_taken() -> None:
    channel, transcript = Channel("a"), written(1)
    put(channel, transcript)
    write(transcript, 2)
    transcript.end("", "stop")
    assert await channel.take() == delta(1)
    put(channel, transcript)
    last = await channel.take()
    assert last is not None
    assert (last.token_ids, last.finish_reason) == ((2,), "stop")


async def test_completions_never_merge_with_each_other() -> None:
    channel, one, other = Channel("a"), written(1, 0), written(2, 1)
    put(channel, one, other)
    write(one, 3)
    put(channel, one)
    first, second = await channel.take(), await channel.take()
    assert first is not None
    assert second is not None
    assert (first.index, first.token_ids) == (0, (1, 3))
    assert (second.index, second.token_ids) == (1, (2,))


async def test_last_deltas_are_taken_before_the_end() -> None:
    channel = Channel("a")
    put(channel, written(1))
    end(channel)
    assert (await channel.take()) == delta(1)
    assert await channel.take() is None
    assert await channel.wait() is OUTPUT


async def test_last_deltas_are_taken_before_the_error_is_raised() -> None:
    channel = Channel("a")
    put(channel, written(1))
    end(channel, ExecutionError("boom"))
    assert await channel.take() == delta(1)
    with pytest.raises(ExecutionError):
        await channel.take()
    with pytest.raises(ExecutionError):
        await channel.wait()
    with pytest.raises(ExecutionError):
        channel.wait_blocking(0)


async def test_error_that_is_raised_again_does_not_pile_up_its_traceback() -> None:
    """A failed request kept the frames of every caller that had ever awaited it."""
    channel = Channel("a")
    end(channel, ExecutionError("boom"))
    lengths = []
    for _ in range(5):
        with pytest.raises(ExecutionError) as caught:
            channel.outcome()
        lengths.append(len(caught.traceback))
    assert len(set(lengths)) == 1


async def test_second_end_is_a_bug_of_ours() -> None:
    channel = Channel("a")
    end(channel)
    with pytest.raises(AssertionError, match="ended twice"):
        end(channel)


async def test_reader_is_woken_by_new_text_and_at_the_end() -> None:
    channel = Channel("a")
    reader = asyncio.create_task(channel.take())
    await asyncio.sleep(0)
    put(channel, written(1))
    assert await reader == delta(1)
    reader = asyncio.create_task(channel.take())
    await asyncio.sleep(0)
    end(channel)
    assert await reader is None


async def test_a_task_that_awaits_the_result_is_not_woken_by_every_step() -> None:
    """Each token of each awaited request woke the user's loop for nothing."""
    channel = Channel("a")
    waiting = asyncio.create_task(channel.wait())
    await asyncio.sleep(0)
    sent: list[int] = []

    class Counting(Wakeups):
        def add(self, waiters: list[asyncio.Future[None]]) -> None:
            sent.append(len(waiters))
            super().add(waiters)

    wakeups = Counting()
    transcript = written(1)
    channel.put(transcript, wakeups)
    write(transcript, 2)
    channel.put(transcript, wakeups)
    channel.end(COMPLETED, OUTPUT, None, wakeups)
    wakeups.send()
    assert sent == [1]
    assert await waiting is OUTPUT


async def test_several_readers_share_the_deltas_and_all_learn_of_the_end() -> None:
    channel = Channel("a")
    readers = [asyncio.create_task(channel.take()) for _ in range(3)]
    await asyncio.sleep(0)
    put(channel, written(1))
    end(channel)
    found = await asyncio.gather(*readers)
    assert sorted(found, key=str) == sorted([delta(1), None, None], key=str)


async def test_cancelled_reader_leaves_its_delta_to_the_next_one() -> None:
    channel = Channel("a")
    reader = asyncio.create_task(channel.take())
    await asyncio.sleep(0)
    reader.cancel()
    await asyncio.sleep(0)
    put(channel, written(1))
    assert await channel.take() == delta(1)


def test_loops_are_entered_once_however_many_wait_there() -> None:
    one, other = CountingLoop(), CountingLoop()
    wakeups = Wakeups()
    wakeups.add([waiter_of(one), waiter_of(one)])
    wakeups.add([waiter_of(one), waiter_of(other)])
    wakeups.send()
    assert (one.hops, other.hops) == (1, 1)
    wakeups.send()
    assert (one.hops, other.hops) == (1, 1)


def test_closed_loop_does_not_keep_the_others_waiting() -> None:
    other = CountingLoop()
    wakeups = Wakeups()
    wakeups.add([waiter_of(ClosedLoop()), waiter_of(other)])
    wakeups.send()
    assert other.hops == 1


def test_thread_waits_with_a_timeout() -> None:
    channel = Channel("a")
    with pytest.raises(TimeoutError, match="request a did not end within 0"):
        channel.wait_blocking(0)
    end(channel)
    assert channel.wait_blocking(0) is OUTPUT


def test_reader_that_registers_while_the_request_ends_is_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The waiters were collected before the end was marked: one registered in between never woke."""
    readers: list[threading.Thread] = []

    class SlowEvent(threading.Event):
        def set(self) -> None:
            readers.append(threading.Thread(target=lambda: asyncio.run(channel.wait()), daemon=True))
            readers[0].start()
            readers[0].join(0.2)  # time for it to register, if it can
            super().set()

    monkeypatch.setattr(channel_module, "threading", SimpleNamespace(Lock=threading.Lock, Event=SlowEvent))
    channel = Channel("a")
    end(channel)
    readers[0].join(60)
    assert not readers[0].is_alive()


def test_only_the_first_two_statuses_are_not_ends() -> None:
    assert [status for status in RequestStatus if not status.ended] == [
        RequestStatus.QUEUED,
        RequestStatus.PROCESSING,
    ]


async def test_waiting_for_admission_ends_when_the_engine_admits() -> None:
    channel = Channel("a")
    waiting = asyncio.create_task(channel.wait_admitted())
    await asyncio.sleep(0)
    wakeups = Wakeups()
    wakeups.add(channel.admit())
    wakeups.send()
    await waiting
    end(channel, ExecutionError("later"))
    await channel.wait_admitted()  # what happened later is not a refusal


async def test_the_first_token_implies_admission_and_a_last_delta_without_any_does_not() -> None:
    admitted, refused = Channel("a"), Channel("b")
    put(admitted, written(1))
    await admitted.wait_admitted()
    empty = Transcript("b")
    empty.end("", "error")
    waiting = asyncio.create_task(refused.wait_admitted())
    put(refused, empty)
    await asyncio.sleep(0)
    assert not waiting.done()
    end(refused, ExecutionError("refused"))
    with pytest.raises(ExecutionError, match="refused"):
        await waiting


async def test_a_step_that_wakes_many_readers_lets_other_callbacks_of_their_loop_run_in_between() -> None:
    """All streams of a server woke in one iteration, which kept every connection and timer waiting for tens of ms."""
    loop, order = asyncio.get_running_loop(), list[str]()
    channels = [Channel(str(number)) for number in range(100)]

    async def read(channel: Channel) -> None:
        assert await channel.take() == delta(1)
        order.append("reader")

    def other() -> None:
        order.append("other")
        if order.count("reader") < len(channels):
            loop.call_soon(other)

    readers = [asyncio.create_task(read(channel)) for channel in channels]
    await asyncio.sleep(0)
    wakeups = Wakeups()
    for channel in channels:
        channel.put(written(1), wakeups)
    wakeups.send()
    loop.call_soon(other)
    await asyncio.gather(*readers)
    bursts = "".join("r" if name == "reader" else " " for name in order).split()
    assert sum(map(len, bursts)) == 100
    assert max(map(len, bursts)) <= 16
