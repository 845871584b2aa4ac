"""Log events use the program's own logging, whose exceptions do not reach the engine."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from penstock import InferenceEngine, SamplingParams, ScriptedModel
from penstock.api.log import make_logger


class Broken(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        raise RuntimeError("no disk")


@pytest.fixture
def broken() -> Iterator[None]:
    """A filter of the program that raises."""
    logger, broken = logging.getLogger("penstock"), Broken()
    logger.addFilter(broken)
    logger.setLevel(logging.DEBUG)
    yield
    logger.removeFilter(broken)
    logger.setLevel(logging.NOTSET)


def test_events_reach_the_logger(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "penstock"):
        make_logger("INFO").info("loaded", seconds=3)
        make_logger("ERROR").info("unheard")
    assert [record.message for record in caplog.records] == ["event='loaded' seconds=3"]


def test_a_filter_that_raises_ends_no_engine(broken: None) -> None:
    """It was called at the end of a request, and its exception ended the engine."""
    engine = InferenceEngine(ScriptedModel([5, 6]), log_level="DEBUG")
    assert engine.generate([1], SamplingParams(max_tokens=2)).result(30).generated_ids == [5, 6]
    assert engine.generate([1], SamplingParams(max_tokens=1)).result(30).generated_ids == [5]
    engine.stop(0)
