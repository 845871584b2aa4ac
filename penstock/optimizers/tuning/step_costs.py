"""`StepCosts`: a model of step times, fitted to records of steps. Pure functions over a window.

Owns that model: a time per decoding stream, drafts included, and beside the streams a time per prompt token, which
grows with the position of the token in its prompt. Decides nothing. Called by `tuner`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import NamedTuple

from penstock.step import StepRecord

QUANTILE = 0.99  # the fraction of steps that the noise factor covers
MIN_EXCLUDED = 2  # the longest steps that the quantile excludes even when there are few
RECENT = 8  # steps that show the current load
RECENT_PLAIN = 12  # steps of streams alone that show their current time
RECENT_SPEED = 6  # steps that show the current speed of the machine
STALL = 2.0  # a step that took so many times the expected time was held up by something else
UNTRIED = 0.25  # of a step: assumed for one more stream where all steps had equally many, more than it turns out to be
MIN_S = 1e-9  # lower bound of every time, whatever a clock says
RIDGE = 1e-6  # of the features' size, so that features that always change together share their weight
DEPTH = 1000.0  # tokens: the unit of depth, so that all features are of similar size


Point = tuple[float, float]


class StepCosts(NamedTuple):
    """Seconds of a step of `streams` streams and no prompt (`streams_s`), and of one more stream (`stream_s`).

    A prompt beside them adds `prompt_s` for every token before the step's, whose cache is read, and for each token in
    the step `token_s`, and `depth_s` more for every token before it. At present `QUANTILE` of the steps take at most
    `noise` times the modelled time. `drafted` tokens of a step are drafts, which count as their streams'.
    `max_streams` and `max_prompt_tokens` are the most streams and prompt tokens that a recorded step had.
    """

    streams: float
    streams_s: float
    stream_s: float
    prompt_s: float
    token_s: float
    depth_s: float
    noise: float
    drafted: float
    max_streams: int
    max_prompt_tokens: int

    def seconds(self, streams: float, tokens: int, depth: float) -> float:
        """Seconds of a step of so many streams, and so many tokens of a prompt at that depth."""
        prompt_s = (self.prompt_s * depth + self.token_at(depth) * tokens) if tokens else 0.0
        return max(MIN_S, self.streams_s + self.stream_s * (streams - self.streams) + prompt_s)

    def ratio(self, record: StepRecord) -> float:
        """The time of a step relative to the modelled time."""
        return record.seconds / self.seconds(record.streams, record.prompt_tokens, record.depth)

    def token_at(self, depth: float) -> float:
        """Seconds of one more token of a prompt; 0 where that is unknown."""
        return self.token_s + self.depth_s * depth


def costs_of(records: Sequence[StepRecord], scatter: Iterable[float] = ()) -> StepCosts | None:
    """The costs fitted to `records`, oldest first; None if no record has streams and no prompt.

    `scatter` holds the times of more steps than there are records, each relative to similar steps: the noise factor
    needs many.
    """
    records = [record for record in records if record.streams]
    plain = [(record.streams, record.seconds) for record in records if not record.prompt_tokens]
    if not plain:
        return None
    base_s, stream_s = line(medians(plain), median(seconds for _, seconds in plain) * UNTRIED)
    level = median(s / max(MIN_S, base_s + stream_s * streams) for streams, s in plain[-RECENT_PLAIN:])
    base_s, stream_s = level * base_s, level * stream_s
    recent = records[-RECENT:]
    streams = median(record.streams for record in recent)
    costs = StepCosts(
        streams=streams,
        streams_s=base_s + stream_s * streams,
        stream_s=stream_s,
        prompt_s=0.0,
        token_s=0.0,
        depth_s=0.0,
        noise=1.0,
        drafted=median(record.tokens - record.streams - record.prompt_tokens for record in recent),
        max_streams=max(record.streams for record in records),
        max_prompt_tokens=max(record.prompt_tokens for record in records),
    )
    costs = with_prompts(costs, [record for record in records if record.prompt_tokens])
    level = median(costs.ratio(record) for record in records[-RECENT_SPEED:])
    return costs._replace(noise=max(1.0, level * spread(scatter)))


def with_prompts(costs: StepCosts, mixed: Sequence[StepRecord]) -> StepCosts:
    """`costs` with those of prompts, fitted once to all steps, and again without the ones that stalled."""
    fitted = _with_prompts(costs, mixed)
    return _with_prompts(costs, [record for record in mixed if fitted.ratio(record) < STALL])


def _with_prompts(costs: StepCosts, mixed: Sequence[StepRecord]) -> StepCosts:
    features = [[r.depth / DEPTH, r.prompt_tokens, r.prompt_tokens * r.depth / DEPTH] for r in mixed]
    prompt_s, token_s, depth_s = fit(features, [r.seconds - costs.seconds(r.streams, 0, 0.0) for r in mixed])
    return costs._replace(prompt_s=prompt_s / DEPTH, token_s=token_s, depth_s=depth_s / DEPTH)


def medians(points: Sequence[Point]) -> list[Point]:
    """The median y of each x, once per point with that x: a few stalls change nothing."""
    groups: dict[float, list[float]] = {}
    for x, y in points:
        groups.setdefault(x, []).append(y)
    return [(x, median(ys)) for x, ys in groups.items() for _ in ys]


def line(points: Sequence[Point], default_slope: float) -> Point:
    """Height at 0 and slope of the least-squares line, both >= 0; `default_slope` where all points have one x."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    variance = sum((x - mean_x) ** 2 for x, _ in points)
    slope = default_slope if variance < 0.5 else sum((x - mean_x) * (y - mean_y) for x, y in points) / variance
    slope = min(max(0.0, slope), mean_y / mean_x)
    return mean_y - slope * mean_x, slope


