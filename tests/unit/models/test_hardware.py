"""How many threads the kernels get, and that PyTorch keeps to one of its own."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from penstock.config import EngineConfig
from penstock.demo import DRAFT_DIR
from penstock.models.hardware import kernel_threads, use_one_torch_thread
from penstock.models.loading import load_draft
from penstock.models.protocol import ModelSpec


def test_a_configured_number_of_threads_is_used() -> None:
    assert kernel_threads(7) == 7


def test_by_default_there_is_one_thread_per_usable_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert 1 <= kernel_threads(None) <= (os.cpu_count() or 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert kernel_threads(None) == 1


def test_one_torch_thread_here_leaves_other_threads_unchanged() -> None:
    counts: list[int] = []

    def run() -> None:
        torch.set_num_threads(2)
        use_one_torch_thread()
        counts.append(torch.get_num_threads())
        later = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
        later.start()
        later.join()

    before = torch.get_num_threads()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    torch.set_num_threads(before)
    assert counts == [1, 2]


def test_a_draft_model_leaves_the_large_one_its_threads() -> None:
    """They run on the same thread, and a large model without rewrites computes with PyTorch's own."""
    counts: list[int] = []

    def run() -> None:
        torch.set_num_threads(2)
        target = ModelSpec(name="large", vocab_size=4096, max_length=2048)
        load_draft(str(DRAFT_DIR), target, EngineConfig()).close()
        counts.append(torch.get_num_threads())

    before = torch.get_num_threads()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    torch.set_num_threads(before)
    assert counts == [2]
