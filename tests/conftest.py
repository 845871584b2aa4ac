"""What holds for every test: one thread (the models are tiny), no network, settings and examples of its own.

The environment is set before anything imports PyTorch, so tests that need no model never load it.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

from penstock.config import EngineConfig
from penstock.optimizers.speculation.step_times import StepTimeCurve

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else the library warns whenever a test starts a process
for name in EngineConfig.model_fields:
    os.environ.pop(f"PENSTOCK_{name.upper()}", None)

# ci draws the same examples every time; HYPOTHESIS_PROFILE=explore looks for new ones, many more of them.
settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first: the last one to end keeps few of the other processes waiting."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def steps_cost_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the speculation controller, so that guessing always pays, however slow or busy the machine is."""
    record = StepTimeCurve.record
    monkeypatch.setattr(
        StepTimeCurve, "record", lambda self, tokens, seconds, drafted=False: record(self, tokens, 1, drafted)
    )
