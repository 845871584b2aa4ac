"""Structured log events of one engine, written to the standard `logging` logger "penstock".

Never configures logging: the program decides what is shown and where (`logging.basicConfig(level=...)`). If it decides
nothing, events of an engine that was asked for them (`log_level`, `profile_performance`) go to stderr; otherwise Python
shows its warnings.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, MutableMapping
from typing import Any

from penstock.config import EngineConfig

Logger = Any
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def engine_logger(config: EngineConfig) -> Logger:
    """The logger of an engine with this configuration."""
    is_explicit = "log_level" in config.model_fields_set or config.profile_performance
    return make_logger(config.log_level, is_explicit=is_explicit)


def make_logger(level: str, *, is_explicit: bool = False) -> Logger:
    """A structlog logger. Events below `level` cost almost nothing. `is_explicit`: the caller asked for events."""
    import structlog  # imported here because it imports rich, a sixth of the package's import time

    return structlog.wrap_logger(
        _Unfailing(logging.getLogger("penstock"), _stderr_logger() if is_explicit else None),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        processors=[_render],
        context_class=dict,
    ).bind()


def _render(logger: object, level: str, event: MutableMapping[str, Any]) -> str:
    """An event as a line: `step failed (rows=3, error='...')`."""
    text = event.pop("event", "")
    values = [
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value!r}" for name, value in event.items()
    ]
    return f"{text} ({', '.join(values)})" if values else str(text)


class _Unfailing:
    """A standard logger that suppresses exceptions of the program's own filters and handlers.

    While the program has configured nothing, events go to `fallback` if there is one.
    """

    def __init__(self, logger: logging.Logger, fallback: logging.Logger | None = None) -> None:
        self._logger = logger
        self._fallback = fallback

    def __getattr__(self, level: str) -> Callable[..., None]:
        def log(*args: Any, **options: Any) -> None:
            with contextlib.suppress(Exception):
                logger = self._logger
                is_configured = logger.hasHandlers() or logger.level != logging.NOTSET or logger.disabled
                if self._fallback is not None and not is_configured:
                    logger = self._fallback
                getattr(logger, level)(*args, **options)

        return log


def _stderr_logger() -> logging.Logger:
    """A logger beside those of `logging`, so that no other code sees it."""
    logger, handler = logging.Logger("penstock"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter(FORMAT))
    logger.addHandler(handler)
    return logger
