"""The arithmetic of `benchmarks/speculation_bound.py`, and requests that are the same on every run."""

from __future__ import annotations

from typing import Any

import pytest

import speculation_bound
from speculation_bound import Ratios


class Letters:
    """A tokenizer of characters, without a chat template."""

    chat_template = None

    def __len__(self) -> int:
        return 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(ids).decode(errors="ignore")


def test_ratio_is_the_median_and_its_error_shrinks_with_the_root_of_the_pairs() -> None:
    few, many = Ratios([0.9, 1.0, 1.1]), Ratios([0.9, 1.0, 1.1] * 4)
    assert few.median == many.median == 1.0
    assert few.error == pytest.approx(1.2533 * 1.4826 * 0.1 / 3**0.5)
    assert many.error == pytest.approx(few.error / 2)


@pytest.mark.parametrize(
    ("ratios", "holds"),
    [([0.98, 0.98, 0.98], True), ([0.96, 0.96, 0.96], False), ([0.86, 0.96, 1.06], True), ([1.4, 1.5], True)],
)
def test_bound_fails_where_a_ratio_is_below_it_by_more_than_its_error(ratios: list[float], holds: bool) -> None:
    assert Ratios(ratios).holds is holds


@pytest.mark.parametrize("workload", speculation_bound.WORKLOADS)
def test_requests_are_the_same_on_every_run_and_differ_from_each_other(workload: str) -> None:
    first, second = (speculation_bound.requests(workload, Letters(), 2, 3, 16) for _ in range(2))
    assert first == second
    assert [len(batch) for batch in first] == [2, 2, 2]
    assert len({tuple(prompt) for batch in first for prompt, _ in batch}) == 6


def test_summary_holds_what_the_exit_status_follows_from() -> None:
    summary = speculation_bound.summary({"chat, 1": Ratios([0.9, 0.9, 0.9])})
    assert summary == {"chat, 1": {"ratio": 0.9, "error": 0.0, "holds": False, "ratios": [0.9, 0.9, 0.9]}}
