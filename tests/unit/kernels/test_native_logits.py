from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies
from torch import Tensor

from penstock.kernels.logits import Distributions, LogitKernels
from penstock.kernels.native import Kernels

BLOCK = 64


def masked(logits: Tensor, masks: Tensor) -> Tensor:
    """The logits under their masks, in plain torch."""
    places = torch.arange(32, dtype=torch.int32)
    allowed = ((masks[:, :, None] >> places) & 1).bool().flatten(1)
    width = min(logits.shape[1], allowed.shape[1])
    result = torch.full_like(logits, -torch.inf)
    result[:, :width] = logits[:, :width].masked_fill(~allowed[:, :width], -torch.inf)
    return result


def both(kernels: Kernels, logits: Tensor, masks: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    of_logits, expected = LogitKernels(kernels, BLOCK), masked(logits, masks)
    maxima = of_logits.summarize(logits).block_maxima
    found = of_logits.argmax_allowed(logits, maxima, torch.arange(len(logits)), masks)
    return found, (expected.amax(1), expected.argmax(1))


@pytest.mark.parametrize("num_words", [1, 3, 199, 200, 203])
@pytest.mark.parametrize("density", [1, 4, 9])
def test_the_greatest_allowed_logit_is_that_of_plain_torch(kernels: Kernels, num_words: int, density: int) -> None:
    generator = torch.Generator().manual_seed(num_words)
    logits = torch.randn(7, 6400, generator=generator)
    masks = torch.full((7, num_words), -1, dtype=torch.int32)
    for _ in range(density):
        masks &= torch.randint(-(2**31), 2**31 - 1, masks.shape, dtype=torch.int32, generator=generator)
    (maxima, tokens), (expected_maxima, expected_tokens) = both(kernels, logits, masks)
    assert torch.equal(maxima, expected_maxima)
    possible = maxima.isfinite()
    assert torch.equal(tokens[possible], expected_tokens[possible])


def test_of_equal_logits_the_first_allowed_token_wins(kernels: Kernels) -> None:
    masks = torch.zeros(1, 8, dtype=torch.int32)
    masks[0, 2], masks[0, 5] = 1 << 7, -1
    (maxima, tokens), _ = both(kernels, torch.zeros(1, 256), masks)
    assert (maxima.tolist(), tokens.tolist()) == ([0.0], [71])


def test_a_mask_of_nothing_leaves_no_token(kernels: Kernels) -> None:
    (maxima, _), _ = both(kernels, torch.zeros(2, 256), torch.zeros(2, 8, dtype=torch.int32))
    assert maxima.tolist() == [-torch.inf, -torch.inf]


def test_a_nan_hides_no_other_logit(kernels: Kernels) -> None:
    logits = torch.arange(256.0)[None]
    logits[0, 200] = torch.nan
    of_logits = LogitKernels(kernels, BLOCK)
    maxima, masks = of_logits.summarize(logits).block_maxima, torch.full((1, 8), 1, dtype=torch.int32)
    found, tokens = of_logits.argmax_allowed(logits, maxima, torch.zeros(1, dtype=torch.int64), masks)
    assert tokens.tolist()[0] % 32 == 0
    assert found.isfinite().all()


def test_masks_may_belong_to_some_of_the_rows_in_any_order(kernels: Kernels) -> None:
    logits = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    of_logits, rows = LogitKernels(kernels, BLOCK), torch.tensor([4, 1, 4])
    masks = torch.full((3, 8), -1, dtype=torch.int32)
    masks[2, : int(logits[4].argmax()) // 32 + 1] = 0
    found, tokens = of_logits.argmax_allowed(logits, of_logits.summarize(logits).block_maxima, rows, masks)
    copy, copy_maxima = of_logits.masked(logits, rows, masks)
    greatest = of_logits.greatest(logits, of_logits.summarize(logits).block_maxima, rows, 5, masks)
    drawn = of_logits.draw(logits, distributions(logits, masks, rows=rows), torch.zeros(3).double())
    expected = masked(logits[rows], masks)
    assert torch.equal(greatest[0], expected.sort(descending=True).values[:, :5])
    assert torch.equal(found, expected.amax(1))
    assert torch.equal(tokens, expected.argmax(1))
    assert torch.equal(copy, expected)
    assert torch.equal(copy_maxima, expected.view(3, -1, BLOCK).amax(-1))
    assert torch.equal(drawn.tokens, expected.isfinite().int().argmax(1))


def greatest_of(kernels: Kernels, logits: Tensor, count: int, masks: Tensor | None) -> tuple[Tensor, Tensor]:
    of_logits = LogitKernels(kernels, BLOCK)
    maxima, rows = of_logits.summarize(logits).block_maxima, torch.arange(len(logits))
    return of_logits.greatest(logits, maxima, rows, count, masks)


@given(
    seed=strategies.integers(0, 10**6),
    num_blocks=strategies.integers(1, 40),
    count=strategies.sampled_from([1, 2, 16, 64, 65, 500]),
    missing_words=strategies.integers(-3, 3),
    density=strategies.sampled_from([None, 0, 1, 2, 3, 4]),
    num_values=strategies.sampled_from([1, 3, 40, 10**6]),
)
@settings(max_examples=120, deadline=None)
def test_the_greatest_allowed_logits_are_those_of_a_stable_sort(
    kernels: Kernels, seed: int, num_blocks: int, count: int, missing_words: int, density: int | None, num_values: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-num_values, num_values, (3, num_blocks * BLOCK), generator=generator).float()
    logits[:, -7:] = -torch.inf
    num_words = max(1, logits.shape[1] // 32 - missing_words)
    masks = None if density is None else random_masks(3, num_words, density, generator)
    count = min(count, logits.shape[1])
    values, tokens = greatest_of(kernels, logits, count, masks)
    expected = (logits if masks is None else masked(logits, masks)).sort(descending=True, stable=True)
    assert torch.equal(values, expected.values[:, :count])
    possible = values.isfinite()
    assert torch.equal(tokens[possible], expected.indices[:, :count][possible])
    if masks is None:
        assert torch.equal(tokens, expected.indices[:, :count])


def test_the_greatest_logits_of_a_row_leave_out_nan_and_count_minus_zero_as_zero(kernels: Kernels) -> None:
    logits = torch.full((1, 256), -1.0)
    logits[0, [3, 70, 200]] = torch.tensor([torch.nan, -0.0, 0.0])
    values, tokens = greatest_of(kernels, logits, 4, None)
    assert (values.tolist(), tokens.tolist()) == ([[0.0, 0.0, -1.0, -1.0]], [[70, 200, 0, 1]])


def test_beyond_the_allowed_logits_there_is_token_0_with_minus_infinity(kernels: Kernels) -> None:
    masks = torch.zeros(1, 8, dtype=torch.int32)
    masks[0, 2] = 1 << 7
    values, tokens = greatest_of(kernels, torch.zeros(1, 256), 3, masks)
    assert (values.tolist(), tokens.tolist()) == ([[0.0, -torch.inf, -torch.inf]], [[71, 0, 0]])


def distributions(
    logits: Tensor,
    masks: Tensor | None,
    *,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    floor: float = 0.0,
) -> Distributions:
    rows = torch.arange(len(logits)) if rows is None else rows
    peaks = (logits[rows] if masks is None else masked(logits[rows], masks)).amax(-1)
    return Distributions(rows, peaks, torch.full_like(peaks, temperature), torch.full_like(peaks, floor), masks)


def weights_of(logits: Tensor, of: Distributions) -> Tensor:
    """The weights [M, V] in plain torch, float64."""
    allowed = logits[of.rows] if of.masks is None else masked(logits[of.rows], of.masks)
    weights = ((allowed.double() - of.peaks[:, None]) / of.temperatures[:, None].double()).exp()
    return weights.masked_fill(weights < of.floors[:, None], 0.0)


def random_masks(num_rows: int, num_words: int, density: int, generator: torch.Generator) -> Tensor:
    """0: nothing is allowed, 1: everything, 2: half, 3: few tokens, 4: whole blocks are refused or allowed."""
    if density < 2:
        return torch.full((num_rows, num_words), -density, dtype=torch.int32)
    if density == 4:
        blocks = torch.randint(0, 2, (num_rows, num_words // 2 + 1), generator=generator).repeat_interleave(2, dim=1)
        return -blocks[:, :num_words].int().contiguous()
    masks = torch.full((num_rows, num_words), -1, dtype=torch.int32)
    for _ in range(1 if density == 2 else 7):
        masks &= torch.randint(-(2**31), 2**31 - 1, masks.shape, dtype=torch.int32, generator=generator)
    return masks


@given(
    seed=strategies.integers(0, 10**6),
    num_blocks=strategies.integers(1, 300),
    missing_words=strategies.integers(-3, 3),
    density=strategies.sampled_from([None, 0, 1, 2, 3, 4]),
    temperature=strategies.sampled_from([1e-3, 0.3, 0.8, 1.0, 1.7, 1e4]),
    floor=strategies.sampled_from([0.0, 0.05, 1.0]),
    uniform=strategies.floats(0, 1, exclude_max=True),
)
@settings(max_examples=60, deadline=None)
def test_a_token_is_where_its_uniform_falls_in_the_cumulative_sum_of_plain_torch(
    kernels: Kernels, seed: int, num_blocks: int, missing_words: int, density: int | None, temperature: float,
    floor: float, uniform: float,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, num_blocks * BLOCK, generator=generator) * 3
    logits[:, -7:] = -torch.inf
    num_words = max(1, logits.shape[1] // 32 - missing_words)
    masks = None if density is None else random_masks(3, num_words, density, generator)
    of = distributions(logits, masks, temperature=temperature, floor=floor)
    uniforms = torch.tensor([uniform, 0.0, 1 - 2**-53], dtype=torch.float64)
    drawn, weights = LogitKernels(kernels, BLOCK).draw(logits, of, uniforms), weights_of(logits, of)
    for i, token in enumerate(drawn.tokens.tolist()):
        total, weight = float(weights[i].nan_to_num().sum()), float(weights[i, token])
        if not total:
            assert drawn.totals[i] == 0
            continue
        assert float(drawn.totals[i]) == pytest.approx(total, rel=2e-6)
        assert float(drawn.weights[i]) == pytest.approx(weight, rel=2e-5)
        assert weight > 0
        before, target = float(weights[i, :token].sum()), float(uniforms[i]) * total
        assert before - 5e-6 * total <= target <= before + weight + 5e-6 * total


def test_a_token_of_the_least_and_the_greatest_temperature_is_the_argmax_and_any(kernels: Kernels) -> None:
    logits = torch.randn(2, 640, generator=torch.Generator().manual_seed(1)) * 50
    uniforms = torch.tensor([0.999, 0.5], dtype=torch.float64)
    limits = torch.finfo(torch.float32)
    for temperature, expected in ((limits.tiny, logits.argmax(-1)), (limits.max, torch.tensor([639, 320]))):
        of = distributions(logits, None, temperature=temperature)
        assert torch.equal(LogitKernels(kernels, BLOCK).draw(logits, of, uniforms).tokens, expected)


def test_a_given_token_has_the_weight_that_a_draw_of_it_has(kernels: Kernels) -> None:
    generator = torch.Generator().manual_seed(2)
    logits, masks = torch.randn(9, 6400, generator=generator), random_masks(9, 200, 2, generator)
    for of in (distributions(logits, None, floor=0.1), distributions(logits, masks, temperature=0.7)):
        drawn = LogitKernels(kernels, BLOCK).draw(logits, of, torch.rand(9, generator=generator).double())
        weighed = LogitKernels(kernels, BLOCK).weigh(logits, of, drawn.tokens)
        assert torch.equal(weighed.weights, drawn.weights)
        assert torch.equal(weighed.totals, drawn.totals)
        worst = LogitKernels(kernels, BLOCK).weigh(logits, of, weights_of(logits, of).argmin(-1))
        assert worst.weights.tolist() == [0.0] * 9


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_a_row_of_no_numbers_changes_no_other_row(kernels: Kernels, bad: float) -> None:
    generator = torch.Generator().manual_seed(3)
    logits, masks = torch.randn(5, 1280, generator=generator), random_masks(5, 40, 2, generator)
    of, uniforms = distributions(logits, masks), torch.rand(5, generator=generator).double()
    clean, spoiled = LogitKernels(kernels, BLOCK).draw(logits, of, uniforms), logits.clone()
    spoiled[2] = bad
    drawn = LogitKernels(kernels, BLOCK).draw(
        spoiled, of._replace(peaks=of.peaks.index_fill(0, torch.tensor(2), bad)), uniforms
    )
    others = [0, 1, 3, 4]
    assert torch.equal(drawn.tokens[others], clean.tokens[others])
    assert torch.equal(drawn.totals[others], clean.totals[others])
    assert 0 <= int(drawn.tokens[2]) < 1280


@pytest.mark.parametrize("density", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("num_words", [1, 299, 600, 601])
def test_a_masked_copy_is_that_of_plain_torch(kernels: Kernels, num_words: int, density: int) -> None:
    generator = torch.Generator().manual_seed(num_words)
    logits, masks = torch.randn(4, 19_200, generator=generator), random_masks(4, num_words, density, generator)
    copy, block_maxima = LogitKernels(kernels, BLOCK).masked(logits, torch.arange(4), masks)
    assert torch.equal(copy, masked(logits, masks))
    assert torch.equal(block_maxima, copy.view(4, -1, BLOCK).amax(-1))


def test_a_row_gets_the_same_bits_beside_any_others_and_on_any_threads(kernels: Kernels) -> None:
    generator = torch.Generator().manual_seed(4)
    logits, masks = torch.randn(11, 25_600, generator=generator), random_masks(11, 800, 4, generator)
    uniforms = torch.rand(11, generator=generator).double()
    several = Kernels(3, kernels.library)
    try:
        for of in (distributions(logits, None), distributions(logits, masks, temperature=0.8)):
            together = LogitKernels(several, BLOCK).draw(logits, of, uniforms)
            for i in range(11):
                one = Distributions(*(None if x is None else x[i : i + 1] for x in of))
                alone = LogitKernels(kernels, BLOCK).draw(logits, one, uniforms[i : i + 1])
                assert all(torch.equal(a, b[i : i + 1]) for a, b in zip(alone, together, strict=True))
    finally:
        several.close()


def test_operands_are_checked(kernels: Kernels) -> None:
    of_logits, logits, rows = LogitKernels(kernels, BLOCK), torch.zeros(2, 128), torch.arange(2)
    maxima, uniforms, bits = torch.zeros(2, 2), torch.zeros(2).double(), torch.zeros(2, 4, dtype=torch.int32)
    for masks in (torch.zeros(2, 4), torch.zeros(3, 4, dtype=torch.int32), torch.zeros(4, 2, dtype=torch.int32).T):
        of = distributions(logits, bits)._replace(masks=masks)
        for attempt in (
            lambda masks=masks: of_logits.argmax_allowed(logits, maxima, rows, masks),
            lambda masks=masks: of_logits.masked(logits, rows, masks),
            lambda masks=masks: of_logits.greatest(logits, maxima, rows, 3, masks),
            lambda of=of: of_logits.draw(logits, of, uniforms),
        ):
            with pytest.raises(AssertionError, match="a kernel was given"):
                attempt()
    of = distributions(logits, None)
    for spoiled in (of._replace(peaks=of.peaks.double()), of._replace(floors=of.floors[:1])):
        with pytest.raises(AssertionError, match="a kernel was given"):
            of_logits.draw(logits, spoiled, uniforms)
    with pytest.raises(AssertionError, match="a kernel was given"):
        of_logits.draw(logits, of, uniforms.float())
    for count in (0, 129):
        with pytest.raises(AssertionError, match=f"cannot find {count} of 128 logits"):
            of_logits.greatest(logits, maxima, rows, count)
    with pytest.raises(AssertionError, match="cannot take blocks of 48"):
        LogitKernels(kernels, 48)
    for attempt in (
        lambda: of_logits.argmax_allowed(logits, maxima, rows + 1, bits),
        lambda: of_logits.masked(logits, rows + 1, bits),
        lambda: of_logits.greatest(logits, maxima, rows + 1, 3, bits),
        lambda: of_logits.draw(logits, of._replace(rows=rows + 1), uniforms),
    ):
        with pytest.raises(AssertionError, match=r"rows \[1, 2\] are requested, and there are 2"):
            attempt()
    with pytest.raises(AssertionError, match=r"tokens are \[127, 128\], and there are 128"):
        of_logits.weigh(logits, of, torch.tensor([127, 128]))
