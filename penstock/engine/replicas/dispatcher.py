"""`Dispatcher`: takes requests in, encodes them, lets them wait in one queue, and hands each to one replica.

Owns the router and the open requests; every method runs on one event loop, so neither has a lock. A request that a
replica has taken is delivered by that replica alone, straight to its reader. Called by `RouterHost` and `Orders`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from penstock.api.channel import RequestStatus
from penstock.api.log import Logger
from penstock.api.prompt import PromptInput
from penstock.api.waiting import Wakeups, call_on_loop
from penstock.config import EngineConfig
from penstock.engine.loop.deadlines import DeadlineTimers
from penstock.engine.loop.gate import EngineState
from penstock.engine.observe.metrics import Metrics
from penstock.engine.replicas.replica import Replica
from penstock.engine.requests.endings import bare_output, closing_error, ending_error, final_transcript, metrics_of
from penstock.engine.requests.request import Request
from penstock.engine.text.tokenizer_pool import encode_prompt
from penstock.errors import EngineClosed, ExecutionError, PenstockError, RequestError, described
from penstock.generation import GenerationConfig, Params
from penstock.scheduling.admission import Admission, QueuePlace
from penstock.scheduling.routing import Choice, Pending, Router, RoutingStats
from penstock.sequence import FinishReason

SPARE = 4  # a replica is given a quarter more samples than fit into a step, so that it never waits for the next one


class _Open:
    """A request that has not ended. `pending` is None while its prompt is encoded."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.pending: Pending | None = None

    @property
    def replica(self) -> int | None:
        """The number of the replica that has taken it."""
        return None if self.pending is None else self.pending.replica