def fit(features: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """Weights >= 0 with which rows of three features come closest to their values; zeros if there are no rows.

    Least squares with a little ridge; a feature whose weight is negative is dropped and the others are fitted again.
    """
    columns = [0, 1, 2]
    while features and columns:
        solution = solve(
            [[sum(row[i] * row[j] for row in features) for j in columns] for i in columns],
            [sum(row[i] * value for row, value in zip(features, values, strict=True)) for i in columns],
        )
        if min(solution) >= 0:
            weights = dict(zip(columns, solution, strict=True))
            return [weights.get(i, 0.0) for i in range(3)]
        del columns[solution.index(min(solution))]
    return [0.0, 0.0, 0.0]


def solve(matrix: list[list[float]], values: list[float]) -> list[float]:
    """Solve a symmetric system by elimination, its diagonal raised by a little; rows of zeros give 0."""
    size = len(values)
    for i in range(size):
        matrix[i][i] *= 1 + RIDGE
    for i in range(size):
        if matrix[i][i] <= 0:
            continue
        for k in range(i + 1, size):
            factor = matrix[k][i] / matrix[i][i]
            matrix[k] = [lower - factor * upper for lower, upper in zip(matrix[k], matrix[i], strict=True)]
            values[k] -= factor * values[i]
    solution = [0.0] * size
    for i in reversed(range(size)):
        remainder = values[i] - sum(matrix[i][k] * solution[k] for k in range(i + 1, size))
        solution[i] = remainder / matrix[i][i] if matrix[i][i] > 0 else 0.0
    return solution


def spread(scatter: Iterable[float]) -> float:
    """The ratio that `QUANTILE` of the steps do not exceed, without those that stalled: they would at any size."""
    ratios = [ratio for ratio in scatter if ratio < STALL]
    return max(1.0, quantile(ratios, QUANTILE)) if ratios else 1.0


def quantile(values: Sequence[float], fraction: float) -> float:
    """The value that `fraction` of the values (at least one) do not exceed; a few are above it in any case."""
    ordered = sorted(values)
    index = min(math.ceil(fraction * len(ordered)) - 1, len(ordered) - 1 - MIN_EXCLUDED)
    return ordered[max(len(ordered) // 2, index)]
