"""Log events use the program's own logging, whose exceptions do not reach the engine."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from penstock import InferenceEngine, SamplingParams, ScriptedModel
from penstock.api.log import make_logger


class Broken(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        raise RuntimeError("no disk")


PROGRAM = """
import logging, sys
from penstock import EngineConfig, InferenceEngine, SamplingParams, ScriptedModel

def serve(**settings):
    engine = InferenceEngine(ScriptedModel([5, 6]), **settings)
    engine.generate([1], SamplingParams(max_tokens=2)).result(30)
    engine.stop(0)

before = vars(logging.getLogger("penstock")).copy(), vars(logging.root).copy()
{body}
assert (vars(logging.getLogger("penstock")), vars(logging.root)) == before or "basicConfig" in {body!r}
"""


def stderr_of(body: str, **environment: str) -> list[str]:
    """The lines of our logger that a program prints to stderr, in an interpreter without handlers."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(body=body)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stderr.splitlines() if "penstock" in line]


def count(text: str, lines: list[str]) -> int:
    return sum(text in line for line in lines)


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
    assert [record.message for record in caplog.records] == ["loaded (seconds=3)"]


def test_a_filter_that_raises_ends_no_engine(broken: None) -> None:
    """It was called at the end of a request, and its exception ended the engine."""
    engine = InferenceEngine(ScriptedModel([5, 6]), log_level="DEBUG")
    assert engine.generate([1], SamplingParams(max_tokens=2)).result(30).generated_ids == [5, 6]
    assert engine.generate([1], SamplingParams(max_tokens=1)).result(30).generated_ids == [5]
    engine.stop(0)


def test_profile_performance_prints_every_step_in_a_program_without_handlers() -> None:
    lines = stderr_of("serve(profile_performance=True)")
    assert count("step (", lines) == 2
    assert all(" INFO penstock: " in line for line in lines)


def test_an_explicit_log_level_prints_in_a_program_without_handlers() -> None:
    assert count("DEBUG penstock: request ended", stderr_of("serve(log_level='DEBUG')")) == 1
    assert count("request ended (", stderr_of("serve()", PENSTOCK_LOG_LEVEL="DEBUG")) == 1
    assert stderr_of("serve(log_level='ERROR')") == []


def test_an_engine_that_was_not_asked_prints_nothing() -> None:
    assert stderr_of("serve()") == []
    assert count("step (", stderr_of("serve(profile_performance=True); serve(); serve()")) == 2


@pytest.mark.parametrize("order", ["basicConfig(level='DEBUG'); serve({0})", "serve({0}); basicConfig(level='DEBUG')"])
def test_a_program_with_handlers_gets_no_line_twice(order: str) -> None:
    body = order.format("log_level='DEBUG', profile_performance=True").replace("basicConfig", "logging.basicConfig")
    lines = stderr_of(body)
    assert count("request ended (", lines) == 1
    assert count("step (", lines) == 2


def test_handlers_that_a_program_adds_later_take_over() -> None:
    """The same engine: the first request is printed by the engine, the second by the program."""
    lines = stderr_of("""
engine = InferenceEngine(ScriptedModel([5]), log_level="DEBUG")
engine.generate([1], SamplingParams(max_tokens=1)).result(30)
engine.optimize_memory()  # the engine's thread has ended the request before this
logging.basicConfig(level="DEBUG", format="mine %(name)s %(message)s")
engine.generate([1], SamplingParams(max_tokens=1)).result(30)
engine.stop(5)
""")
    ended = [line.startswith("mine") for line in lines if "request ended (" in line]
    assert ended == [False, True]


@pytest.mark.parametrize(
    "silence",
    [
        "logging.getLogger('penstock').setLevel('ERROR')",
        "logging.getLogger('penstock').addHandler(logging.NullHandler())",
        "logging.getLogger('penstock').disabled = True",
        "logging.disable()",
        "logging.basicConfig(level='WARNING')",
    ],
)
def test_a_program_that_silenced_the_logger_stays_silent(silence: str) -> None:
    assert (
        stderr_of(
            f"{silence}; before = vars(logging.getLogger('penstock')).copy(), vars(logging.root).copy()\n"
            "serve(log_level='DEBUG', profile_performance=True)"
        )
        == []
    )


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
    assert line.endswith(" DEBUG penstock: step (seconds=3)")
    assert logging.getLogger("penstock").handlers == []


def test_a_program_that_sets_a_level_of_its_own_is_not_overruled(capsys: pytest.CaptureFixture[str]) -> None:
    with no_configuration():
        logging.getLogger("penstock").setLevel(logging.ERROR)
        make_logger("DEBUG", is_explicit=True).debug("step")
        logging.getLogger("penstock").setLevel(logging.NOTSET)
    assert capsys.readouterr().err == ""
