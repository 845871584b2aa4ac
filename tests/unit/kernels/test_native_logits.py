from __future__ import annotations

import pytest
import torch
from torch import Tensor

from penstock.kernels.native import Kernels, argmax_allowed, summarize_logits

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
    maxima = summarize_logits(kernels, logits, BLOCK).block_maxima
    expected = masked(logits, masks)
    return argmax_allowed(kernels, logits, maxima, torch.arange(len(logits)), masks, BLOCK), (
        expected.amax(1),
        expected.argmax(1),
    )


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
    maxima = summarize_logits(kernels, logits, BLOCK).block_maxima
    masks = torch.full((1, 8), 1, dtype=torch.int32)
    found, tokens = argmax_allowed(kernels, logits, maxima, torch.zeros(1, dtype=torch.int64), masks, BLOCK)
    assert tokens.tolist()[0] % 32 == 0
    assert found.isfinite().all()


def test_masks_may_belong_to_some_of_the_rows_in_any_order(kernels: Kernels) -> None:
    logits = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    maxima, rows = summarize_logits(kernels, logits, BLOCK).block_maxima, torch.tensor([4, 1, 4])
    masks = torch.full((3, 8), -1, dtype=torch.int32)
    masks[2, : int(logits[4].argmax()) // 32 + 1] = 0
    found, tokens = argmax_allowed(kernels, logits, maxima, rows, masks, BLOCK)
    expected = masked(logits[rows], masks)
    assert torch.equal(found, expected.amax(1))
    assert torch.equal(tokens, expected.argmax(1))


def test_operands_are_checked(kernels: Kernels) -> None:
    logits, maxima, rows = torch.zeros(2, 128), torch.zeros(2, 2), torch.arange(2)
    for masks in (torch.zeros(2, 4), torch.zeros(3, 4, dtype=torch.int32), torch.zeros(4, 2, dtype=torch.int32).T):
        with pytest.raises(AssertionError, match="a kernel was given"):
            argmax_allowed(kernels, logits, maxima, rows, masks, BLOCK)
    with pytest.raises(AssertionError, match="are not blocks of 48"):
        argmax_allowed(kernels, logits, maxima, rows, torch.zeros(2, 4, dtype=torch.int32), 48)
    with pytest.raises(AssertionError, match=r"belong to rows \[1, 2\], and there are 2"):
        argmax_allowed(kernels, logits, maxima, rows + 1, torch.zeros(2, 4, dtype=torch.int32), BLOCK)
