"""The native engine and the echo engine both fulfil the contract."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock import InferenceEngine, RequestError, ScriptedModel
from penstock.api.protocols import Engine, Scorer
from penstock.testing.contract import EngineContract
from penstock.testing.training import TrainableContract, TrainableEngine
from tests.unit.testing.echo import EchoEngine


class TestNativeEngine(EngineContract):
    def make_engine(self) -> Engine:
        return InferenceEngine(ScriptedModel(lambda tokens, index: len(tokens) % 30, vocab_size=32, step_s=0.001))


class TestTrainableNativeEngine(TrainableContract):
    def make_engine(self) -> TrainableEngine:
        return InferenceEngine(ScriptedModel(lambda tokens, index: len(tokens) % 30, vocab_size=32, step_s=0.001))


class TestEchoEngine(EngineContract):
    def make_engine(self) -> Engine:
        return EchoEngine()


def test_the_native_engine_scores_and_an_echo_does_not_have_to() -> None:
    scorer: Scorer = InferenceEngine(ScriptedModel([1]))
    assert isinstance(scorer, Scorer)
    assert not isinstance(EchoEngine(), Scorer)


def test_an_engine_without_forks_raises() -> None:
    engine = EchoEngine()
    with pytest.raises(RequestError, match="cannot fork"):
        engine.generate([1, 2]).fork()
    engine.stop(0)


def test_the_echo_engine_is_short() -> None:
    source = (Path(__file__).parent / "echo.py").read_text()
    body = source[source.index("class EchoEngine") :]
    assert sum(bool(line.strip()) for line in body.splitlines()) <= 80
