"""How the parts of a score become one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from penstock.scores import Score, ScorePart, joined


def part(begin: int, length: int, with_logits: bool = True) -> ScorePart:
    values = np.arange(begin, begin + length, dtype=np.float32)
    return ScorePart(begin, Score(values, None, np.stack([values, -values], 1) if with_logits else None, values * 2))


def test_parts_are_joined_in_order_and_let_go() -> None:
    parts = [part(0, 3), part(3, 1), part(4, 5)]
    score = joined(parts)
    assert parts == []
    assert score.logprobs.tolist() == [*range(9)]
    assert score.entropies.tolist() == [*range(0, 18, 2)]
    assert score.logits.shape == (9, 2)
    assert score.logits[:, 1].tolist() == [-i for i in range(9)]
    assert score.tempered is None
    assert len(score) == 9


def test_a_single_part_is_not_copied() -> None:
    only = part(0, 4)
    whole = joined([only])
    assert (whole.logprobs is only.score.logprobs, whole.entropies is only.score.entropies) == (True, True)


def test_a_whole_has_the_version_of_its_parts() -> None:
    assert joined([replace(part(0, 4), weight_version=3)]).weight_version == 3
    assert joined([replace(part(begin, 2), weight_version=3) for begin in (0, 2)]).weight_version == 3
