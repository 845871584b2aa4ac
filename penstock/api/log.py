"""Structured log events of one engine, through the standard `logging` logger "penstock".

Configures nothing global: what is shown, and where, is the program's own choice (`logging.basicConfig(level=...)`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

Logger = Any


def make_logger(level: str) -> Logger:
    """A structlog logger whose events below `level` cost next to nothing."""
    import structlog  # here, because it imports rich: a sixth of the time that importing the package takes

    return structlog.wrap_logger(
        _Unfailing(logging.getLogger("penstock")),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        processors=[structlog.processors.KeyValueRenderer(key_order=["event"], drop_missing=True)],
        context_class=dict,
    ).bind()


class _Unfailing:
    """A standard logger, whose filters and handlers are the program's own: what they raise stays with them."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def __getattr__(self, level: str) -> Callable[..., None]:
        write = getattr(self._logger, level)

        def log(*args: Any, **options: Any) -> None:
            with contextlib.suppress(Exception):
                write(*args, **options)

        return log
