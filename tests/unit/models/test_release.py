"""Memory that an engine releases is free at once, without a full garbage collection."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
from torch import nn

from penstock.config import EngineConfig
from penstock.models.borrow import view_of
from penstock.models.loading import load
from tests.tiny_models import build


@pytest.fixture
def collections() -> Iterator[list[int]]:
    """The generations that are collected on demand; none is by itself."""
    generations: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            generations.append(info["generation"])

    gc.disable()
    gc.callbacks.append(note)
    yield generations
    gc.callbacks.remove(note)
    gc.enable()


def test_closing_frees_a_model_without_a_full_collection(
    collections: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing an engine, or its trim while idle, stopped the program's event loop for 0.2 s or more."""
    parts: list[weakref.ref[object]] = []

    def watched(module: nn.Module) -> nn.Module:
        view = view_of(module)
        parts.extend(weakref.ref(part) for part in (*view.modules(), *view.buffers()))
        return view

    monkeypatch.setattr("penstock.models.borrow.view_of", watched)
    runner = load(build("llama"), None, EngineConfig(skip_tokenizer_init=True, weight_mode="packed")).runner
    runner.allocate(4, 16)
    runner.close()
    assert parts
    assert [part() for part in parts if part() is not None] == []
    assert 2 not in collections
