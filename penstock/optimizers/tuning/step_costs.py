"""What steps cost, read from records of them: pure functions over a window.

Owns the model of a step's time: streams with their drafts, one by one, and beside them a prompt, the dearer the deeper
the step finds it. Decides nothing. Called by `tuner`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import NamedTuple

from penstock.step import StepRecord

QUANTILE = 0.99  # so many of the steps take no longer than what is told
FEW = 2  # of the longest steps are left out at least, however few there are
RECENT = 8  # steps that say what goes on now
RECENT_PLAIN = 12  # steps of streams alone that say how long these take now
NOW = 6  # steps that say how fast the machine is at this moment
STALL = 2.0  # times what is expected: a step that something else held up, whatever was in it
UNTRIED = 0.25  # of a step, for one more stream where all steps had equally many: more than it turns out to be
LEAST_S = 1e-9  # that anything takes, whatever a clock says
RIDGE = 1e-6  # of the features' size, so that features that moved together share what they explain
DEPTH = 1000.0  # tokens: the unit of depth, so that features are of one size


Point = tuple[float, float]


class Costs(NamedTuple):
    """Seconds of a step of `streams` streams and no prompt (`streams_s`), and of one more stream (`stream_s`).

    A prompt beside them takes `prompt_s` for every token before the step's, whose cache is read, and for each token in
    the step `token_s`, and `depth_s` more for every token before it. Now, `QUANTILE` of the steps take at most `noise`
    times what this comes to. `drafted` tokens of a step were drafts, which count as their streams'. `most_streams` and
    `most_beside` are the most streams and prompt tokens that a step had.
    """

    streams: float
    streams_s: float
    stream_s: float
    prompt_s: float
    token_s: float
    depth_s: float
    noise: float
    drafted: float
    most_streams: int
    most_beside: int

    def of(self, streams: float, tokens: int, depth: float) -> float:
        """Seconds of a step of so many streams, and so many tokens of a prompt at that depth."""
        prompt_s = (self.prompt_s * depth + self.token_at(depth) * tokens) if tokens else 0.0
        return max(LEAST_S, self.streams_s + self.stream_s * (streams - self.streams) + prompt_s)

    def ratio(self, record: StepRecord) -> float:
        """How many times that a step took."""
        return record.seconds / self.of(record.streams, record.prompt_tokens, record.depth)

    def token_at(self, depth: float) -> float:
        """Seconds of one more token of a prompt; 0 where that is unknown."""
        return self.token_s + self.depth_s * depth


def costs_of(records: Sequence[StepRecord], scatter: Iterable[float] = ()) -> Costs | None:
    """What `records`, oldest first, say; None if none of them had streams and no prompt.

    `scatter` holds how many times what its like took each of many steps took, which only many tell.
    """
    records = [record for record in records if record.streams]
    plain = [(record.streams, record.seconds) for record in records if not record.prompt_tokens]
    if not plain:
        return None
    base_s, stream_s = line(medians(plain), median(seconds for _, seconds in plain) * UNTRIED)
    level = median(s / max(LEAST_S, base_s + stream_s * streams) for streams, s in plain[-RECENT_PLAIN:])
    base_s, stream_s = level * base_s, level * stream_s
    recent = records[-RECENT:]
    streams = median(record.streams for record in recent)
    costs = Costs(
        streams=streams,
        streams_s=base_s + stream_s * streams,
        stream_s=stream_s,
        prompt_s=0.0,
        token_s=0.0,
        depth_s=0.0,
        noise=1.0,
        drafted=median(record.tokens - record.streams - record.prompt_tokens for record in recent),
        most_streams=max(record.streams for record in records),
        most_beside=max(record.prompt_tokens for record in records),
    )
    costs = with_prompts(costs, [record for record in records if record.prompt_tokens])
    level = median(costs.ratio(record) for record in records[-NOW:])
    return costs._replace(noise=max(1.0, level * spread(scatter)))


def with_prompts(costs: Costs, mixed: Sequence[StepRecord]) -> Costs:
    """`costs` with those of prompts, fitted once to all, and again without the steps that stalled."""
    fitted = _with_prompts(costs, mixed)
    return _with_prompts(costs, [record for record in mixed if fitted.ratio(record) < STALL])


def _with_prompts(costs: Costs, mixed: Sequence[StepRecord]) -> Costs:
    features = [[r.depth / DEPTH, r.prompt_tokens, r.prompt_tokens * r.depth / DEPTH] for r in mixed]
    prompt_s, token_s, depth_s = fit(features, [r.seconds - costs.of(r.streams, 0, 0.0) for r in mixed])
    return costs._replace(prompt_s=prompt_s / DEPTH, token_s=token_s, depth_s=depth_s / DEPTH)


def medians(points: Sequence[Point]) -> list[Point]:
    """The middle y of each x, as often as that x is there: what a few stalls leave as it was."""
    groups: dict[float, list[float]] = {}
    for x, y in points:
        groups.setdefault(x, []).append(y)
    return [(x, median(ys)) for x, ys in groups.items() for _ in ys]


def line(points: Sequence[Point], unknown: float) -> Point:
    """Height at 0 and slope of the least-squares line, neither negative; slope `unknown` where all have one x."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = unknown if spread < 0.5 else sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    slope = min(max(0.0, slope), mean_y / mean_x)
    return mean_y - slope * mean_x, slope


def fit(features: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """Weights, none negative, with which rows of three features come closest to their values; all 0 of no rows.

    Least squares with a little ridge; what comes out negative is left out and the others are fitted again.
    """
    used = [0, 1, 2]
    while features and used:
        weights = solve(
            [[sum(row[i] * row[j] for row in features) for j in used] for i in used],
            [sum(row[i] * value for row, value in zip(features, values, strict=True)) for i in used],
        )
        if min(weights) >= 0:
            found = dict(zip(used, weights, strict=True))
            return [found.get(i, 0.0) for i in range(3)]
        del used[weights.index(min(weights))]
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
            matrix[k] = [below - factor * above for below, above in zip(matrix[k], matrix[i], strict=True)]
            values[k] -= factor * values[i]
    found = [0.0] * size
    for i in reversed(range(size)):
        rest = values[i] - sum(matrix[i][k] * found[k] for k in range(i + 1, size))
        found[i] = rest / matrix[i][i] if matrix[i][i] > 0 else 0.0
    return found


def spread(scatter: Iterable[float]) -> float:
    """What `QUANTILE` of the steps do not exceed, but for those that stalled: shorter steps would stall, too."""
    usual = [ratio for ratio in scatter if ratio < STALL]
    return max(1.0, quantile(usual, QUANTILE)) if usual else 1.0


def quantile(values: Sequence[float], share: float) -> float:
    """The value that `share` of at least one value do not exceed; a few are above it in any case."""
    ordered = sorted(values)
    most = max(len(ordered) // 2, min(math.ceil(share * len(ordered)) - 1, len(ordered) - 1 - FEW))
    return ordered[most]
