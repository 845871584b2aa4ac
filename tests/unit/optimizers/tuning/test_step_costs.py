"""StepCosts fitted to records of steps whose costs are known."""

from __future__ import annotations

import random

import pytest

from penstock.config import EngineConfig
from penstock.optimizers.tuning.step_costs import StepCosts, costs_of, fit, line, medians, quantile, solve, spread
from penstock.optimizers.tuning.tuner import initial_limits, tune
from penstock.optimizers.tuning.window import StepWindow
from penstock.step import StepRecord


def step(streams: int, beside: int = 0, depth: float = 0.0, noise: float = 1.0) -> StepRecord:
    """25 ms, 2 per stream, and half a millisecond per prompt token: at a depth of 1,000 twice that, plus 5 ms."""
    prompt = 0.005 * depth / 1000 + beside * (0.0005 + 0.0005 * depth / 1000) if beside else 0.0
    seconds = noise * (0.025 + 0.002 * streams + prompt)
    return StepRecord(seconds, streams + (beside > 0), streams, streams + beside, beside, depth, streams, 0)


def costs_from(records: list[StepRecord]) -> StepCosts:
    costs = costs_of(records)
    assert costs is not None
    return costs


def test_costs_are_recovered_from_records() -> None:
    costs = costs_from([step(2), step(4), step(4, 20), step(4, 10, 1000), step(4, 10, 500), step(4, 25, 700)])
    assert costs.streams == 4
    assert costs.streams_s == pytest.approx(0.033)
    assert costs.stream_s == pytest.approx(0.002)
    assert costs.token_at(0) == pytest.approx(0.0005, rel=0.01)
    assert costs.token_at(2000) == pytest.approx(0.0015, rel=0.01)
    assert costs.prompt_s * 1000 == pytest.approx(0.005, rel=0.01)
    assert costs.noise == pytest.approx(1.0, rel=0.01)
    assert (costs.max_streams, costs.max_prompt_tokens) == (4, 25)
    assert costs.seconds(3, 7, 400) == pytest.approx(step(3, 7, 400).seconds, rel=0.01)


def test_nearly_all_steps_stay_within_the_noise_factor() -> None:
    rng, window = random.Random(1), StepWindow()
    for _ in range(1500):
        window.add(step(4, rng.choice([0, 12]), rng.uniform(900, 1000), 1 + abs(rng.gauss(0, 0.05))))
    records = window.records()
    costs = costs_of(records, window.scatter)
    assert costs is not None
    bounds_s = [costs.noise * costs.seconds(4, record.prompt_tokens, record.depth) for record in records]
    num_within = sum(record.seconds <= seconds for record, seconds in zip(records, bounds_s, strict=True))
    assert num_within >= 0.97 * len(records)
    assert 1.05 < costs.noise < 1.25


def test_a_stall_changes_nothing() -> None:
    records = [step(4), step(4, 16, 100), step(4, 8, 900), step(4, 12, 500)] * 8
    stalls = [step(4, noise=6.0), step(4, 12, 500, noise=4.0)]
    with_stalls, usual = costs_from([*records, *stalls, *records]), costs_from([*records, *records])
    assert with_stalls.noise == pytest.approx(usual.noise, rel=0.01)
    assert with_stalls.seconds(4, 12, 600) == pytest.approx(usual.seconds(4, 12, 600), rel=0.01)
    assert spread([1.0] * 50 + [6.0, 4.0]) == 1.0


def test_a_machine_that_slows_down_shows_at_once() -> None:
    records = [step(4), step(4, 16, 100), step(4, 8, 900), step(4, 12, 500)] * 8
    assert costs_from([*records, *[step(4, 12, 500, noise=1.4)] * 4]).noise == pytest.approx(1.3, rel=0.1)


def test_without_a_step_of_streams_alone_nothing_is_known() -> None:
    assert costs_of([]) is None
    assert costs_of([step(0, 500), step(3, 20)]) is None


