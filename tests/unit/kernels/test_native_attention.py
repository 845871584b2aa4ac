"""Attention of the compiled kernels over paged keys and values is attention written out by hand, and always the same
bits: whatever the chunks, the neighbours, the threads and the sharing."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.kernels.native import Kernels
from tests.unit.kernels.hand import ROUNDING, Part, Sequences, rotation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Heads, key/value heads, sizes of keys and values: groups of 1 to 24, which need not divide the rows of a tile.
SHAPES = {
    "4 heads of 8": (4, 4, 8, 8),
    "groups of 2, 16": (16, 8, 16, 16),
    "groups of 3, 24": (6, 2, 24, 24),
    "groups of 7, 64": (14, 2, 64, 64),
    "groups of 5, values of another size": (10, 2, 32, 13),
    "one group of 9, 80": (9, 1, 80, 80),
    "one group of 24, 128": (24, 1, 128, 128),
    "512": (2, 1, 512, 512),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 20},
    "window of one": {"window": 1},
    "long window": {"window": 100},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.linspace(-1, 3, 6)},
    "everything": {"window": 70, "softcap": 3.0, "sinks": torch.linspace(-1, 3, 6)},
}
# Decoding rows and chunks, at, before and behind the edges of panels and of tiles of keys.
PARTS: tuple[Part, ...] = (
    (0, 0, 70),
    (1, 130, 131),
    (2, 63, 65),
    (3, 200, 201),
    (4, 0, 1),
    (5, 15, 75),
    (6, 0, 130),
    (7, 64, 65),
)
LENGTHS = [end for _, _, end in PARTS]
INT8 = {"dtype": torch.bfloat16, "store": torch.int8}
FORMATS: dict[str, dict[str, Any]] = {str(dtype): {"dtype": dtype} for dtype in DTYPES} | {"int8": INT8}
LAYOUTS = [(format, 16) for format in FORMATS] + [(str(dtype), 4) for dtype in DTYPES]  # int8 needs whole panels


def check(worlds: list[Sequences], scaling: float, **options: Any) -> None:
    """Every part within the rounding of the weights, of the result, and of a float32 sum.

    The worlds differ in their blocks only.
    """
    by_hand = [worlds[0].by_hand(part, scaling, **options) for part in PARTS]
    for world in worlds:
        world.fill()
        found = world.attend(*PARTS, scaling=scaling, **options)
        for part, own, wanted in zip(PARTS, found, by_hand, strict=True):
            largest = world.value[part[0]].abs().max().item()
            torch.testing.assert_close(own.double(), wanted, rtol=0, atol=2 * ROUNDING[world.dtype] * largest + 4e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_of_every_shape_attend_as_by_hand(kernels: Kernels, dtype: torch.dtype, shape: str) -> None:
    worlds = [Sequences(kernels, LENGTHS, *SHAPES[shape], dtype, block_size=size) for size in (16, 4)]
    check(worlds, SHAPES[shape][2] ** -0.5)


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_windows_soft_caps_and_sinks_are_those_by_hand(kernels: Kernels, dtype: torch.dtype, kind: str) -> None:
    worlds = [Sequences(kernels, LENGTHS, 6, 2, 16, dtype=dtype, block_size=size) for size in (16, 1, 32)]
    check(worlds, 0.4, **OPTIONS[kind])


def rounded_to_int8(x: Tensor) -> Tensor:
    """[L, K, D], rotated and with one scale per token and head."""
    rotated = x.double() @ rotation(x.shape[-1])
    step = rotated.abs().amax(-1, keepdim=True) / 127
    return (rotated / step).round() * step @ rotation(x.shape[-1]).T


@pytest.mark.parametrize("kind", OPTIONS)
def test_int8_caches_attend_to_keys_and_values_of_eight_bits(kernels: Kernels, kind: str) -> None:
    world = Sequences(kernels, LENGTHS, 6, 2, 64, **INT8)
    world.fill()
    found = world.attend(*PARTS, scaling=0.125, **OPTIONS[kind])
    world.key, world.value = ([rounded_to_int8(x) for x in side] for side in (world.key, world.value))
    for part, own in zip(PARTS, found, strict=True):
        wanted = world.by_hand(part, 0.125, **OPTIONS[kind])
        torch.testing.assert_close(own.double(), wanted, rtol=0, atol=0.04)  # a few roundings of bfloat16


def test_int8_caches_survive_channels_that_are_far_larger_than_the_others(kernels: Kernels) -> None:
    """One scale for all channels of a key rounded the small ones away, and with them what is attended to."""
    world = Sequences(kernels, (200,), 6, 2, 64, **INT8)
    for x in (world.key, world.value):
        x[0][:, :, 5] = 60 + x[0][:, :, 5]
    world.query[0][:, :, 5] *= 0.1
    world.fill()
    found, wanted = world.attend((0, 0, 200), scaling=0.125)[0].double(), world.by_hand((0, 0, 200), 0.125)
    assert (found - wanted)[..., :5].norm() < 0.1 * wanted[..., :5].norm()


def chunks(length: int, rng: random.Random) -> list[tuple[int, int]]:
    ends = sorted({length, *(rng.randint(1, length) for _ in range(rng.randint(0, 6)))})
    return list(zip([0, *ends], ends, strict=False))


@pytest.mark.parametrize("kind", ["plain", "everything"])
@pytest.mark.parametrize(("format", "block_size"), LAYOUTS)
def test_a_token_gets_the_same_bits_in_any_chunk_beside_anybody_on_any_threads(
    kernels: Kernels, format: str, block_size: int, kind: str
) -> None:
    pools = [kernels, *(Kernels(count, kernels.library) for count in (2, 3))]
    world = Sequences(kernels, (135, 97, 40), 6, 2, 24, block_size=block_size, **FORMATS[format])
    wanted = [world.attend((which, 0, length), **OPTIONS[kind])[0] for which, length in enumerate(world.lengths)]
    for seed in range(3):
        rng = random.Random(seed)
        left = [(which, begin, end) for which, n in enumerate(world.lengths) for begin, end in chunks(n, rng)]
        while left:  # a step takes the next chunk of some sequences, at least one
            ready = [part for part in left if not any(part[0] == o[0] and o[1] < part[1] for o in left)]
            step = rng.sample(ready, rng.randint(1, len(ready)))
            for part, out in zip(step, world.attend(*step, kernels=pools[seed % 3], **OPTIONS[kind]), strict=True):
                assert torch.equal(out, wanted[part[0]][part[1] : part[2]])
                left.remove(part)
    for which, length in enumerate(world.lengths):
        for place in range(which, length, 5):
            assert torch.equal(world.attend((which, place, place + 1), **OPTIONS[kind])[0][0], wanted[which][place])
    for pool in pools[1:]:
        pool.close()


@pytest.mark.parametrize("kind", ["plain", "everything"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (6, 2), (30, 1)])
@pytest.mark.parametrize("format", FORMATS)
def test_rows_that_share_a_prefix_get_the_bits_that_they_get_alone(
    kernels: Kernels, format: str, heads: int, kv_heads: int, kind: str
) -> None:
    options = OPTIONS[kind] | ({"sinks": torch.linspace(-1, 3, heads)} if kind == "everything" else {})
    for shared, lengths in ((128, range(129, 142)), (192, (200, 193, 300)), (64, (66,) * 35)):
        world = Sequences(kernels, lengths, heads, kv_heads, 16, shared=shared, **FORMATS[format])
        world.fill()
        parts = [(which, length - 1, length) for which, length in enumerate(lengths)]
        together = world.attend(*parts, **options)
        for which in range(0, len(parts), 3):
            assert torch.equal(together[which], world.attend(parts[which], **options)[0])


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("format", "block_size"), LAYOUTS)
def test_broken_numbers_of_one_sequence_reach_nobody_else(
    kernels: Kernels, format: str, block_size: int, broken: float
) -> None:
    """Neither beside it in a step, nor after it in the slots that it leaves."""
    clean, world = (
        Sequences(kernels, (100, 97, 101), 6, 2, 24, block_size=block_size, **FORMATS[format]) for _ in range(2)
    )
    for x in (world.query, world.key, world.value):
        x[1][:, :, ::2] = broken
    parts = ((0, 0, 100), (1, 0, 97), (2, 0, 101))
    wanted, found = clean.attend(*parts), world.attend(*parts)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[2], wanted[2])
    assert not found[1].isfinite().any()
    clean.blocks[2] = world.blocks[2] = world.blocks[1][: len(world.blocks[2])] + world.blocks[2][-1:]
    for part in ((2, 0, 3), (2, 3, 70), (2, 70, 71)):
        assert torch.equal(world.attend(part)[0], clean.attend(part)[0])


# Tokens of one sequence that are broken: in the middle, all of the first tile of keys, and the last one.
BROKEN = {"one token": [37], "a tile": list(range(64)), "the last token": [99]}


@pytest.mark.parametrize("kind", ["plain", "window", "softcap", "sinks", "everything"])
@pytest.mark.parametrize("tokens", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize(("format", "block_size"), LAYOUTS)
def test_whoever_sees_a_broken_token_gets_no_numbers_and_whoever_does_not_gets_its_bits(
    kernels: Kernels, format: str, block_size: int, tokens: list[int], kind: str
) -> None:
    """NaN and infinities in values were replaced by 0, and read as that by the token itself."""
    clean, world = (Sequences(kernels, (100, 90), 6, 2, 24, block_size=block_size, **FORMATS[format]) for _ in range(2))
    for x, number in ((world.value, torch.nan), (world.value, torch.inf), (world.key, -torch.inf)):
        before = x[0].clone()
        x[0][tokens, 1, 5] = number
        wanted, found = (w.attend((0, 0, 100), (1, 0, 90), **OPTIONS[kind]) for w in (clean, world))
        place, window = torch.arange(100), OPTIONS[kind].get("window", 100)
        sees = torch.stack([(place >= token) & (place < token + window) for token in tokens]).any(0)
        assert not found[0][sees, 3:].isfinite().any()
        assert torch.equal(found[0][~sees], wanted[0][~sees])
        assert torch.equal(found[0][:, :3], wanted[0][:, :3])  # the other key/value head's
        assert torch.equal(found[1], wanted[1])
        step = world.attend((0, 99, 100), **OPTIONS[kind])[0]
        assert torch.equal(step.isfinite(), found[0][99:].isfinite())
        x[0] = before


@pytest.mark.parametrize("format", FORMATS)
def test_a_broken_token_of_a_shared_prefix_reaches_all_that_share_it(kernels: Kernels, format: str) -> None:
    world = Sequences(kernels, (140, 150, 160), 6, 2, 24, shared=128, **FORMATS[format])
    world.value[0][70] = torch.nan
    world.fill()
    world.attend((0, 0, 140))  # what the others wrote over it
    for out in world.attend((0, 139, 140), (1, 149, 150), (2, 159, 160)):
        assert not out.isfinite().any()


@pytest.mark.parametrize("format", FORMATS)
def test_what_was_written_is_read_back_and_copied_slot_by_slot(kernels: Kernels, format: str) -> None:
    world = Sequences(kernels, (40, 40), 4, 2, 24, 10, **FORMATS[format])
    world.attend((0, 0, 40))
    source, target = world.slots(0), world.slots(1).flip(0)
    world.cache.copy(source, target)
    for slots in (source, target):
        for found, wanted in zip(world.cache.read(slots), (world.key[0], world.value[0]), strict=True):
            if format == "int8":
                turn = rotation(wanted.shape[-1])
                step = (wanted.double() @ turn).abs().amax(-1, keepdim=True) / 127
                assert (((found - wanted).double() @ turn).abs() <= 0.503 * step).all()
            else:
                assert torch.equal(found, wanted.float())
