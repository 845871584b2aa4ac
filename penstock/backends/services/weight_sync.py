"""`WeightSyncController`: which requests may run with which weights, for several services, each under its model tag.

A trainer announces batches and new versions here, and service clients take a lease for every request. The gates decide
who waits (`weight_gate.py`); `update`, a function of the caller's or one of `weight_updates.py`, moves the weights.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, replace

from penstock.api.blocking import run
from penstock.api.log import make_logger
from penstock.backends.services.reading import read_section
from penstock.backends.services.weight_gate import WeightGate
from penstock.errors import ConfigurationError, WeightsError, described, shown

MODES = ("sync", "fully-async", "batch-async")


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """What an update function is told: the service, the version that it makes, and where the weights are."""

    model_tag: str
    version: int
    path: str = ""


Update = Callable[[WeightUpdate], Awaitable[object] | object]


@dataclass(frozen=True, slots=True)
class SyncSettings:
    """How rollouts and updates take turns.

    `sync_mode` "sync": after each complete batch, requests wait for the weights that were trained on it. "batch-async":
    they wait once `staleness_threshold` further batches are complete as well. "fully-async": they wait for updates
    only. In every mode an update waits for the requests that run, and no request runs across it.
    """

    sync_mode: str = "sync"
    staleness_threshold: int = 1
    sync_weight_path: str = ""

    def __post_init__(self) -> None:
        if self.sync_mode not in MODES:
            raise ConfigurationError(f"sync_mode must be one of {', '.join(MODES)}, not {shown(self.sync_mode)}")
        threshold = self.staleness_threshold
        if not isinstance(threshold, int) or isinstance(threshold, bool) or threshold < 0:
            raise ConfigurationError(f"staleness_threshold must be an integer >= 0, not {shown(threshold)}")

    @property
    def staleness(self) -> float:
        """How many complete batches the served weights may lack."""
        return {"sync": 0, "batch-async": self.staleness_threshold, "fully-async": math.inf}[self.sync_mode]


class WeightSyncController:
    """One gate per model tag, all of the same mode.

    `config` has the fields of `SyncSettings`, flat or under `weight`; keywords take precedence. `update` moves the
    weights of every service that has no function of its own (`set_update`); it may be a coroutine function. Nothing
    here has a time limit: requests wait for as long as the update takes.
    """

    def __init__(
        self, config: Mapping[str, object] | None = None, *, update: Update | None = None, **settings: object
    ) -> None:
        section = read_section(config or {}, "weight", SyncSettings)
        self.settings = replace(SyncSettings(), **(section | settings))  # type: ignore[arg-type]
        self._update = update
        self._updates: dict[str, Update] = {}
        self._gates: dict[str, WeightGate] = {}
        self._lock = threading.Lock()
        self._log = make_logger("INFO")

    def set_update(self, model_tag: str, update: Update) -> None:
        """Move the weights of this service by `update`."""
        self._updates[model_tag] = update

    def gate(self, model_tag: str) -> WeightGate:
        """The gate of a service, made on first use."""
        with self._lock:
            return self._gates.setdefault(model_tag, WeightGate(self.settings.staleness))

    def lease(self, model_tag: str) -> AbstractContextManager[int]:
        """Run a request inside: `with controller.lease(tag) as version`. Raises `WeightsError` after a failed update.

        The version holds until the end of the block. Leases inside it, such as those of clients, belong to it and do
        not wait; updating the same service inside it raises `EngineStateError`.
        """
        return self.gate(model_tag).request()

    def alease(self, model_tag: str) -> AbstractAsyncContextManager[int]:
        """`lease` for event loops."""
        return self.gate(model_tag).arequest()

    def wait_for_weight_sync(self, model_tag: str) -> None:
        """Block until a request may run. What happens after that, only `lease` knows. Raises `WeightsError`."""
        with self.lease(model_tag):
            pass

    async def await_for_weight_sync(self, model_tag: str) -> None:
        """`wait_for_weight_sync` for event loops."""
        async with self.alease(model_tag):
            pass

    def check_rollout_service_status(self, model_tag: str) -> str:
        """ "continue" if a request may run now, else "block". Raises `WeightsError` after a failed update."""
        gate = self.gate(model_tag)
        gate.check()
        return "continue" if gate.is_open else "block"

    def get_rollout_model_version(self, model_tag: str) -> int:
        """The version of the weights in service."""
        return self.gate(model_tag).version

    def trajectory_pool_notify_batch_ready(self, model_tag: str) -> None:
        """A batch of trajectories is complete: the trainer may begin with it."""
        self.gate(model_tag).add_batch()

    def train_worker_notify_weight_update(self, worker_name: str, model_tag: str) -> bool:
        """The trainer has made a new version: bring it into service, as `sync_weight_to_rollout_service` does."""
        self._announce(worker_name, model_tag)
        return self.sync_weight_to_rollout_service(model_tag)

    async def atrain_worker_notify_weight_update(self, worker_name: str, model_tag: str) -> bool:
        """`train_worker_notify_weight_update` for event loops."""
        self._announce(worker_name, model_tag)
        return await self.async_weight_to_rollout_service(model_tag)

    def sync_weight_to_rollout_service(self, model_tag: str) -> bool:
        """Update a service: wait until no request runs, move the weights, let requests in again. Always True.

        Raises `WeightsError` if moving them failed, and so does every request of the service from then on, those that
        wait included, until an update succeeds or `resume` is called.
        """
        update = self._update_of(model_tag)
        with self.gate(model_tag).update() as version:
            try:
                result = update(self._task(model_tag, version))
                if inspect.isawaitable(result):
                    run(_awaited(result))
            except Exception as error:
                raise self._failed(model_tag, error) from error
        return True

    async def async_weight_to_rollout_service(self, model_tag: str) -> bool:
        """`sync_weight_to_rollout_service` for event loops; a plain function runs on a thread meanwhile."""
        update = self._update_of(model_tag)
        async with self.gate(model_tag).aupdate() as version:
            try:
                task = self._task(model_tag, version)
                # On a thread, a coroutine could be made and never awaited, if this task is cancelled meanwhile.
                is_async = inspect.iscoroutinefunction(update)
                result = update(task) if is_async else await asyncio.to_thread(update, task)
                if inspect.isawaitable(result):
                    await result
            except Exception as error:
                raise self._failed(model_tag, error) from error
        return True

    def resume(self, model_tag: str) -> None:
        """Serve the weights as they are, although the last update failed."""
        self.gate(model_tag).resume()

    def _announce(self, worker_name: str, model_tag: str) -> None:
        gate = self.gate(model_tag)
        gate.add_trained()
        self._log.info("weights trained", worker=worker_name, model_tag=model_tag, version=gate.num_trained)

    def _update_of(self, model_tag: str) -> Update:
        update = self._updates.get(model_tag, self._update)
        if update is None:
            raise ConfigurationError(
                f"nothing moves the weights of {shown(model_tag)}: pass update, or call set_update"
            )
        return update

    def _task(self, model_tag: str, version: int) -> WeightUpdate:
        return WeightUpdate(model_tag, version, self.settings.sync_weight_path)

    def _failed(self, model_tag: str, error: Exception) -> WeightsError:
        self._log.error("weight update failed", model_tag=model_tag, error=described(error))
        is_mixed = isinstance(error, WeightsError) and error.is_mixed
        return WeightsError(f"updating the weights of {shown(model_tag)} failed: {described(error)}", is_mixed=is_mixed)


async def _awaited(awaitable: Awaitable[object]) -> object:
    return await awaitable
