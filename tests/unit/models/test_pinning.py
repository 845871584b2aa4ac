"""Within pinned defaults, no tensor that is created or computed has the process's default dtype."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from penstock.models.pinning import PinnedDefaults

NUMBERS = torch.arange(1, 5)
BF16, F16, F32, F64, I64 = torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64

MADE: dict[str, tuple[Callable[[], Tensor], torch.dtype]] = {
    "zeros": (lambda: torch.zeros(2), BF16),
    "empty with dtype=None": (lambda: torch.empty(2, dtype=None), BF16),
    "normal": (lambda: torch.normal(0.0, 1.0, (2,)), BF16),
    "floats": (lambda: torch.tensor([1, 2.0]), BF16),
    "integers": (lambda: torch.tensor([1, 2]), I64),
    "NumPy's floats": (lambda: torch.tensor(np.ones(2)), F64),
    "a dtype of its own": (lambda: torch.full((2,), 1.0, dtype=F16), F16),
    "full of an integer": (lambda: torch.full((2,), 1), I64),
    "full of a float": (lambda: torch.full((2,), 1.0), BF16),
    "arange": (lambda: torch.arange(3), I64),
    "arange of floats": (lambda: torch.arange(0.0, 3.0), BF16),
    "like another": (lambda: torch.zeros_like(NUMBERS), I64),
    "a layer": (lambda: nn.Linear(2, 2).weight, BF16),
    "a norm": (lambda: nn.LayerNorm(2).weight, BF16),
    "division of integers": (lambda: NUMBERS / 3, BF16),
    "by integers": (lambda: 3 / NUMBERS, BF16),
    "whole division": (lambda: NUMBERS // 3, I64),
    "rounded division": (lambda: torch.div(NUMBERS, 3, rounding_mode="floor"), I64),
    "times a float": (lambda: 1.5 * NUMBERS, BF16),
    "times an integer": (lambda: 2 * NUMBERS, I64),
    "a float's powers": (lambda: 2.0**NUMBERS, BF16),
    "a root": (lambda: NUMBERS.sqrt(), BF16),
    "a conversion": (lambda: NUMBERS.float() / 3, F32),
    "floats with floats": (lambda: torch.ones(2, dtype=F64) * 1.5, F64),
}


@pytest.fixture(params=[F32, F64], ids=str)
def process_default(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(F32)


@pytest.mark.usefixtures("process_default")
@pytest.mark.parametrize(("make", "dtype"), MADE.values(), ids=MADE)
def test_the_pinned_dtype_takes_the_place_of_the_default(make: Callable[[], Tensor], dtype: torch.dtype) -> None:
    with PinnedDefaults(BF16):
        assert make().dtype == dtype


def test_results_are_those_of_a_process_with_that_default() -> None:
    """They are not computed in the process's dtype and rounded afterwards."""
    expected = NUMBERS / 3
    torch.set_default_dtype(BF16)
    try:
        with PinnedDefaults(F32):
            assert torch.equal(NUMBERS / 3, expected)
    finally:
        torch.set_default_dtype(F32)


def test_a_device_is_pinned_where_one_is_given() -> None:
    with PinnedDefaults(F32, "meta"):
        assert torch.arange(3).is_meta
        assert nn.Linear(2, 2).weight.is_meta
        assert torch.zeros(2, device="cpu").device.type == "cpu"


def test_other_threads_are_not_affected() -> None:
    results: list[tuple[torch.dtype, str]] = []

    def look() -> None:
        tensor = torch.zeros(1)
        results.append((tensor.dtype, tensor.device.type))

    with PinnedDefaults(BF16, "meta"):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert results == [(F32, "cpu")]
