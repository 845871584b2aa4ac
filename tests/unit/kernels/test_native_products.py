"""Products, norms and embeddings of the compiled kernels are those of plain torch, within what rounding explains.

Bounds: one rounding of the result, plus what float32 sums lose of the sum of magnitudes; int8 adds half a step of
each scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.kernels.native import Kernels
from penstock.kernels.products import ADD, GATED, LAYER, RMS, STORE, Calibration, Epilogue, Linear, Norm
from tests.unit.kernels.conftest import kernels_of
from tests.unit.kernels.hand import BLOCK, ROUNDING, rotated

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (1, 2, 3, 5, 11, 12, 13, 25, 40)
SHAPES = ((1, 1), (7, 5), (33, 17), (64, 64), (100, 131), (31, 260))  # outputs, inputs
SUM = 2e-6  # what a float32 sum of a few hundred terms loses, relative to the sum of magnitudes
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def magnitude(x: Tensor, weight: Tensor) -> Tensor:
    return x.double().abs() @ weight.double().abs().T


def check(found: Tensor, wanted: Tensor, slack: Tensor | float) -> None:
    """`found` is `wanted` but for one rounding to its dtype and `slack`."""
    allowed = wanted.abs() * ROUNDING[found.dtype] * 1.01 + slack + 1e-30
    worst = ((found.double() - wanted).abs() / allowed).max().item()
    assert worst <= 1, f"the error is {worst:.3g} times what is allowed"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_any_number_of_rows_are_those_of_torch(kernels: Kernels, dtype: torch.dtype) -> None:
    for n, k in SHAPES:
        weight = randn(n, k, dtype=dtype)
        linear = Linear(kernels, [weight], [None])
        for rows in ROWS:
            x = randn(rows, k, dtype=dtype, seed=rows)
            check(linear(x), x.double() @ weight.double().T, SUM * magnitude(x, weight))


def row_steps(x: Tensor) -> Tensor:
    """The scale behind each number of rotated activations: a 127th of the greatest magnitude of its block."""
    blocks = x.split(BLOCK, 1)
    return torch.cat([block.abs().amax(1, keepdim=True).expand_as(block) / 127 for block in blocks], 1)


def column_steps(weight: Tensor) -> Tensor:
    """The scale of each output [N, 1]: a 255th of the range of its rotated weights."""
    return (weight.amax(1, keepdim=True) - weight.amin(1, keepdim=True)) / 255


def test_int8_products_are_those_of_rotated_blocks_rounded_to_their_scales(kernels: Kernels) -> None:
    for n, k in ((33, 17), (64, 64), (5, 130), (9, 1100), (8, 2048)):
        x, weight = rotated(randn(13, k)), rotated(randn(n, k, seed=1))
        low, steps = weight.amin(1, keepdim=True), column_steps(weight)
        wanted_x = (x / row_steps(x)).round() * row_steps(x)
        wanted = wanted_x @ (((weight - low) / steps).round() * steps + low).T
        found = Linear(kernels, [randn(n, k, seed=1)], [None], quantize=True)(randn(13, k))
        # A tie that falls the other way is a whole step, so the product is compared as a whole.
        assert (found - wanted).norm() < 1e-3 * wanted.norm()


def test_int8_products_survive_channels_that_are_far_larger_than_the_others(kernels: Kernels) -> None:
    """One scale for a row rounded all channels away but the largest: 90 % of error."""
    for k in (576, 1024, 1536):
        x, weight = randn(13, k), randn(96, k, seed=1)
        x[:, [3, k // 2, k - 1]] *= torch.tensor([100.0, 30.0, 200.0])
        weight[:, [3, k // 2, k - 1]] *= 0.01
        wanted = x.double() @ weight.double().T
        found = Linear(kernels, [weight], [None], quantize=True)(x)
        assert (found - wanted).norm() < 0.1 * wanted.norm()


def quantized_slack(x: Tensor, weight: Tensor) -> Tensor:
    """Half a step of each factor's scale, for every term of the rotated product."""
    x, weight = rotated(x), rotated(weight)
    steps_x, steps_weight = row_steps(x), column_steps(weight)
    rounds_x = 0.502 * steps_x @ weight.abs().T
    rounds_weight = x.abs().sum(1, keepdim=True) * 0.502 * steps_weight.T
    return rounds_x + rounds_weight + 0.26 * steps_x.sum(1, keepdim=True) * steps_weight.T


