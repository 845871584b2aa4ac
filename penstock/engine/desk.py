"""`Desk`: the open requests, and what their readers are told.

Owns which sequence belongs to which request, the events not yet published, and every ending: exactly one each. A fault
in one request's delivery ends that request. Runs on the engine's loop, called by `EngineCore`; knows nothing of steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from penstock.engine.channel import RequestStatus, Wakeups, hop
from penstock.engine.collector import Collector
from penstock.engine.door import Door
from penstock.engine.endings import (
    bare_output,
    closing_error,
    delivery_fault,
    ending_error,
    last_word,
    text_fault,
    times_of,
)
from penstock.engine.log import Logger
from penstock.engine.metrics import Metrics
from penstock.engine.request import Request
from penstock.errors import RequestError, text_of
from penstock.models.protocol import ModelRunner
from penstock.outputs import RequestOutput
from penstock.scheduling.scheduler import Scheduler
from penstock.sequence import FinishReason, Sequence
from penstock.step import Event

_REGULAR = (FinishReason.STOP, FinishReason.LENGTH)


@dataclass(slots=True)
class _Mailing:
    """What one `publish` comes to."""

    now: float
    wakeups: Wakeups = field(default_factory=Wakeups)
    latencies_s: list[float] = field(default_factory=list)


class Desk:
    """`ended(request_id)` is called once for every request that ends."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        door: Door,
        clock: Callable[[], float],
        metrics: Metrics,
        log: Logger,
        ended: Callable[[str], None],
    ) -> None:
        self.requests: dict[str, Request] = {}
        self._scheduler = scheduler
        self._runner = runner
        self._door = door
        self._clock = clock
        self._metrics = metrics
        self._log = log
        self._ended = ended
        self._owners: dict[int, tuple[Request, int]] = {}
        self._unpublished: list[Event] = []

    def open(self, request: Request) -> bool:
        """Take a request in; False, with its end, when its id is in use."""
        if request.id not in self.requests:
            self.requests[request.id] = request
            return True
        error = RequestError(f"request id {request.id!r} is already running: use another, or none")
        wakeups = Wakeups()
        self._door.release(request)
        request.channel.end(RequestStatus.FAILED, None, error, wakeups)
        wakeups.send()
        return False

    def seat(self, request: Request) -> None:
        """From now on its sequences' events reach the request."""
        assert request.collector is not None
        told = request.sequences[: request.collector.num_texts]
        self._owners.update((seq.id, (request, i)) for i, seq in enumerate(told))
        self._metrics.count("prompt_tokens", len(request.channel.prompt_token_ids))

    def add_news(self, events: list[Event]) -> None:
        """Remember events for the next `publish`."""
        self._unpublished += events

    def note_started(self) -> None:
        """Requests whose first sequence was just planned have left the queue."""
        now = self._clock()
        for sequence in self._scheduler.take_started():
            owner = self._owners.get(sequence.id)
            if owner is None or owner[0].started is not None:
                continue
            request = owner[0]
            request.started = now
            request.channel.status = RequestStatus.PROCESSING
            self._door.release(request)
            self._metrics.record("queue_time", now - request.arrival)

    def publish(self) -> None:
        """Hand every event to its reader: one hop per consumer loop."""
        events, self._unpublished = self._unpublished, []
        if not events:
            return
        mailing, owners = _Mailing(self._clock()), self._owners
        for event in events:
            owner = owners.get(event.seq_id)
            if owner is not None:
                try:
                    self._deliver(*owner, event, mailing)
                except BaseException as error:
                    self._fail(owner[0], error, mailing.wakeups)
            if event.reason is not None:
                owners.pop(event.seq_id, None)
                self._runner.forget(event.seq_id)
        self._metrics.record("inter_token_latency", *mailing.latencies_s)
        mailing.wakeups.send()

    def _deliver(self, request: Request, index: int, event: Event, mailing: _Mailing) -> None:
        collector = request.collector
        assert collector is not None
        if event.reason is not None and event.reason not in _REGULAR:
            self._end(request, event.reason, event.error, mailing.wakeups)
            return
        try:
            transcripts = collector.push(index, event)
        except BaseException as error:  # a tokenizer's panic is no `Exception`
            self._end(request, FinishReason.ERROR, text_fault(error), mailing.wakeups)
            return
        if event.tokens:
            self._time_tokens(request, len(event.tokens), mailing)
        if collector.streams:
            for transcript in transcripts:
                request.channel.put(transcript, mailing.wakeups)
        if transcripts[0].finish_reason is not None:
            self._retire(request.sequences[index], FinishReason.STOP)
            if collector.done:
                self._conclude(request, collector, mailing.wakeups)

    def _conclude(self, request: Request, collector: Collector, wakeups: Wakeups) -> None:
        """All candidates have ended: complete the request, once its caller's own function has ranked them, if any."""
        judging = collector.judge()
        if judging is None:
            self._complete(request, collector, wakeups)
        else:
            loop = asyncio.get_running_loop()
            judging.add_done_callback(lambda future: hop(loop, self._judged, request, collector, future))

    def _judged(self, request: Request, collector: Collector, judging: Future[list[float]]) -> None:
        if request.channel.ended:
            return
        wakeups = Wakeups()
        try:
            collector.rank(judging.result())
            self._complete(request, collector, wakeups)
        except BaseException as error:
            self._fail(request, error, wakeups)
        wakeups.send()

    def _time_tokens(self, request: Request, count: int, mailing: _Mailing) -> None:
        last, request.last_token = request.last_token, mailing.now
        if last is None:
            request.first_token = mailing.now
            self._metrics.record("first_token_latency", mailing.now - request.arrival)
        elif len(request.sequences) == 1:
            mailing.latencies_s.append((mailing.now - last) / count)

    def _retire(self, sequence: Sequence, reason: FinishReason) -> None:
        """Stop listening to a sequence; one that still runs (a stop string ended it) is taken out of the scheduler."""
        self._owners.pop(sequence.id, None)
        self._unpublished += self._scheduler.finish(sequence.id, reason)

    def _complete(self, request: Request, collector: Collector, wakeups: Wakeups) -> None:
        output = collector.output(times_of(request, self._clock()))
        if not collector.streams:
            for transcript in collector.chosen():
                request.channel.put(transcript, wakeups)
        self._metrics.record("end_to_end_latency", self._clock() - request.arrival)
        self._close(request, RequestStatus.COMPLETED, output, None, wakeups)

    def end(self, request: Request, reason: FinishReason, error: Exception | None = None) -> None:
        """End a request that did not complete, with what it has so far, and tell its reader at once."""
        self.publish()  # what was committed counts, and may have ended it
        if not request.channel.ended:
            wakeups = Wakeups()
            self._end(request, reason, error, wakeups)
            wakeups.send()

    def close(self, error: BaseException | None) -> None:
        """End whatever is left because the engine ends. Asks nothing of the scheduler, which may be what failed."""
        wakeups = Wakeups()
        for request in list(self.requests.values()):
            self._say_last_words(request, FinishReason.ABORT, wakeups)
            output = self._output(request, FinishReason.ABORT)
            self._close(request, RequestStatus.FAILED, output, closing_error(error), wakeups)
        wakeups.send()

    def _fail(self, request: Request, error: BaseException, wakeups: Wakeups) -> None:
        """A fault in the delivery of a request ends it, and nothing else."""
        if not request.channel.ended:
            self._end(request, FinishReason.ERROR, delivery_fault(error), wakeups)

    def _end(self, request: Request, reason: FinishReason, error: Exception | None, wakeups: Wakeups) -> None:
        """End a request that did not complete, with what it has so far."""
        for sequence in request.sequences:
            self._retire(sequence, reason)
        self._say_last_words(request, reason, wakeups)
        output = self._output(request, reason)
        status = RequestStatus.CANCELLED if reason is FinishReason.ABORT else RequestStatus.FAILED
        error = error or ending_error(request, reason, output)
        if output is not None:
            output.error = text_of(error)
        self._close(request, status, output, error, wakeups)

    def _say_last_words(self, request: Request, reason: FinishReason, wakeups: Wakeups) -> None:
        """Never fails: what the request itself cannot say is said without it."""
        try:
            last = request.collector.close(reason) if request.collector else [last_word(request, reason)]
        except BaseException:  # the very fault, perhaps, that ends the request
            last = [last_word(request, reason)]
        for transcript in last:
            request.channel.put(transcript, wakeups)

    def _output(self, request: Request, reason: FinishReason) -> RequestOutput | None:
        """What the request has come to; the bare facts where that cannot be put together."""
        if request.collector is None:
            return None
        metrics = times_of(request, self._clock())
        try:
            return request.collector.output(metrics)
        except BaseException:
            return bare_output(request, reason, metrics)

    def _close(
        self,
        request: Request,
        status: RequestStatus,
        output: RequestOutput | None,
        error: Exception | None,
        wakeups: Wakeups,
    ) -> None:
        try:
            self.requests.pop(request.id, None)
            self._ended(request.id)
            self._door.release(request)
            self._metrics.count("requests", 1)
        finally:
            request.channel.end(status, output, error, wakeups)
        self._log.debug("request ended", request_id=request.id, status=status.value)
