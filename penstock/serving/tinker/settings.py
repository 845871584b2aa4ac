"""`TinkerSettings`: the settings of the service for the Tinker SDK."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from penstock.values import integer, real, refused


def default_folder() -> Path:
    """Where saved adapters are kept: in the user's folder for data."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "penstock" / "tinker"


def physical_bytes() -> int:
    """The memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class TinkerSettings:
    """`folder` holds saved adapters. A session without a sign of life for `session_timeout_s` ends.

    At most `max_loaded_adapters` that nobody samples from stay in the engine; others are read again from their files.
    Of each model in training, the newest `max_snapshots` that were made without a name are kept, and of each session
    the `max_samplers` that were used last. Models in training may have `max_model_bytes` together, with gradients and
    the state of their optimizers; by default half of the machine's memory. At most `max_pending` requests are under
    way, and answers of at most `max_answer_bytes` are kept until they are read. Raises `RequestError`.
    """

    folder: Path = field(default_factory=default_folder)
    session_timeout_s: float = 600.0
    max_sessions: int = 256
    max_models: int = 64
    max_model_bytes: int = field(default_factory=lambda: physical_bytes() // 2)
    max_loaded_adapters: int = 16
    max_snapshots: int = 32
    max_samplers: int = 1024
    max_pending: int = 4096
    max_answer_bytes: int = 512 << 20

    def __post_init__(self) -> None:
        if not isinstance(self.folder, Path):
            raise refused("folder", self.folder, "a pathlib.Path")
        real("session_timeout_s", self.session_timeout_s, 1.0, 1e9, "a number of seconds >= 1")
        for name in (
            "max_sessions",
            "max_models",
            "max_model_bytes",
            "max_loaded_adapters",
            "max_snapshots",
            "max_samplers",
            "max_pending",
        ):
            integer(name, getattr(self, name), 1, 1 << 60, "an integer >= 1")
        integer("max_answer_bytes", self.max_answer_bytes, 1 << 16, rule="an integer >= 65536")
