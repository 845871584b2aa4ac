"""Two replicas behind one queue fulfil the contracts of an engine."""

from __future__ import annotations

from penstock import ReplicatedEngine, ScriptedModel
from penstock.api.protocols import Engine
from penstock.testing.contract import EngineContract
from penstock.testing.training import TrainableContract, TrainableEngine


def make_engine() -> ReplicatedEngine:
    models = [ScriptedModel(lambda tokens, index: len(tokens) % 30, vocab_size=32, step_s=0.001) for _ in range(2)]
    return ReplicatedEngine(models)


class TestReplicatedEngine(EngineContract):
    def make_engine(self) -> Engine:
        return make_engine()


class TestTrainableReplicatedEngine(TrainableContract):
    def make_engine(self) -> TrainableEngine:
        return make_engine()
