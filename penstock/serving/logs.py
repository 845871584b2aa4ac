"""The access log: one structured event per HTTP request, on the `logging` logger "penstock.serving".

Configures nothing; the program, or `penstock serve`, decides where events go. Never holds text of a request.
"""

from __future__ import annotations

import logging

from penstock.api.log import Logger


def access_logger() -> Logger:
    """A structlog logger whose events are lines of JSON."""
    import structlog

    return structlog.wrap_logger(
        logging.getLogger("penstock.serving"),
        wrapper_class=structlog.stdlib.BoundLogger,
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
    )