def correlated(rows: int, k: int, seed: int) -> Tensor:
    """Inputs of which a dozen directions hold most of the energy, as in a transformer."""
    directions = randn(12, k, seed=1) * torch.linspace(6, 1, 12)[:, None]
    return randn(rows, 12, seed=seed) @ directions + randn(rows, k, seed=seed + 1)


@pytest.mark.parametrize("k", [64, 300, 1536])
def test_calibrated_weights_are_rounded_so_that_errors_cancel_for_such_inputs(kernels: Kernels, k: int) -> None:
    weight, calibration, x = randn(70, k), Calibration.of(correlated(400, k, 10)), correlated(100, k, 20)
    linears = [Linear(kernels, [weight], [None], quantize=True, calibration=c) for c in (None, calibration)]
    # Rotated rows of the identity are all of one magnitude, so rounding does not change them.
    plain, calibrated = (linear(torch.eye(k, dtype=torch.float32)).T - weight for linear in linears)
    assert (x @ calibrated.T).norm() < 0.7 * (x @ plain.T).norm()
    assert calibrated.norm() < 2 * plain.norm()


def test_a_calibration_holds_the_energy_of_its_inputs() -> None:
    x = correlated(300, 128, 10)
    calibration = Calibration.of(x)
    energies = calibration.directions.square().sum(1)
    torch.testing.assert_close((x @ calibration.directions.T).square().mean(0) / energies, energies, rtol=0.01, atol=0)
    energy = x.square().sum().item() / len(x)
    assert energies.sum().item() < energy < energies.sum().item() + 128 * calibration.residual


