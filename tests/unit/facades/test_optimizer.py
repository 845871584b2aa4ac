"""`PerformanceOptimizer` returns the type that it was given; a scripted model repeats 5, 6, 7."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from penstock import OptimizationConfig
from penstock.errors import RequestError
from penstock.facades.optimizer import PerformanceOptimizer
from penstock.models.scripted import ScriptedModel


@pytest.fixture
def optimizer() -> Iterator[PerformanceOptimizer]:
    """An optimizer that returns one completion of each prompt."""
    made = PerformanceOptimizer(ScriptedModel([5, 6, 7], vocab_size=32, max_length=64))
    yield made
    made.stop()


def test_lists_come_back_as_lists(optimizer: PerformanceOptimizer) -> None:
    assert optimizer.optimized_generate([[1, 2], [3]], 2)[0] == [[1, 2, 5, 6], [3, 5, 6]]
    assert optimizer.optimized_generate([1, 2], 2)[0] == [[1, 2, 5, 6]]


def test_arrays_come_back_as_arrays_of_their_type_padded_at_the_end(optimizer: PerformanceOptimizer) -> None:
    mask = [[1, 1], [0, 1]]
    for given in (np.array([[1, 2], [0, 3]], dtype=np.int32), torch.tensor([[1, 2], [0, 3]], dtype=torch.int32)):
        output, _ = optimizer.optimized_generate(given, 2, attention_mask=mask, pad_token_id=31)
        assert type(output) is type(given)
        assert output.dtype == given.dtype
        assert output.tolist() == [[1, 2, 5, 6], [3, 5, 6, 31]]


def test_a_mask_of_another_shape_and_no_prompt_are_refused(optimizer: PerformanceOptimizer) -> None:
    for ids, mask in (([[1, 2]], [[1]]), ([], None)):
        with pytest.raises(RequestError):
            optimizer.optimized_generate(ids, 2, attention_mask=mask)


@pytest.mark.parametrize(
    ("sampling", "num_rows", "num_candidates"), [({}, 1, 4), ({"top_k": 5}, 1, 4), ({"n": 3}, 3, 3)], ids=str
)
def test_asking_for_a_number_of_completions_replaces_the_number_of_candidates(
    sampling: dict[str, Any], num_rows: int, num_candidates: int
) -> None:
    config = OptimizationConfig(enable_parallel_sampling=True, num_parallel_samples=4)
    made = PerformanceOptimizer(ScriptedModel([5, 6, 7], vocab_size=32, max_length=64), config)
    rows, stats = made.optimized_generate([[1, 2]], 2, **sampling)
    made.stop()
    assert (len(rows), stats["num_candidates"]) == (num_rows, num_candidates)
