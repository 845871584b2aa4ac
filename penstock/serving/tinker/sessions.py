"""`Session` and its parts: models in training, and samplers. `Sessions` ends those whose clients are gone.

Owns ids, owners and signs of life. A session ends when its client says so or is silent for too long; nothing of it can
be used from then on. Runs on the server's loop only.
"""

from __future__ import annotations

import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from penstock.errors import shown
from penstock.serving.errors import HttpError
from penstock.serving.tinker.adapters import Weights
from penstock.serving.tinker.settings import TinkerSettings
from penstock.serving.tinker.shares import Places
from penstock.training.lora.records import TrainedAdapter

Clock = Callable[[], float]
MAX_ENDED = 4096  # ids of ended sessions, and in each of forgotten samplers, that are told from unknown ones


@dataclass(slots=True, eq=False)
class Run:
    """A model in training; `adapter` is None until it was made. `snapshots` are what it saved without a name."""

    id: str
    base_model: str
    num_bytes: int  # in training
    adapter: TrainedAdapter | None = None
    last_seq: int = 0
    snapshots: deque[Weights] = field(default_factory=deque)
    inflight: Weights | None = None

    def trained(self) -> TrainedAdapter:
        """The adapter. Raises `HttpError` where making it failed."""
        if self.adapter is None:
            raise HttpError(404, f"the model {self.id} was not created", code="not_found")
        return self.adapter


@dataclass(frozen=True, slots=True, eq=False)
class Sampler:
    """A sampling session: the base model, or a saved adapter of it."""

    id: str
    base_model: str
    weights: Weights | None = None
    path: str | None = None
    is_inflight: bool = False  # its weights are replaced while it samples


@dataclass(slots=True, eq=False)
class Session:
    """What one client of the service has."""

    id: str
    owner: str
    user_metadata: Mapping[str, object] | None
    display_name: str | None
    last_seen: float
    runs: dict[str, Run] = field(default_factory=dict)
    samplers: OrderedDict[str, Sampler] = field(default_factory=OrderedDict)  # in the order of their last use
    forgotten: deque[str] = field(default_factory=lambda: deque(maxlen=MAX_ENDED))  # ids of samplers

    def add_sampler(self, sampler: Sampler, limit: int) -> None:
        """Add a sampler, and forget those beyond `limit` that were not used for the longest time."""
        self.samplers[sampler.id] = sampler
        while len(self.samplers) > limit:
            self.forgotten.append(self.samplers.popitem(last=False)[0])


class Sessions:
    """The open sessions. `is_busy(id)` keeps one alive whose client only waits."""

    def __init__(self, settings: TinkerSettings, is_busy: Callable[[str], bool], clock: Clock) -> None:
        self._timeout_s = settings.session_timeout_s
        self._places = Places("sessions are open", settings.max_sessions, "too_many_sessions", retry_after_s=10)
        # To try again would be in vain: only the client can end them.
        self._models = Places("models are in training", settings.max_models, "too_many_models", "close a session")
        what, remedy = "bytes of models are in training", "close a session, or train a smaller rank"
        self._bytes = Places(what, settings.max_model_bytes, "too_many_models", remedy)
        self._is_busy = is_busy
        self._clock = clock
        self._open: dict[str, Session] = {}
        self._ended: deque[str] = deque(maxlen=MAX_ENDED)

    def create(self, owner: str, user_metadata: Mapping[str, object] | None, display_name: str | None) -> Session:
        """A new session. Raises an `HttpError` beyond the limit."""
        self._places.check(owner, len(self.owned(owner)), len(self._open))
        session = Session(f"session-{uuid.uuid4().hex}", owner, user_metadata, display_name, self._clock())
        self._open[session.id] = session
        return session

    def get(self, session_id: str, owner: str) -> Session:
        """A session, which is a sign of life. Raises an `HttpError`: 410 for one that ended, 404 for an unknown one."""
        session = self._open.get(session_id)
        if session is None or session.owner != owner:
            if self.has_ended(session_id):
                raise HttpError(410, f"the session {session_id} has ended: create a new client", code="session_ended")
            raise HttpError(404, f"there is no session {shown(session_id)}", code="not_found")
        session.last_seen = self._clock()
        return session

    def has_ended(self, session_id: str) -> bool:
        """Whether this was a session."""
        return session_id in self._ended

    def of_part(self, part_id: str, owner: str) -> Session:
        """The session of a model or a sampler, whose ids begin with the session's."""
        return self.get(part_id.partition(":")[0], owner)

    def run(self, model_id: str, owner: str) -> Run:
        """A model in training. Raises an `HttpError`."""
        run = self.of_part(model_id, owner).runs.get(model_id)
        if run is None:
            raise HttpError(404, f"there is no model {shown(model_id)} in training", code="not_found")
        return run

    def sampler(self, sampler_id: str, owner: str) -> Sampler:
        """A sampling session. Raises an `HttpError`."""
        session = self.of_part(sampler_id, owner)
        sampler = session.samplers.get(sampler_id)
        if sampler is None and sampler_id in session.forgotten:
            text = f"the sampling session {sampler_id} was forgotten, others were used later: create a new client"
            raise HttpError(410, text, code="session_ended")
        if sampler is None:
            raise HttpError(404, f"there is no sampling session {shown(sampler_id)}", code="not_found")
        session.samplers.move_to_end(sampler_id)
        return sampler

    def owned(self, owner: str) -> list[Session]:
        """The open sessions of one owner, the newest first."""
        return [session for session in reversed(self._open.values()) if session.owner == owner]

    def check_models(self, owner: str, num_bytes: int) -> None:
        """Raise an `HttpError` where no other model of this owner, of this size, can be trained."""
        held, taken = (
            [run.num_bytes for session in sessions for run in session.runs.values()]
            for sessions in (self.owned(owner), self.all())
        )
        self._models.check(owner, len(held), len(taken))
        self._bytes.check(owner, sum(held), sum(taken), num_bytes)

    def end(self, session: Session) -> None:
        """Let nobody use a session any more."""
        if self._open.pop(session.id, None) is not None:
            self._ended.append(session.id)

    def expired(self) -> Iterator[Session]:
        """The sessions whose clients were silent for too long."""
        limit = self._clock() - self._timeout_s
        for session in list(self._open.values()):
            if session.last_seen < limit and not self._is_busy(session.id):
                yield session

    def all(self) -> list[Session]:
        """All open sessions."""
        return list(self._open.values())


monotonic: Clock = time.monotonic
