"""No kernel is called with a tensor that is not what it takes it for: an error comes before any memory is touched.

Each buffer is wrong in one way at a time: another dtype, fewer rows, fewer numbers in a row, numbers that do not lie
side by side, another device.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.kernels.build import UNIT
from penstock.kernels.logits import LogitKernels
from penstock.kernels.native import Kernels, available, compare_sizes
from penstock.kernels.paged import AttentionMetadata, AttentionOptions, CacheTable, PanelCache, attend
from penstock.kernels.products import GATED, RMS, Epilogue, Linear, Norm
from penstock.kernels.program import STREAM, Attention, HeadGeometry, Program, Rotary
from penstock.kernels.structures import STRUCTURES
from tests.unit.kernels.hand import Sequences

ROWS, WIDTH, HEADS, KV_HEADS, DIM = 3, 32, 4, 2, 8

WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "bfloat16": lambda x: x.bfloat16(),
    "float64": lambda x: x.double(),
    "a row less": lambda x: x[:-1],
    "a number less": lambda x: x[..., :-1].contiguous(),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "on no device": lambda x: x.to("meta"),
}
wrong = pytest.mark.parametrize("spoiled", WRONG.values(), ids=WRONG)
refused = pytest.raises(AssertionError, match="a kernel was given")


@pytest.fixture(scope="module")
def pool() -> Iterator[Kernels]:
    if not available():
        pytest.skip("no compiler")
    made = Kernels(1)
    yield made
    made.close()


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device="cpu")


@wrong
@pytest.mark.parametrize("which", range(2))
def test_products_take_their_rows_only(pool: Kernels, spoiled: Callable[[Tensor], Tensor], which: int) -> None:
    linear = Linear(pool, [zeros(WIDTH, WIDTH)], [None])
    x, out = (spoiled(y) if i == which else y for i, y in enumerate((zeros(ROWS, WIDTH), zeros(ROWS, WIDTH))))
    if (which, spoiled) == (0, WRONG["a row less"]):
        x, out = out, x  # fewer rows are another batch; the output has to have them all
    with refused:
        linear(x, out)


@wrong
@pytest.mark.parametrize("which", range(2))
def test_norms_take_their_rows_only(pool: Kernels, spoiled: Callable[[Tensor], Tensor], which: int) -> None:
    norm = Norm(pool, RMS, zeros(WIDTH), None, 1e-6, torch.float32)
    x, out = (spoiled(y) if i == which else y for i, y in enumerate((zeros(ROWS, WIDTH), zeros(ROWS, WIDTH))))
    with refused:
        norm(x, out)


@wrong
@pytest.mark.parametrize("name", ["query", "key", "value", "out", "sinks"])
def test_attention_takes_what_its_step_and_cache_describe(
    pool: Kernels, spoiled: Callable[[Tensor], Tensor], name: str
) -> None:
    world = Sequences(pool, (ROWS,), HEADS, KV_HEADS, DIM)
    tensors = {
        "query": zeros(ROWS, HEADS, DIM),
        "key": zeros(ROWS, KV_HEADS, DIM),
        "value": zeros(ROWS, KV_HEADS, DIM),
        "out": zeros(ROWS, HEADS, DIM),
        "sinks": zeros(HEADS),
    }
    tensors[name] = (
        tensors[name].repeat(2)[::2] if (name, spoiled) == ("sinks", WRONG["transposed"]) else spoiled(tensors[name])
    )
    sinks = tensors.pop("sinks")
    with refused:
        attend(pool, world.cache, world.metadata([(0, 0, ROWS)]), **tensors, scaling=1.0, sinks=sinks)


def program_of(pool: Kernels, cache_of: Callable[..., PanelCache] = PanelCache) -> tuple[Program, Any]:
    """One attention over its own stream, and a step of it."""
    world = Sequences(pool, (ROWS,), HEADS, KV_HEADS, DIM)
    geometry, rotary = HeadGeometry(HEADS, KV_HEADS, DIM, DIM), Rotary(0, 0.0, None, None, rotates=True)
    attention = Attention(0, geometry, AttentionOptions(1.0), rotary, torch.float32)
    program = Program(pool, torch.float32)
    program.attention(attention, STREAM, 1)
    cache = cache_of(pool, 4, KV_HEADS, DIM, DIM, torch.float32, torch.float32)
    return program, SimpleNamespace(table=CacheTable([cache]), metadata=world.metadata([(0, 0, ROWS)]))


@wrong
@pytest.mark.parametrize("name", ["x", "cos", "sin"])
def test_programs_take_their_stream_and_their_angles_only(
    pool: Kernels, spoiled: Callable[[Tensor], Tensor], name: str
) -> None:
    program, paged = program_of(pool)
    tensors = {"x": zeros(ROWS, (HEADS + 2 * KV_HEADS) * DIM), "cos": zeros(1, ROWS, DIM), "sin": zeros(1, ROWS, DIM)}
    program.run(tensors["x"], paged, tensors["cos"], tensors["sin"])
    tensors[name] = spoiled(tensors[name])
    with pytest.raises((AssertionError, KeyError)):
        program.run(tensors["x"], paged, tensors["cos"], tensors["sin"])


def test_angles_wider_than_a_head_are_refused(pool: Kernels) -> None:
    program, paged = program_of(pool)
    wide = zeros(1, ROWS, 2 * DIM)
    with pytest.raises(AssertionError, match="do not rotate"):
        program.run(zeros(ROWS, (HEADS + 2 * KV_HEADS) * DIM), paged, wide, wide)


@pytest.mark.parametrize("dims", [(1, DIM, DIM), (KV_HEADS, 2 * DIM, DIM), (KV_HEADS, DIM, DIM // 2)])
def test_programs_take_caches_of_their_own_heads_only(pool: Kernels, dims: tuple[int, int, int]) -> None:
    program, paged = program_of(
        pool, lambda kernels, panels, *_: PanelCache(kernels, panels, *dims, torch.float32, torch.float32)
    )
    with pytest.raises(AssertionError, match="does not store"):
        program.run(zeros(ROWS, (HEADS + 2 * KV_HEADS) * DIM), paged, None, None)


def test_parts_of_a_program_agree_on_the_width_of_a_row(pool: Kernels) -> None:
    program = Program(pool, torch.float32)
    program.linear(Linear(pool, [zeros(WIDTH, WIDTH)], [None]), STREAM, 1)
    with pytest.raises(AssertionError, match="rows of 32 numbers are taken for rows of 31"):
        program.linear(Linear(pool, [zeros(WIDTH, WIDTH - 1)], [None]), 1, STREAM)
    narrower = Program(pool, torch.float32)
    narrower.linear(Linear(pool, [zeros(WIDTH // 2, WIDTH // 2)], [None]), STREAM, 1)
    with pytest.raises(AssertionError, match="of different widths"):
        program.extend(narrower)


def test_weights_and_biases_of_a_product_belong_together(pool: Kernels) -> None:
    weight = zeros(WIDTH, WIDTH)
    with refused:
        Linear(pool, [weight, weight[:, 1:]], [None, None], epilogue=Epilogue(GATED))
    with refused:
        Linear(pool, [weight, weight.double()], [None, None], epilogue=Epilogue(GATED))
    with pytest.raises(AssertionError, match="does not fit 32 outputs"):
        Linear(pool, [weight], [zeros(WIDTH - 1)])
    with pytest.raises(AssertionError, match="cannot be applied to 32"):
        Linear(pool, [weight], [None], norm=Norm(pool, RMS, zeros(WIDTH - 1), None, 1e-6, torch.float32))
    with pytest.raises(AssertionError, match="has a bias of 31"):
        Norm(pool, RMS, zeros(WIDTH), zeros(WIDTH - 1), 1e-6, torch.float32)


def test_logits_are_summarized_in_float32_and_whole_blocks(pool: Kernels) -> None:
    for logits in (zeros(2, 128).double(), zeros(128, 2).T, zeros(2, 128)[:, :64]):
        with refused:
            LogitKernels(pool, 64).summarize(logits)
    with pytest.raises(AssertionError, match="are not blocks of 64"):
        LogitKernels(pool, 64).summarize(zeros(2, 100))


def test_slots_are_int64_and_as_many_to_as_from(pool: Kernels) -> None:
    cache = PanelCache(pool, 2, KV_HEADS, DIM, DIM, torch.float32, torch.float32)
    slots = torch.arange(4, dtype=torch.int64, device="cpu")
    for attempt in (lambda: cache.read(slots.int()), lambda: cache.copy(slots, slots[1:])):
        with refused:
            attempt()


def test_a_step_describes_every_task(pool: Kernels) -> None:
    index = torch.zeros(2, dtype=torch.int32, device="cpu").numpy()
    names = (
        "first_token",
        "first_position",
        "table_begin",
        "tables",
        "task_row",
        "task_rows",
        "task_begin",
        "task_end",
    )
    with pytest.raises(AssertionError, match="not described in full"):
        AttentionMetadata(True, index, **dict.fromkeys(names, index), task_shared=index[:1])


def test_a_structure_that_differs_from_the_one_in_c_is_found_when_kernels_are_made(pool: Kernels) -> None:
    mirror = type("norm", (ctypes.Structure,), {"_fields_": [("n", ctypes.c_long)]})
    with pytest.raises(AssertionError, match="struct norm has 8 bytes in Python and 40 in C"):
        compare_sizes(pool.library, {"norm": mirror})
    with pytest.raises(AssertionError, match="and 0 in C"):
        compare_sizes(pool.library, {"nobody": mirror})


def test_every_structure_that_c_knows_has_a_mirror_and_every_mirror_its_size(pool: Kernels) -> None:
    names = re.findall(r"STRUCTURE\((\w+)\)", UNIT.read_text())
    assert sorted(set(names) - {"type"}) == sorted(STRUCTURES)
    compare_sizes(pool.library, STRUCTURES)
