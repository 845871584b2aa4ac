"""`Replica`: one copy of the model with an engine of its own: threads, cache, scheduler.

Owns what `InferenceEngine` owns below its public methods, except for the queue's places, which all replicas share.
Called by `Dispatcher` and `Orders` on the dispatcher's loop, and by `ReplicatedEngine`.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from concurrent.futures import Future

from penstock.api.exiting import halt_at_exit
from penstock.api.log import Logger
from penstock.api.stats import EngineStats
from penstock.config import EngineConfig
from penstock.engine.assembly import Assembly, Parts
from penstock.engine.loop.core import EngineCore
from penstock.engine.loop.gate import EngineState
from penstock.engine.loop.host import Host
from penstock.engine.loop.worker import Worker
from penstock.engine.observe.figures import figures
from penstock.engine.observe.metrics import Metrics
from penstock.engine.requests.logprob_check import FinishedRequests
from penstock.errors import EngineClosed, text_of
from penstock.held_settings import QUEUE_SETTINGS, hold
from penstock.scheduling.admission import Admission
from penstock.scheduling.advisor import BatchingOptimizer

Order = Callable[[EngineCore], Coroutine[object, object, None]]
# The model, its tokenizer, and the settings with its device; called once, on the model's thread.
Source = Callable[[], tuple[object, object, EngineConfig]]


class Replica:
    """Number `number` of the replicas. `config` are the settings that all of them have, `finished` what they keep."""

    def __init__(
        self,
        number: int,
        source: Source,
        config: EngineConfig,
        admission: Admission,
        finished: FinishedRequests,
        log: Logger,
    ) -> None:
        self.number = number
        self.metrics = Metrics(config.enable_metrics)
        self.metrics.finished = finished
        self.host = Host(self._boot)
        self._source: Source | None = source
        self._config = config
        self._admission = admission
        self._log = log
        self._assembly: Assembly | None = None
        self._unregister = halt_at_exit(self)
        self._release_settings: Callable[[], object] = lambda: None

    @property
    def is_live(self) -> bool:
        """Whether it serves, or will once it is loaded."""
        return not self.has_ended and self.host.state is not EngineState.MIXED

    @property
    def has_ended(self) -> bool:
        """Whether it has failed, or was stopped, and runs no more."""
        return self.host.error is not None or self.host.closed

    @property
    def failure(self) -> str:
        """Why it does not serve any more."""
        if self.host.error is not None:
            return text_of(self.host.error)
        return "old and new weights are mixed" if self.host.state is EngineState.MIXED else "it was stopped"

    @property
    def parts(self) -> Parts:
        """The parts of its engine. Raises `EngineClosed` before it is loaded, and after its end."""
        if self._assembly is None or self._assembly.parts is None:
            raise EngineClosed(f"replica {self.number} was stopped")
        return self._assembly.parts

    @property
    def weight_version(self) -> int:
        """The version of its weights; the last one after its end."""
        return 0 if self._assembly is None else self._assembly.weight_version

    def order(self, order: Order) -> Future[None]:
        """Have the replica's loop carry out an order. Its result, or error, is the future's."""
        outcome = Future[None]()
        try:
            self.host.post(lambda core: core.gate.start(order(core), outcome))
        except EngineClosed as error:
            outcome.set_exception(error)
        return outcome

    def give_up(self, outcome: Future[None]) -> None:
        """Cancel an order, unless it writes or releases something already."""
        self.host.try_post(lambda core: core.gate.cancel(outcome))

    def figures(self) -> EngineStats:
        """The statistics of this replica; admission's counts are those of the whole queue."""
        parts = None if self._assembly is None or self.host.closed else self._assembly.parts
        return figures(self._config, self.host, self._admission, self.metrics, parts, self.weight_version)

    def stop(self) -> None:
        """End all requests, join the threads, release the model. Waits for a running step and a loading model."""
        self.host.stop(0.0)
        self._release_settings()
        self._source = None
        if self._assembly is not None:
            self._assembly.close()
        self._unregister()

    def halt(self, until: float) -> None:
        """End its threads where they are, because the process exits."""
        self.host.halt(until)
        if self._assembly is not None:
            self._assembly.halt(until)

    async def _boot(self, worker: Worker) -> EngineCore:
        source, self._source = self._source, None
        assert source is not None
        self._release_settings = hold(self._config, QUEUE_SETTINGS)
        model, tokenizer, self._config = await worker.run(source).done
        assembly = self._assembly = Assembly(
            *(model, tokenizer, self._config, self._admission, self.metrics, BatchingOptimizer(), self._log)
        )
        return await assembly.boot(worker)
