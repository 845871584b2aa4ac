"""Structured log events of one engine, written to the standard `logging` logger "penstock".

Never configures logging: the program decides what is shown and where (`logging.basicConfig(level=...)`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

Logger = Any


def make_logger(level: str) -> Logger:
    """A structlog logger. Events below `level` cost almost nothing."""
    import structlog  # imported here because it imports rich, a sixth of the package's import time

    return structlog.wrap_logger(
        _Unfailing(logging.getLogger("penstock")),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        processors=[structlog.processors.KeyValueRenderer(key_order=["event"], drop_missing=True)],
        context_class=dict,
    ).bind()


class _Unfailing:
    """A standard logger that suppresses exceptions of the program's own filters and handlers."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def __getattr__(self, level: str) -> Callable[..., None]:
        write = getattr(self._logger, level)

        def log(*args: Any, **options: Any) -> None:
            with contextlib.suppress(Exception):
                write(*args, **options)

        return log
