"""`OutputProcessor`: turns the scheduler's events into deltas and results for the readers of open requests.

Owns the map from sequences to requests, the unpublished events, and every terminal event: exactly one per request. An
exception in one request's delivery ends that request. Called by `EngineCore` on the engine's loop; knows nothing of
steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

from penstock.api.channel import RequestStatus
from penstock.api.log import Logger
from penstock.api.waiting import Wakeups, call_on_loop
from penstock.engine.observe.metrics import Metrics
from penstock.engine.requests.collector import Collector
from penstock.engine.requests.endings import (
    bare_output,
    closing_error,
    delivery_fault,
    ending_error,
    final_transcript,
    metrics_of,
)
from penstock.engine.requests.request import Request
from penstock.engine.text.stream import text_fault
from penstock.errors import EngineClosed, RequestError, text_of
from penstock.outputs import RequestOutput
from penstock.scheduling.admission import Admission
from penstock.scheduling.scheduler import Scheduler
from penstock.sequence import FinishReason, Sequence
from penstock.step import Event

_REGULAR = (FinishReason.STOP, FinishReason.LENGTH)


@dataclass(slots=True)
class _Delivery:
    """The state shared by the delivery of one step's events."""

    now: float
    wakeups: Wakeups = field(default_factory=Wakeups)
    latencies_s: list[float] = field(default_factory=list)


