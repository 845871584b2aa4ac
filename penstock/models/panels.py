"""Paged attention with the compiled kernels: `PanelBackend`, `PanelStorage` and `PanelAttention`. CPU only.

Owns the K/V memory and the index arrays of a step; the kernels define the layout of a panel. One-token rows whose
contexts begin with the same cache blocks are computed together, so that a shared prefix is read once for all of them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from penstock.errors import ConfigurationError, OutOfMemory
from penstock.kernels import native, paged
from penstock.kernels.logits import LogitKernels
from penstock.kernels.paged import PANEL, TILE
from penstock.models.attention import KVStorage, StepAttention
from penstock.models.layout import StepLayout
from penstock.models.memory import host_free_bytes
from penstock.models.storage import LayerShape, cache_out_of_memory, contiguous_runs, copy_rows, release_rows
from penstock.models.vocabulary import CHUNK
from penstock.step import Row

# Tokens of a prompt, or rows with a common prefix, that one task of a thread computes attention for.
TOKENS_PER_TASK = 48
ROWS_PER_TASK = 32
PROGRESS_S = 5.0  # between log lines while memory is touched

log = logging.getLogger("penstock")


def supports(shapes: Sequence[LayerShape]) -> bool:
    """Whether the kernels can hold what these layers store."""
    return all(
        shape.dtype in native.TYPES and shape.key_dim % 2 == 0 and max(shape.key_dim, shape.value_dim) <= paged.MAX_HEAD
        for shape in shapes
    )


class PanelBackend:
    """Makes `PanelStorage`s: `int8` stores a byte per number; `touch` has the system allocate all memory at once."""

    def __init__(self, kernels: native.Kernels, int8: bool, *, touch: bool = False) -> None:
        self._kernels = kernels
        self._int8 = int8
        self._touch = touch
        self.logit_kernels: LogitKernels | None = LogitKernels(kernels, CHUNK)

    def storage(
        self, shapes: Sequence[LayerShape], num_blocks: int, block_size: int, num_host_blocks: int = 0
    ) -> KVStorage:
        """Allocate K/V blocks, and those of the host tier. Raises `OutOfMemory`."""
        storage = PanelStorage(self._kernels, shapes, num_blocks, block_size, self._int8, num_host_blocks)
        if self._touch:
            storage.touch(host_free_bytes)
        return storage

    def bytes_per_token(self, shapes: Sequence[LayerShape]) -> int:
        """Bytes of K and V of one token, all layers together; int8 adds two float32 scales per head."""
        if self._int8:
            return sum(shape.heads * (shape.key_dim + shape.value_dim + 8) for shape in shapes)
        return sum(shape.bytes_per_token for shape in shapes)

    def close(self) -> None:
        """End the kernels' threads."""
        self._kernels.close()


