"""Structured log events of one engine, written to the standard `logging` logger "penstock".

Never configures logging: the program decides what is shown and where (`logging.basicConfig(level=...)`). If it decides
nothing, events of an engine whose `log_level` was given go to stderr; otherwise Python shows its warnings.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

Logger = Any
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def make_logger(level: str, *, is_explicit: bool = False) -> Logger:
    """A structlog logger. Events below `level`, which the caller may have given, cost almost nothing."""
    import structlog  # imported here because it imports rich, a sixth of the package's import time

    return structlog.wrap_logger(
        _Unfailing(logging.getLogger("penstock"), _stderr_logger() if is_explicit else None),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        processors=[structlog.processors.KeyValueRenderer(key_order=["event"], drop_missing=True)],
        context_class=dict,
    ).bind()


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
                is_configured = self._logger.hasHandlers() or self._logger.level != logging.NOTSET
                logger = self._logger if is_configured or self._fallback is None else self._fallback
                getattr(logger, level)(*args, **options)

        return log


def _stderr_logger() -> logging.Logger:
    """A logger beside those of `logging`, so that no other code sees it."""
    logger, handler = logging.Logger("penstock"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter(FORMAT))
    logger.addHandler(handler)
    return logger