class OutputProcessor:
    """`forget(seq_id)` and `on_end(request_id)` are called once for every sequence and request that ends."""

    def __init__(
        self,
        scheduler: Scheduler,
        admission: Admission,
        clock: Callable[[], float],
        metrics: Metrics,
        log: Logger,
        *,
        forget: Callable[[int], None],
        on_end: Callable[[str], None],
    ) -> None:
        self.requests: dict[str, Request] = {}
        self._scheduler = scheduler
        self._admission = admission
        self._clock = clock
        self._metrics = metrics
        self._log = log
        self._forget = forget
        self._on_end = on_end
        self._owners: dict[int, tuple[Request, int]] = {}  # by sequence id, with the index of the completion
        self._unpublished: list[Event] = []

    def register(self, request: Request) -> bool:
        """Track an open request. If its id is in use, end it and return False."""
        if request.id not in self.requests:
            self.requests[request.id] = request
            return True
        error = RequestError(f"request id {request.id!r} is already running: use another, or none")
        wakeups = Wakeups()
        self._admission.release(request.place)
        request.channel.end(RequestStatus.FAILED, None, error, wakeups)
        wakeups.send()
        return False

    def attach(self, request: Request) -> None:
        """Route the events of the request's sequences to the request."""
        assert request.collector is not None
        for index, seq in enumerate(request.sequences[: request.collector.num_texts]):
            self._owners[seq.id] = request, index
        self._metrics.count("prompt_tokens", len(request.channel.prompt_token_ids))

    def add_events(self, events: list[Event]) -> None:
        """Keep events for the next `publish`."""
        self._unpublished += events

    def mark_started(self, sequences: Iterable[Sequence]) -> None:
        """Mark requests as started when the first of their sequences is planned; that frees their queue places."""
        now = self._clock()
        for sequence in sequences:
            owner = self._owners.get(sequence.id)
            if owner is None or owner[0].started is not None:
                continue
            request = owner[0]
            request.started = now
            request.channel.status = RequestStatus.PROCESSING
            self._admission.release(request.place)
            self._metrics.record("queue_time", now - request.arrival)

    def started_sequences(self) -> list[int]:
        """The ids of all sequences of open requests that have started."""
        started = (request for request in self.requests.values() if request.started is not None)
        return [seq.id for request in started for seq in request.sequences]

    def mark_stale(self, seq_ids: Iterable[int]) -> None:
        """These sequences go on with K/V of older weights; their completions will say so."""
        for seq_id in seq_ids:
            if (owner := self._owners.get(seq_id)) is not None and owner[0].collector is not None:
                request, index = owner
                owner[0].collector.mark_stale(None if request.search is not None else index)

    def restart_prompts(self) -> None:
        """All K/V are computed anew: prompt logprobs of requests without a token will be reported from the first."""
        for request in self.requests.values():
            if request.collector is not None and request.sequences and not request.sequences[0].num_generated:
                request.collector.restart_prompt()

    def publish(self) -> None:
        """Deliver every event to its reader, with one call per reader's loop."""
        events, self._unpublished = self._unpublished, []
        if not events:
            return
        delivery, owners = _Delivery(self._clock()), self._owners
        for event in events:
            owner = owners.get(event.seq_id)
            if owner is not None:
                try:
                    self._deliver(*owner, event, delivery)
                except BaseException as error:
                    self._fail(owner[0], error, delivery.wakeups)
            if event.reason is not None:
                owners.pop(event.seq_id, None)
                self._forget(event.seq_id)
        if delivery.latencies_s:
            self._metrics.record("inter_token_latency", *delivery.latencies_s)
        delivery.wakeups.send()

    def end(self, request: Request, reason: FinishReason, error: Exception | None = None) -> None:
        """End a request that did not complete, with its output so far, and wake its reader at once."""
        self.publish()  # committed tokens count, and may have ended the request
        if not request.channel.ended:
            wakeups = Wakeups()
            self._end(request, reason, error, wakeups)
            wakeups.send()

    def close(self, error: BaseException | None) -> None:
        """End every open request because the engine ends. Never calls the scheduler, which may have failed."""
        wakeups = Wakeups()
        for request in list(self.requests.values()):
            self._put_final(request, FinishReason.ABORT, wakeups)
            output = self._output(request, FinishReason.ABORT)
            self._close(request, RequestStatus.FAILED, output, closing_error(error, output), wakeups)
        wakeups.send()

    def _deliver(self, request: Request, index: int, event: Event, delivery: _Delivery) -> None:
        collector, wakeups = request.collector, delivery.wakeups
        assert collector is not None
        if event.reason is not None and event.reason not in _REGULAR:
            self._end(request, event.reason, event.error, wakeups)
            return
        try:
            transcripts = collector.push(index, event)
        except BaseException as error:  # a panic in the tokenizer library is not an `Exception`
            self._end(request, FinishReason.ERROR, text_fault(error), wakeups)
            return
        if event.tokens:
            self._time_tokens(request, len(event.tokens), delivery)
        if collector.streams:
            for transcript in transcripts:
                request.channel.put(transcript, wakeups)
        if transcripts[0].finish_reason is not None:
            self._finish_sequence(request.sequences[index].id, FinishReason.STOP)
            if collector.done:
                self._rank(request, collector, wakeups)

    def _time_tokens(self, request: Request, count: int, delivery: _Delivery) -> None:
        previous, request.last_token = request.last_token, delivery.now
        if previous is None:
            request.first_token = delivery.now
            self._metrics.record("first_token_latency", delivery.now - request.arrival)
        elif len(request.sequences) == 1:
            delivery.latencies_s.append((delivery.now - previous) / count)

    def _rank(self, request: Request, collector: Collector, wakeups: Wakeups) -> None:
        """Complete a request whose candidates have all ended, after the caller's function has ranked them, if any."""
        scores = collector.call_scorer()
        if scores is None:
            self._complete(request, collector, wakeups)
        else:
            loop = asyncio.get_running_loop()
            scores.add_done_callback(lambda future: call_on_loop(loop, self._on_ranked, request, collector, future))

    def _on_ranked(self, request: Request, collector: Collector, scores: Future[list[float]]) -> None:
        if request.channel.ended:
            return
        wakeups = Wakeups()
        try:
            collector.rank(scores.result())
            self._complete(request, collector, wakeups)
        except BaseException as error:
            self._fail(request, error, wakeups)
        wakeups.send()

    def _complete(self, request: Request, collector: Collector, wakeups: Wakeups) -> None:
        output = collector.output(metrics_of(request, self._clock()))
        if not collector.streams:
            for transcript in collector.chosen():
                request.channel.put(transcript, wakeups)
        self._metrics.record("end_to_end_latency", self._clock() - request.arrival)
        if not request.sequences[0].adapter:  # the live module computes without the engine's adapters
            self._metrics.finished.add(output)
        self._close(request, RequestStatus.COMPLETED, output, None, wakeups)

    def _fail(self, request: Request, error: BaseException, wakeups: Wakeups) -> None:
        """End a request after an exception in its delivery."""
        if not request.channel.ended:
            self._end(request, FinishReason.ERROR, delivery_fault(error), wakeups)

    def _end(self, request: Request, reason: FinishReason, error: Exception | None, wakeups: Wakeups) -> None:
        """End a request that did not complete, with its output so far."""
        for sequence in request.sequences:
            self._finish_sequence(sequence.id, reason, error)
        self._put_final(request, reason, wakeups)
        output = self._output(request, reason)
        is_cancelled = reason is FinishReason.ABORT and not isinstance(error, EngineClosed)
        status = RequestStatus.CANCELLED if is_cancelled else RequestStatus.FAILED
        error = ending_error(request, reason, output, error)
        if output is not None:
            output.error = text_of(error)
        self._close(request, status, output, error, wakeups)

    def _finish_sequence(self, seq_id: int, reason: FinishReason, error: Exception | None = None) -> None:
        """Deliver no more of a sequence; remove it from the scheduler if it still runs."""
        self._owners.pop(seq_id, None)
        self._unpublished += self._scheduler.finish(seq_id, reason, error)

    def _put_final(self, request: Request, reason: FinishReason, wakeups: Wakeups) -> None:
        """Publish the last deltas of a request that did not complete; without its text if that fails."""
        try:
            transcripts = request.collector.close(reason) if request.collector else [final_transcript(request, reason)]
        except BaseException:  # perhaps the same error that ends the request
            transcripts = [final_transcript(request, reason)]
        for transcript in transcripts:
            request.channel.put(transcript, wakeups)

    def _output(self, request: Request, reason: FinishReason) -> RequestOutput | None:
        """The partial output of a request; without its completions if they cannot be assembled."""
        if request.collector is None and reason is not FinishReason.ABORT:
            return None
        metrics = metrics_of(request, self._clock())
        try:
            if request.collector is not None:
                return request.collector.output(metrics)
        except BaseException:
            pass  # perhaps the same error that ends the request
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
            self._on_end(request.id)
            self._admission.release(request.place)
            self._metrics.end_request(error, was_accepted=bool(request.sequences))
        finally:
            request.channel.end(status, output, error, wakeups)
        self._log.debug("request ended", request_id=request.id, status=status.value)