def test_few_or_no_inputs_are_a_calibration_too(kernels: Kernels) -> None:
    """Experts that no token of the text went to, and layers narrower than a calibration has directions."""
    weight, x = randn(20, 7), randn(5, 7, seed=2)
    for inputs in (x[:1], torch.zeros(3, 7)):
        found = Linear(kernels, [weight], [None], quantize=True, calibration=Calibration.of(inputs))(x)
        check(found, x.double() @ weight.double().T, 3 * quantized_slack(x, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_products_are_off_by_half_a_step_of_each_scale_at_most(kernels: Kernels, dtype: torch.dtype) -> None:
    for n, k in SHAPES:
        weight = randn(n, k, dtype=dtype)
        linear = Linear(kernels, [weight], [None], quantize=True)
        for rows in ROWS:
            x = randn(rows, k, dtype=dtype, seed=rows)
            slack = SUM * magnitude(x, weight) + quantized_slack(x, weight)
            check(linear(x), x.double() @ weight.double().T, slack)


def test_int8_rows_of_zeros_give_zeros_and_broken_rows_stay_broken_alone(kernels: Kernels) -> None:
    x = randn(4, 40)
    x[1], x[2, 3], x[3, 39] = 0, torch.nan, torch.inf
    found = Linear(kernels, [randn(20, 40)], [None], quantize=True)(x)
    assert found[0].isfinite().all()
    assert found[1].eq(0).all()
    assert found[2:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matrices_and_biases_lie_one_below_the_other(kernels: Kernels, dtype: torch.dtype) -> None:
    parts = [randn(n, 48, dtype=dtype, seed=n) for n in (20, 7, 33)]
    biases = [randn(20, dtype=dtype), None, randn(33, dtype=dtype, seed=1)]
    x = randn(6, 48, dtype=dtype)
    weight, bias = torch.cat(parts), torch.cat([biases[0], torch.zeros(7, dtype=dtype), biases[2]])
    wanted = x.double() @ weight.double().T + bias.double()
    check(Linear(kernels, parts, biases)(x), wanted, SUM * (magnitude(x, weight) + bias.double().abs()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_scales_what_it_adds_to_the_output(kernels: Kernels, dtype: torch.dtype) -> None:
    weight, bias, x = randn(37, 50, dtype=dtype), randn(37, dtype=dtype), randn(14, 50, dtype=dtype, seed=1)
    before = randn(14, 37, dtype=dtype, seed=2)
    found = Linear(kernels, [weight], [bias], epilogue=Epilogue(ADD, scale=0.25))(x, before.clone())
    wanted = before.double() + 0.25 * (x.double() @ weight.double().T + bias.double())
    check(found, wanted, SUM * (magnitude(x, weight) + 4))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_each_activation_is_that_of_torch(kernels: Kernels, act: str) -> None:
    """A product with the identity: whatever goes in is what is activated."""
    x = torch.cat([torch.linspace(-20, 20, 397), torch.tensor([0.0, -300.0, 300.0])])[None]
    found = Linear(kernels, [torch.eye(400)], [None], epilogue=Epilogue(activation=act))(x)
    torch.testing.assert_close(found.double(), ACTIVATIONS[act](x.double()), rtol=2e-6, atol=5e-7)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_products_activate_the_first_half_and_multiply_by_the_second(
    kernels: Kernels, act: str, dtype: torch.dtype
) -> None:
    for half in (1, 16, 21, 48):
        gate, up = randn(half, 33, dtype=dtype), randn(half, 33, dtype=dtype, seed=1)
        bias, x = randn(half, dtype=dtype, seed=2), randn(13, 33, dtype=dtype, seed=3)
        first = ACTIVATIONS[act](x.double() @ gate.double().T + bias.double())
        second = x.double() @ up.double().T
        slack = 2 * SUM * (magnitude(x, gate) + 2) * (1 + magnitude(x, up))
        check(Linear(kernels, [gate, up], [bias, None], epilogue=Epilogue(GATED, act))(x), first * second, slack)


def norm_by_hand(x: Tensor, kind: int, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    x = x.double()
    x = x - x.mean(1, keepdim=True) if kind == LAYER else x
    x = x * (x.pow(2).mean(1, keepdim=True) + eps).rsqrt() * weight.double()
    return x if bias is None else x + bias.double()


@pytest.mark.parametrize("kind", [RMS, LAYER], ids=["RMS", "layer"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_are_those_written_out_by_hand(kernels: Kernels, kind: int, dtype: torch.dtype) -> None:
    for n in (1, 5, 16, 67, 256):
        weight, bias, x = (
            randn(n),
            randn(n, seed=1) if kind == LAYER else None,
            randn(9, n, dtype=dtype, seed=2) * 3 + 1,
        )
        norm = Norm(kernels, kind, weight, bias, 1e-5, dtype, 0.5)
        wanted = norm_by_hand(x, kind, weight, bias, 1e-5)
        check(norm(x), wanted, 2e-5)
        before = randn(9, n, dtype=dtype, seed=3)
        found = before.clone()
        norm.add_to(found, x)
        check(found, before.double() + 0.5 * wanted, 2e-5)


def test_a_product_and_a_sum_are_rounded_one_by_one_where_the_source_does_not_fuse_them(kernels: Kernels) -> None:
    """Compilers fused them in one copy of a function and not in another, which gave one row different bits."""
    norm = Norm(kernels, RMS, randn(67), None, 1e-5, torch.float32, 0.7)
    before, x = randn(9, 67), randn(9, 67, seed=1)
    found = before.clone()
    norm.add_to(found, x)
    assert torch.equal(found, before + 0.7 * norm(x))


@pytest.mark.parametrize("quantize", [False, True], ids=["whole", "int8"])
@pytest.mark.parametrize("kind", [RMS, LAYER], ids=["RMS", "layer"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_inside_a_product_comes_before_it(
    kernels: Kernels, dtype: torch.dtype, kind: int, quantize: bool
) -> None:
    k = 67
    weight, x = randn(40, k, dtype=dtype), randn(15, k, dtype=dtype, seed=2) * 5
    norm = Norm(kernels, kind, randn(k, seed=3), randn(k, seed=4) if kind == LAYER else None, 1e-5, dtype)
    normed = norm_by_hand(x, kind, norm.weight, norm.bias, 1e-5)
    slack = (SUM + ROUNDING[dtype]) * magnitude(normed, weight)  # the norm's result is rounded once
    if quantize:
        slack = slack + quantized_slack(normed, weight)
    check(Linear(kernels, [weight], [None], norm=norm, quantize=quantize)(x), normed @ weight.double().T, slack)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_head_gives_float32_without_rounding(kernels: Kernels, dtype: torch.dtype) -> None:
    weight, x = randn(37, 64, dtype=dtype), randn(14, 64, dtype=dtype, seed=1)
    found = Linear(kernels, [weight], [None], epilogue=Epilogue(dtype=torch.float32))(x)
    assert found.dtype == torch.float32
    check(found, x.double() @ weight.double().T, SUM * magnitude(x, weight))


def test_rows_may_lie_apart_and_the_output_may_be_part_of_a_tensor(kernels: Kernels) -> None:
    wide, weight, out = randn(9, 100, dtype=torch.bfloat16), randn(32, 40, dtype=torch.bfloat16), torch.zeros(9, 50)
    linear = Linear(kernels, [weight], [None], epilogue=Epilogue(dtype=torch.float32))
    linear(wide[:, 10:50], out[:, :32])
    assert torch.equal(out[:, :32], linear(wide[:, 10:50].contiguous()))
    assert out[:, 32:].eq(0).all()


def test_no_rows_give_no_rows(kernels: Kernels) -> None:
    assert Linear(kernels, [randn(8, 8)], [None])(randn(0, 8)).shape == (0, 8)
    assert Norm(kernels, RMS, randn(8), None, 1e-5, torch.float32)(randn(0, 8)).shape == (0, 8)


def variants(kernels: Kernels, dtype: torch.dtype) -> Sequence[Linear]:
    k = 67
    weights, norm = [randn(24, k, dtype=dtype), randn(24, k, dtype=dtype, seed=1)], randn(k).abs()
    own = Norm(kernels, RMS, norm, None, 1e-5, dtype)
    even = [w[:, :64].contiguous() for w in weights]
    return [
        Linear(kernels, even, [None, None], quantize=False),
        Linear(kernels, weights, [None, None], epilogue=Epilogue(activation="gelu_tanh")),
        Linear(kernels, weights, [randn(24), None], norm=own, epilogue=Epilogue(GATED, "silu")),
        Linear(kernels, weights, [None, None], quantize=True, epilogue=Epilogue(ADD, scale=0.7)),
        Linear(kernels, weights, [None, None], norm=own, quantize=True, epilogue=Epilogue(dtype=torch.float32)),
        Linear(kernels, [randn(40, 3 * BLOCK - 5, dtype=dtype)], [None], quantize=True),
        Linear(kernels, [randn(40, 3 * BLOCK, dtype=dtype)], [None], epilogue=Epilogue(ADD, scale=0.7)),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_gets_the_same_bits_whatever_rows_and_threads_are_there(kernels: Kernels, dtype: torch.dtype) -> None:
    pools = [kernels, *(Kernels(count, kernels.library) for count in (2, 3))]
    x = randn(40, 3 * BLOCK, dtype=dtype)
    for alike in zip(*(variants(pool, dtype) for pool in pools), strict=True):
        rows = x[:, : alike[0].k].contiguous()
        out = randn(40, alike[0].width, seed=5).to(alike[0].dtype)
        wanted = alike[0](rows, out.clone())
        for linear in alike:
            for begin, size in ((0, 1), (39, 1), (17, 2), (5, 7), (20, 12), (8, 13), (0, 25)):
                here = slice(begin, begin + size)
                assert torch.equal(linear(rows[here], out[here].clone()), wanted[here])
    for pool in pools[1:]:
        pool.close()


def test_matrix_tiles_round_bfloat16_in_their_own_way_and_int8_as_vectors_do() -> None:
    """So the emulated tiles are what their tests run on."""
    pools = [kernels_of("AVX-512"), kernels_of("AVX-512 with emulated tiles")]
    weight, x = randn(48, 3 * BLOCK - 5, dtype=torch.bfloat16), randn(40, 3 * BLOCK - 5, dtype=torch.bfloat16)
    for quantize in (False, True):
        epilogue = Epilogue(dtype=torch.float32)
        found, other = (Linear(pool, [weight], [None], quantize=quantize, epilogue=epilogue)(x) for pool in pools)
        assert torch.equal(found, other) == quantize
    for pool in pools:
        pool.close()


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_activation_makes_a_number_of_nan(kernels: Kernels, dtype: torch.dtype, act: str) -> None:
    """ReLU gave 0."""
    weight = randn(33, 17, dtype=dtype)
    x = randn(4, 17, dtype=dtype)
    x[1, 3] = torch.nan
    found = Linear(kernels, [weight], [None], epilogue=Epilogue(activation=act))(x)
    assert found[1].isnan().all()
    assert found[[0, 2, 3]].isfinite().all()


FORMATS = [(torch.float32, False), (torch.bfloat16, False), (torch.float16, False), (torch.float32, True)]


@pytest.mark.parametrize("mode", [STORE, GATED])
@pytest.mark.parametrize(("dtype", "quantize"), FORMATS, ids=str)
def test_a_matrix_that_is_written_again_leaves_those_beside_it(
    kernels: Kernels, dtype: torch.dtype, quantize: bool, mode: int
) -> None:
    """Their columns share panels, and with int8 weights words: 21 outputs are no whole panel."""
    old, kept, new = (randn(21, 37, dtype=dtype, seed=seed) for seed in range(3))
    bias, new_bias = randn(21, seed=4), randn(21, seed=5)
    made = partial(Linear, kernels, quantize=quantize, epilogue=Epilogue(mode))
    x = randn(13, 37, dtype=dtype, seed=6)
    first, second = made([old, kept], [bias, None]), made([kept, old], [None, bias])
    first.write([new, None], [new_bias, None])
    second.write([None, new], [None, None])
    assert torch.equal(first(x), made([new, kept], [new_bias, None])(x))
    assert torch.equal(second(x), made([kept, new], [None, bias])(x))


@pytest.mark.parametrize("quantize", [False, True])
def test_weights_of_another_dtype_are_rounded_once(kernels: Kernels, quantize: bool) -> None:
    """As master weights in float32 are, for a product in bfloat16."""
    weight, x = randn(40, 300), randn(5, 300, dtype=torch.bfloat16, seed=1)
    linear = Linear(kernels, [torch.zeros(40, 300, dtype=torch.bfloat16)], [None], quantize=quantize)
    linear.write([weight], [None])
    if quantize:
        wanted = Linear(kernels, [weight], [None], quantize=True)(x.float()).bfloat16()
    else:
        wanted = Linear(kernels, [weight.bfloat16()], [None])(x)
    assert torch.equal(linear(x), wanted)


@pytest.mark.parametrize("quantize", [False, True])
def test_columns_are_packed_as_rows(kernels: Kernels, quantize: bool) -> None:
    """Several pieces of a megabyte of a transposed matrix, as GPT-2 stores its own."""
    weight, x = randn(700, 1000), randn(3, 700, seed=1)
    transposed, rows = (Linear(kernels, [w], [None], quantize=quantize) for w in (weight.T, weight.T.contiguous()))
    assert torch.equal(transposed(x), rows(x))


def test_a_norm_is_written_in_place_for_the_product_that_it_is_part_of(kernels: Kernels) -> None:
    weight, x = randn(20, 24), randn(5, 24, seed=1)
    norm = Norm(kernels, LAYER, randn(24, seed=2), randn(24, seed=3), 1e-5, torch.float32)
    linear = Linear(kernels, [weight], [None], norm=norm)
    new = randn(24, seed=4)
    norm.write(new.bfloat16(), None)
    wanted = Norm(kernels, LAYER, new.bfloat16().float(), randn(24, seed=3), 1e-5, torch.float32)
    assert torch.equal(linear(x), Linear(kernels, [weight], [None], norm=wanted)(x))


def test_what_does_not_fit_is_not_written(kernels: Kernels) -> None:
    linear, x = Linear(kernels, [randn(20, 24)], [None]), randn(5, 24, seed=1)
    before = linear(x)
    for weights, biases in (([randn(21, 24)], [None]), ([None], [randn(20)]), ([randn(20, 25)], [None])):
        with pytest.raises(AssertionError, match=r"a kernel was given a matrix|without a bias was given one"):
            linear.write(weights, biases)
    with pytest.raises(AssertionError, match="cannot replace"):
        Norm(kernels, RMS, randn(24), None, 1e-5, torch.float32).write(randn(24), randn(24))
    assert torch.equal(linear(x), before)
