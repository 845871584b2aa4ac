"""Log events use the program's own logging, whose exceptions do not reach the engine."""

from __future__ import annotations

import contextlib
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


@contextlib.contextmanager
def no_configuration() -> Iterator[None]:
    """The logging of a program that configures none; pytest adds its handlers before each test."""
    root, handlers = logging.getLogger(), logging.getLogger().handlers[:]
    for handler in handlers:
        root.removeHandler(handler)
    yield
    for handler in handlers:
        root.addHandler(handler)


def test_a_level_that_was_given_prints_where_the_program_configures_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with no_configuration():
        make_logger("DEBUG", is_explicit=True).debug("step", seconds=3)
        make_logger("INFO", is_explicit=True).debug("below the level")
        make_logger("DEBUG").debug("level not given")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(" DEBUG penstock: event='step' seconds=3")
    assert logging.getLogger("penstock").handlers == []


def test_a_program_that_sets_a_level_of_its_own_is_not_overruled(capsys: pytest.CaptureFixture[str]) -> None:
    with no_configuration():
        logging.getLogger("penstock").setLevel(logging.ERROR)
        make_logger("DEBUG", is_explicit=True).debug("step")
        logging.getLogger("penstock").setLevel(logging.NOTSET)
    assert capsys.readouterr().err == ""
