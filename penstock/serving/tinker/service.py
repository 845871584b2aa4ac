"""`TinkerService`: the state behind the Tinker SDK's routes: sessions, models in training, saved adapters, futures.

Trains through an `AdapterTrainer` and samples through an engine `WithAdapters`, which share one base module. Made by
the program, and passed to `app`. Runs on the server's loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from penstock.api.prompt import Prompt
from penstock.api.protocols import Completion, WithAdapters
from penstock.errors import ConfigurationError, RequestError, shown
from penstock.scores import Score
from penstock.serving.tinker.adapters import LoadedAdapters
from penstock.serving.tinker.checkpoints import Checkpoints
from penstock.serving.tinker.futures import Futures, Work
from penstock.serving.tinker.sessions import Clock, Run, Session, Sessions, monotonic
from penstock.serving.tinker.settings import TinkerSettings
from penstock.serving.tinker.training import TrainingThread
from penstock.training.lora.records import AdapterTrainer


class AdapterEngine(WithAdapters, Protocol):
    """An engine that samples from adapters and scores with them, as the native one does."""

    async def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        *,
        logits: bool,
        namespace: str,
        adapter: str,
    ) -> list[Score]:
        """As `Scorer.score`."""
        ...


class TinkerService:
    """One service over one engine and one trainer. Raises `ConfigurationError` for an engine without adapters."""

    def __init__(
        self,
        engine: AdapterEngine,
        trainer: AdapterTrainer,
        settings: TinkerSettings | None = None,
        *,
        clock: Clock = monotonic,
    ) -> None:
        if not isinstance(engine, WithAdapters):
            raise ConfigurationError(f"{type(engine).__name__} has no adapters to sample from: use the native engine")
        self.engine = engine
        self.trainer = trainer
        self.settings = settings or TinkerSettings()
        self.futures = Futures(self.settings.max_pending, self.settings.max_answer_bytes)
        self.sessions = Sessions(self.settings, self.futures.is_busy, clock)
        self.checkpoints = Checkpoints(self.settings.folder)
        self.adapters = LoadedAdapters(engine, self.settings.max_loaded_adapters)
        self.thread = TrainingThread()
        self._base_model: str | None = None
        self._watch: asyncio.Task[None] | None = None

    @property
    def base_model(self) -> str:
        """The hub id or folder of the base model, from which a client can load the tokenizer."""
        if self._base_model is None:
            name = str(self.engine.get_stats().get("model") or "penstock")
            self._base_model = _loadable(name)
        return self._base_model

    def check_base_model(self, name: str, names: tuple[str, ...]) -> str:
        """The base model by any of its names, as clients are told it. Raises `RequestError` for another one."""
        if name.rstrip("/") == self.base_model.rstrip("/") or name in names:
            return self.base_model
        served = ", ".join((self.base_model, *names))
        raise RequestError(f"base_model {shown(name)} is not served here: this server has {served}")

    def submit(self, request_id: str, session: Session, work: Work, *, can_be_cancelled: bool = False) -> str:
        """Run the work of a request, once: one that was sent again is the same.

        A client that could cancel a pass of training would have the next step made without its data.
        """
        if request_id in self.futures:
            work.close()
        else:
            self.futures.start(request_id, session.id, session.owner, work, can_be_cancelled=can_be_cancelled)
        return request_id

    def watch(self) -> None:
        """End sessions whose clients are gone, as long as there are any."""
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._end_expired_sessions(), name="tinker sessions")

    async def _end_expired_sessions(self) -> None:
        while self.sessions.all():
            await asyncio.sleep(self.settings.session_timeout_s / 4)
            await self.end_expired()

    async def end(self, session: Session) -> None:
        """End a session: its requests, its models, and what they saved without a name."""
        self.sessions.end(session)
        self.futures.drop(session.id)
        for run in session.runs.values():
            await self._drop(session.owner, run)

    async def end_expired(self) -> None:
        """End the sessions whose clients are gone."""
        for session in list(self.sessions.expired()):
            await self.end(session)

    async def close(self) -> None:
        """End all sessions, and the training thread."""
        if self._watch is not None:
            self._watch.cancel()
        for session in self.sessions.all():
            await self.end(session)
        await asyncio.to_thread(self.thread.close)
        self.checkpoints.close()

    async def _drop(self, owner: str, run: Run) -> None:
        run.adapter = None
        for weights in (*run.snapshots, *([] if run.inflight is None else [run.inflight])):
            await self.adapters.unload(weights)
        self.thread.post(owner, lambda: self.checkpoints.drop_snapshots(run.id))


def _loadable(name: str) -> str:
    """The name under which the SDK loads a tokenizer. It takes `a/b/c` for a variant of `a/b`, which no folder is."""
    if not Path(name).is_dir():
        return name
    path = str(Path(name).resolve())
    return f"{path}/" if path.count("/") == 2 else path