class PanelStorage:
    """K/V of `num_blocks` x `block_size` slots for every layer, as panels of 16 slots; int8 with a scale per token.

    The host tier of `num_host_blocks` blocks follows in the same memory: place i is block `num_blocks + i`.
    """

    def __init__(
        self,
        kernels: native.Kernels,
        shapes: Sequence[LayerShape],
        num_blocks: int,
        block_size: int,
        int8: bool,
        num_host_blocks: int = 0,
    ) -> None:
        if int8 and block_size % PANEL:
            raise ConfigurationError(f"kv_cache_dtype='int8' needs a block_size that is a multiple of {PANEL}")
        self.kernels = kernels
        self.block_size = block_size
        self._num_blocks = num_blocks
        self._touched = False
        panels = -(-(num_blocks + num_host_blocks) * block_size // PANEL)
        try:
            self.caches = [_cache(kernels, panels, shape, int8) for shape in shapes]
            self.table = paged.CacheTable(self.caches)
        except (OSError, MemoryError) as error:
            slots, host_slots = num_blocks * block_size, num_host_blocks * block_size
            raise cache_out_of_memory(torch.device("cpu"), shapes, slots, host_slots) from error

    def touch(self, free_bytes: Callable[[], int]) -> None:
        """Have the system allocate all pages now, and keep them; every few seconds the log shows the progress.

        Raises `OutOfMemory` where less than the next layer is free: to touch it anyway may end the process.
        """
        self._touched = True
        begin = last_log = time.monotonic()
        for num_touched, cache in enumerate(self.caches):
            if (free := free_bytes()) < cache.num_bytes:
                raise OutOfMemory(
                    f"CPU out of memory: preallocate_kv_cache has touched {num_touched} of {len(self.caches)} layers "
                    f"of the K/V cache, the next one takes {cache.num_bytes} bytes, and {free} bytes are free; lower "
                    "memory_pool_size or swap_space, or leave preallocate_kv_cache out"
                )
            cache.touch()
            if time.monotonic() > last_log + PROGRESS_S:
                last_log = time.monotonic()
                log.info(
                    "touched %d of %d layers of the K/V cache in %.0f s",
                    num_touched + 1,
                    len(self.caches),
                    last_log - begin,
                )

    def attention(self, layout: StepLayout, layers: Mapping[int, int]) -> StepAttention:
        """The attention of one step over this storage."""
        metadata = metadata_of(layout.rows, self.block_size, layout.write_slots.numpy())
        return PanelAttention(self, layers, metadata, self.table)

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (source, destination) in every layer."""
        if not copies:
            return
        if self.block_size % PANEL == 0:
            runs, panels = contiguous_runs(copies), self.block_size // PANEL
            for cache in self.caches:
                blocks = cache.panels.view(-1, panels * cache.panels.shape[1])
                copy_rows(blocks, blocks, runs)
            return
        pairs = torch.tensor(copies, dtype=torch.int64, device="cpu")
        offsets = torch.arange(self.block_size, dtype=torch.int64, device="cpu")
        source, destination = ((pairs[:, i, None] * self.block_size + offsets).reshape(-1) for i in (0, 1))
        for cache in self.caches:
            cache.copy(source, destination)

    def swap(self, out: Sequence[tuple[int, int]], back: Sequence[tuple[int, int]]) -> None:
        """Move blocks to the host tier, as (block, place), then others in, as (place, block)."""
        self.copy_blocks([(block, self._num_blocks + place) for block, place in out])
        self.copy_blocks([(self._num_blocks + place, block) for place, block in back])

    def release(self, blocks: Sequence[int], places: Sequence[int]) -> None:
        """Give the memory of blocks that hold nothing back to the system, unless it was touched to be kept."""
        unused = [] if self._touched else [*blocks, *(self._num_blocks + place for place in places)]
        for first, _, count in contiguous_runs(zip(unused, unused, strict=True)):
            begin, end = first * self.block_size, (first + count) * self.block_size
            for cache in self.caches:
                release_rows(cache.panels, -(-begin // PANEL), end // PANEL)


def _cache(kernels: native.Kernels, panels: int, shape: LayerShape, int8: bool) -> paged.PanelCache:
    compute = torch.bfloat16 if int8 else shape.dtype
    stored = torch.int8 if int8 else shape.dtype
    return paged.PanelCache(kernels, panels, shape.heads, shape.key_dim, shape.value_dim, stored, compute)


@dataclass(frozen=True, slots=True)
class PanelAttention:
    """The attention of one step: for each layer, stores K/V of all rows; then every row attends to its own context.

    A fused layer does the same inside its own kernels and reads `metadata` and `table` only.
    """

    storage: PanelStorage
    layers: Mapping[int, int]
    metadata: paged.AttentionMetadata
    table: paged.CacheTable

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: paged.AttentionOptions
    ) -> Tensor:
        """Attend for one layer: [T, H, V]."""
        layer = self.layers[id(module)]
        out = query.new_empty(query.shape[1], query.shape[0], value.shape[-1])
        query, key, value = (_token_major(x, out.dtype) for x in (query, key, value))
        paged.attend(
            self.storage.kernels,
            self.storage.caches[layer],
            self.metadata,
            query,
            key,
            value,
            out,
            scaling=options.scaling,
            window=options.window,
            softcap=options.softcap,
            sinks=None if options.sinks is None else options.sinks.detach().float().contiguous(),
        )
        return out


def _token_major(x_H_T_D: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, H, D], the numbers of a head contiguous."""
    rows = x_H_T_D.to(dtype).transpose(0, 1)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def metadata_of(rows: Sequence[Row], block_size: int, slots: np.ndarray) -> paged.AttentionMetadata:
    """The kernels' index arrays of a step: where each row's context lies, and which tokens form a task."""
    by_panel = block_size % PANEL == 0
    tables = [_table(row, block_size, by_panel) for row in rows]
    first_tokens = np.cumsum([0, *(row.end - row.start for row in rows)])
    groups = list(_groups(rows, tables, by_panel))
    order = [index for group, _ in groups for index in group]
    tables = [tables[index] for index in order]
    tasks = np.array(list(_tasks(rows, groups)), dtype=np.int32).reshape(-1, 5)
    names = ("task_row", "task_rows", "task_begin", "task_end", "task_shared")
    return paged.AttentionMetadata(
        by_panel,
        slots,
        first_token=first_tokens[order],
        first_position=np.array([rows[index].start for index in order]),
        table_begin=np.cumsum([0, *map(len, tables)]),
        tables=np.concatenate(tables),
        **{name: tasks[:, i] for i, name in enumerate(names)},
    )


def _table(row: Row, block_size: int, by_panel: bool) -> np.ndarray:
    """The panels of a row's context, or its slots where blocks are not multiples of a panel."""
    blocks: np.ndarray = np.array(row.blocks[: -(-row.end // block_size)], dtype=np.int32)
    unit = block_size // PANEL if by_panel else block_size
    if unit > 1:
        blocks = (blocks[:, None] * unit + np.arange(unit, dtype=np.int32)).reshape(-1)
    return blocks[: -(-row.end // PANEL) if by_panel else row.end]


def _groups(rows: Sequence[Row], tables: Sequence[np.ndarray], by_panel: bool) -> Iterable[tuple[list[int], int]]:
    """(row indices, keys they share): one-token rows by their first tile of keys, every other row alone."""
    families: dict[bytes, list[int]] = {}
    for index, row in enumerate(rows):
        if row.num_tokens > 1 or row.start < TILE or not by_panel:
            yield [index], 0
        else:
            families.setdefault(tables[index][: TILE // PANEL].tobytes(), []).append(index)
    for family in families.values():
        for begin in range(0, len(family), ROWS_PER_TASK):
            members = family[begin : begin + ROWS_PER_TASK]
            yield members, _num_shared_keys(rows, tables, members)


def _num_shared_keys(rows: Sequence[Row], tables: Sequence[np.ndarray], group: Sequence[int]) -> int:
    """How many keys, in whole tiles, all rows of a group have in common."""
    if len(group) == 1:
        return 0
    per_tile = TILE // PANEL
    limit = min(rows[index].start for index in group) // TILE * per_tile
    equal = (np.stack([tables[index][:limit] for index in group]) == tables[group[0]][:limit]).all(axis=0)
    count = limit if equal.all() else int(equal.argmin())
    return count // per_tile * TILE


def _tasks(rows: Sequence[Row], groups: Sequence[tuple[list[int], int]]) -> Iterable[tuple[int, int, int, int, int]]:
    """(first row, rows, begin, end, shared) of each task; a prompt's last tokens, which have the most keys, first."""
    first_row = 0
    for group, shared in groups:
        num_tokens = rows[group[0]].num_tokens
        for end in range(num_tokens, 0, -TOKENS_PER_TASK):
            yield first_row, len(group), max(0, end - TOKENS_PER_TASK), end, shared
        first_row += len(group)
