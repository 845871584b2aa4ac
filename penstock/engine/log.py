"""Structured log events of one engine, through the standard `logging` logger "penstock".

Configures nothing global: what is shown, and where, is the program's own choice (`logging.basicConfig(level=...)`).
"""

from __future__ import annotations

import logging
from typing import Any

import structlog

Logger = Any


def make_logger(level: str) -> Logger:
    """A structlog logger whose events below `level` cost next to nothing."""
    return structlog.wrap_logger(
        logging.getLogger("penstock"),
        wrapper_class=structlog.make_filtering_bound_logger(level),
        processors=[structlog.processors.KeyValueRenderer(key_order=["event"], drop_missing=True)],
        context_class=dict,
    ).bind()