def test_without_prompts_their_cost_is_unknown() -> None:
    costs = costs_from([step(2), step(2)])
    assert (costs.token_s, costs.token_at(100), costs.prompt_s) == (0.0, 0.0, 0.0)
    assert costs.stream_s == pytest.approx(0.029 / 4), "expensive, until more of them were tried"


def test_line_does_not_fall() -> None:
    assert line([(0, 1.0), (2, 5.0)], default_slope=9.0) == (1.0, 2.0)
    assert line([(0, 5.0), (2, 1.0)], default_slope=9.0) == (3.0, 0.0)
    assert line([(3, 5.0), (3, 7.0)], default_slope=1.0) == (3.0, 1.0)


def test_medians_take_the_middle_of_each_x() -> None:
    assert medians([(1, 5.0), (2, 1.0), (1, 900.0), (1, 7.0)]) == [(1, 7.0)] * 3 + [(2, 1.0)]


def test_fit_gives_weights_of_which_none_is_negative() -> None:
    rows = [[1.0, 2.0, 0.0], [0.0, 1.0, 1.0], [2.0, 0.0, 1.0], [1.0, 1.0, 3.0]]
    exact = [2 * a + 3 * b + 0.5 * c for a, b, c in rows]
    assert fit(rows, exact) == pytest.approx([2.0, 3.0, 0.5], rel=1e-3)
    without = [2 * a - 3 * b + 0.5 * c for a, b, c in rows]
    weights = fit(rows, without)
    assert weights[1] == 0.0
    assert min(weights) >= 0.0
    assert fit([], []) == [0.0, 0.0, 0.0]


def test_features_that_change_together_share_their_weight() -> None:
    weights = fit([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0]], [5.0, 10.0])
    assert weights == pytest.approx([2.5, 1.25, 0.0], rel=1e-3)
    assert solve([[0.0, 0.0], [0.0, 2.0]], [0.0, 4.0]) == pytest.approx([0.0, 2.0], rel=1e-3)


def test_quantile_excludes_a_few_even_of_few() -> None:
    assert quantile([7.0], 0.99) == 7.0
    assert quantile([1.0, 2.0, 3.0, 4.0, 50.0, 60.0], 0.99) == 4.0
    assert quantile([float(i) for i in range(1000)], 0.99) == 989.0


def test_spread_is_what_one_in_a_hundred_exceeds() -> None:
    assert spread([]) == 1.0
    assert spread([0.9, 0.8, 0.7, 1.1, 1.2]) == 1.0
    assert spread([1 + i / 1000 for i in range(1000)]) == pytest.approx(1.989)


def test_drafts_count_as_their_streams() -> None:
    drafting = StepRecord(0.040, 4, 4, 20, 0, 0.0, 9, 0)
    costs = costs_from([drafting, drafting, StepRecord(0.050, 5, 4, 40, 20, 0.0, 9, 0)])
    assert (costs.streams_s, costs.drafted, costs.max_prompt_tokens) == (pytest.approx(0.040), 16, 20)
    assert costs.token_at(0) == pytest.approx(0.0005, rel=0.01)


def test_costs_are_never_negative_when_few_streams_follow_many() -> None:
    """40 streams at 100 ms, then at 60, then one beside a prompt: by a shift alone one stream took -37 ms."""
    crowd = [StepRecord(seconds, 40, 40, 40, 0, 0.0, 40, 0) for seconds in [0.100] * 20 + [0.060] * 12]
    costs = costs_from([*crowd, *[StepRecord(0.030, 2, 1, 17, 16, 0.0, 1, 0)] * 8])
    assert costs.streams == 1
    assert 0 < costs.streams_s < 0.060
    assert costs.seconds(40, 0, 0.0) == pytest.approx(0.060)


def test_steps_that_take_no_time_break_nothing() -> None:
    """A clock that only a test moves."""
    window, still = StepWindow(), [step(4, noise=0.0), step(4, 16, noise=0.0)]
    for record in still * 20:
        window.add(record)
    assert costs_from(window.records()).noise == 1.0
    for target in ("latency", "throughput"):
        config = EngineConfig(target=target)
        tune(window.records(), initial_limits(config), config, window.scatter)