class Dispatcher:
    """`metrics` count the requests that end before a replica takes them. `boost_s` and sizes come from `config`."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        config: EngineConfig,
        admission: Admission,
        metrics: Metrics,
        choose: Choice,
        log: Logger,
    ) -> None:
        self.state = EngineState.RUNNING  # written by `Orders`: in any other nothing is handed over
        self.fault: EngineClosed | None = None  # why every request is refused
        self.on_fault: Callable[[], None] = lambda: None
        self.drained = threading.Event()  # set after `drain`, once nothing that is open can end by itself
        self._replicas = replicas
        self._config, self._admission, self._metrics = config, admission, metrics
        self._choose, self._log = choose, log
        self._router: Router | None = None
        self._open: dict[str, _Open] = {}
        self._early: list[_Open] = []
        self._timers = DeadlineTimers(time.monotonic, lambda request: self.abort(request.id, FinishReason.DEADLINE))
        self._numbers, self._turns = itertools.count(), itertools.count()
        self._watches: set[asyncio.Task[None]] = set()
        self.is_draining = False  # a replica that ends has not failed; set by whoever stops the engine, on any thread

    # Read from any thread.

    @property
    def num_requests(self) -> int:
        """The number of requests that have not ended."""
        return sum(not entry.request.channel.ended for entry in list(self._open.values()))

    @property
    def num_waiting(self) -> int:
        """The number of requests that are encoded and that no replica has taken."""
        return 0 if self._router is None else self._router.num_waiting

    def routing(self) -> list[RoutingStats]:
        """What every replica was given; empty before they are loaded."""
        return [] if self._router is None else self._router.stats()

    # Requests.

    def open(self) -> None:
        """All replicas are loaded: begin with the requests that have come so far."""
        config, estimate = self._config, self._admission.estimate_wait
        count = len(self._replicas)
        # The last replica to load has set its own forecast; the queue is shared by all of them.
        self._admission.estimate_wait = lambda requests, tokens: estimate(-(-requests // count), tokens / count)
        self._router = Router(
            [replica.parts.cache.num_blocks if config.enable_kv_cache else 0 for replica in self._replicas],
            capacity=config.max_batch_size + max(1, config.max_batch_size // SPARE),
            block_size=config.block_size,
            boost_s=config.priority_boost_threshold,
            choose=self._choose,
        )
        early, self._early = self._early, []
        for entry in early:
            self._begin(entry)

    def take_in(self, request: Request, displaced: Sequence[QueuePlace]) -> None:
        """Accept a request, and end those whose places it took. Its prompt may be encoded on another thread."""
        for place in displaced:
            self._displace(place)
        entry = _Open(request)
        earlier = self._open.get(request.id)
        if earlier is not None and not earlier.request.channel.ended:
            error = RequestError(
                f"request id {request.id!r} is already running: use another, or none", parameter="request_id"
            )
            self._finish(entry, FinishReason.ERROR, error)
            return
        self._open[request.id] = entry
        if self.fault is not None:
            self._finish(entry, FinishReason.ERROR, EngineClosed(str(self.fault)))
        elif request.place.is_lost:
            self._finish(entry, FinishReason.ERROR, self._admission.displaced())
        elif self._router is None:
            self._early.append(entry)
        else:
            self._begin(entry)

    def _begin(self, entry: _Open) -> None:
        """Encode the prompt, with the tokenizers of a live replica, unless it is token ids."""
        request = entry.request
        if request.channel.ended:
            return
        self._timers.set(request)
        if request.prompt.token_ids is not None:
            self._enqueue(entry, request.prompt.token_ids)
            return
        loop = asyncio.get_running_loop()
        try:
            serving = self.live()
            longest = max((replica.parts.inputs for replica in serving), key=lambda inputs: inputs.limit)
            pool = serving[next(self._turns) % len(serving)].parts.pool
            encoded = pool.submit(functools.partial(encode_prompt, check=longest.check_length), request.prompt)
        except PenstockError as error:
            self._finish(entry, FinishReason.ERROR, error)
        else:
            encoded.add_done_callback(lambda future: call_on_loop(loop, self._on_encoded, entry, future))

    def _on_encoded(self, entry: _Open, encoded: Future[tuple[str | None, list[int]]]) -> None:
        if entry.request.channel.ended:
            return
        try:
            text, ids = encoded.result()
        except BaseException as error:  # a panic in the tokenizer library is not an `Exception`
            fault = error if isinstance(error, PenstockError) else None
            fault = fault or RequestError(f"the prompt could not be encoded: {described(error)}")
            self._finish(entry, FinishReason.ERROR, fault)
            return
        prompt = PromptInput(text, ids, is_bare=entry.request.prompt.is_bare, is_encoded=True)
        entry.request = dataclasses.replace(entry.request, prompt=prompt)
        self._enqueue(entry, ids)

    def _enqueue(self, entry: _Open, ids: list[int]) -> None:
        assert self._router is not None
        request, now = entry.request, time.monotonic()
        self._admission.adjust(request.place, len(ids))
        digests = self._router.digests(request.namespace, request.adapter, ids)
        fixed = next(self._numbers), request.id, request.priority, request.arrival, request.deadline
        entry.pending = Pending(*fixed, length=len(ids), width=_width(request.params), digests=digests)
        self._router.add(entry.pending, now)
        self.dispatch()

    def settle(self, state: EngineState) -> None:
        """Go on in this state after an order."""
        self.state = state
        self._check_drained()
        self.dispatch()

    def dispatch(self) -> None:
        """Hand waiting requests to replicas that have room, unless an order is being carried out."""
        router = self._router
        if router is None or self.state is not EngineState.RUNNING or self.fault is not None:
            return
        while assigned := router.assign(time.monotonic()):
            for pending in assigned:
                self._hand_over(self._open[pending.request_id], pending, router)

    def _hand_over(self, entry: _Open, pending: Pending, router: Router) -> None:
        assert pending.replica is not None
        number, request = pending.replica, entry.request
        try:
            self._replicas[number].host.post(lambda core: core.submit([request]), [request])
        except EngineClosed:  # it has failed in the meantime
            router.add(pending, time.monotonic())
            self._lose(number)
            if self.fault is not None and not request.channel.ended:
                self._finish(entry, FinishReason.ERROR, EngineClosed(str(self.fault)))
            return
        self._timers.clear(request.id)
        watch = asyncio.get_running_loop().create_task(self._watch(entry, pending, router))
        self._watches.add(watch)
        watch.add_done_callback(self._watches.discard)

    async def _watch(self, entry: _Open, pending: Pending, router: Router) -> None:
        """Wait until a replica has ended a request, and give it another one."""
        assert pending.replica is not None
        number, digests = pending.replica, pending.digests
        has_failed: bool | None = None
        try:
            output, has_failed = await entry.request.channel.wait(), False
            tokens = output.outputs[0].token_ids if output.outputs else []
            tokens = [*output.prompt_token_ids, *tokens[:-1]]  # the last one was not computed
            digests = router.digests(entry.request.namespace, entry.request.adapter, tokens, pending.digests)
        except Exception as error:
            has_failed = True if isinstance(error, ExecutionError) else None
        router.end(pending, digests=digests, has_failed=has_failed)
        self._forget(entry)
        if not self._replicas[number].is_live:
            self._lose(number)
        self.dispatch()

    # Ends.

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT, error: Exception | None = None) -> None:
        """End a request, wherever it is; unknown and ended ids are ignored."""
        entry = self._open.get(request_id)
        if entry is None or entry.request.channel.ended:
            return
        if entry.replica is None:
            self._finish(entry, reason, error)
        else:
            self._replicas[entry.replica].host.try_post(lambda core: core.abort(request_id, reason, error))

    def _displace(self, place: QueuePlace) -> None:
        """End the request whose place was taken, unless it has started."""
        entry = self._open.get(place.request_id)
        if entry is None or entry.request.place is not place or entry.request.channel.ended:
            return
        if entry.replica is None:
            self._finish(entry, FinishReason.ERROR, self._admission.displaced())
        else:
            self._replicas[entry.replica].host.try_post(lambda core: core.submit([], [place]))

    def _finish(self, entry: _Open, reason: FinishReason, error: Exception | None = None) -> None:
        """End a request that no replica has taken, and tell its reader."""
        request, wakeups = entry.request, Wakeups()
        if entry.pending is not None and self._router is not None:
            self._router.remove(entry.pending)
        request.channel.put(final_transcript(request, reason), wakeups)
        metrics = metrics_of(request, time.monotonic())
        output = bare_output(request, reason, metrics) if reason is FinishReason.ABORT else None
        is_cancelled = reason is FinishReason.ABORT and not isinstance(error, EngineClosed)
        fault = ending_error(request, reason, output, error)
        self._admission.release(request.place)
        self._metrics.end_request(fault, was_accepted=entry.pending is not None)
        status = RequestStatus.CANCELLED if is_cancelled else RequestStatus.FAILED
        request.channel.end(status, output, fault, wakeups)
        wakeups.send()
        self._forget(entry)

    def _forget(self, entry: _Open) -> None:
        if self._open.get(entry.request.id) is entry:
            del self._open[entry.request.id]
            self._timers.clear(entry.request.id)
        self._check_drained()

    def drain(self) -> None:
        """Set `drained` once nothing is open, or steps have stopped for an unknown time."""
        self.is_draining = True
        self._check_drained()

    def _check_drained(self) -> None:
        is_at_rest = self.state in (EngineState.PAUSED, EngineState.ASLEEP)
        if self.is_draining and (not self._open or is_at_rest or self.fault is not None):
            self.drained.set()

    def close_all(self) -> None:
        """End all requests because the engine is being stopped."""
        for request_id in list(self._open):
            self.abort(request_id, FinishReason.ABORT, closing_error())

    def forget_prefixes(self, *, of_running: bool = False) -> None:
        """Route by load alone until prefixes have been computed again, with `of_running` by requests yet to come."""
        if self._router is not None:
            self._router.forget_prefixes(of_running=of_running)

    # Failures, and what `Orders` need.

    def live(self) -> list[Replica]:
        """The replicas that serve. Raises `EngineClosed` without any."""
        for replica in self._replicas:
            if not replica.is_live:
                self._lose(replica.number)
        if self.fault is not None:
            raise EngineClosed(str(self.fault))
        assert self._router is not None
        if not (numbers := self._router.live):
            raise closing_error()  # they were stopped
        return [self._replicas[number] for number in numbers]

    def _lose(self, number: int) -> None:
        """Route no more to a replica that has failed; the last one to fail ends all that waits."""
        if self._router is None or number not in self._router.live:
            return
        self._router.lose(number)
        if self.is_draining:
            return  # it was stopped
        reason = self._replicas[number].failure
        self._log.error("a replica failed", replica=number, error=reason)
        if not self._router.live:
            self.fail(EngineClosed(f"all replicas have failed, the last one because {reason}; create a new engine"))

    def waiting(self) -> list[str]:
        """The ids of the requests that no replica has taken."""
        return [request_id for request_id, entry in self._open.items() if entry.replica is None]

    def end_waiting(self, request_ids: Sequence[str], make_error: Callable[[str], PenstockError]) -> None:
        """End those requests which no replica has taken, with an error made from the id of each."""
        for request_id in request_ids:
            entry = self._open.get(request_id)
            if entry is not None and entry.replica is None and not entry.request.channel.ended:
                self._finish(entry, FinishReason.ABORT, make_error(request_id))

    def fail(self, fault: EngineClosed) -> None:
        """Refuse everything from here on, and end what is open."""
        self.fault = fault
        self.on_fault()
        for request_id in list(self._open):
            self.abort(request_id, FinishReason.ERROR, EngineClosed(str(fault)))


def _width(params: Params) -> int:
    """How many sequences a request will run."""
    if isinstance(params, GenerationConfig):
        return max(params.num_return_sequences, params.num_beams)
    return 1 if params is None else params.num_sequences
