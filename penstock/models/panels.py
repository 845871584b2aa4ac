"""Attention over the paged cache with the compiled kernels: `PanelStorage` holds K/V, `PanelAttention` serves a step.

Owns the memory and the index arrays of a step; the layout of a panel is the kernels' business. CPU only. Rows of one
token that begin with the same cache blocks are attended together, so that a shared prefix is read once for all.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from penstock.errors import ConfigurationError, OutOfMemory
from penstock.kernels import native, paged
from penstock.kernels.paged import PANEL, TILE
from penstock.models.attention import Options
from penstock.models.blocks import copy_rows, give_back, runs
from penstock.models.layout import StepLayout
from penstock.models.storage import LayerShape, no_room
from penstock.step import Row

# Tokens of a prompt, or rows with a common prefix, that one task of a thread attends for.
TOKENS_PER_TASK = 48
ROWS_PER_TASK = 32
PROGRESS_S = 5.0

log = logging.getLogger("penstock")


def supports(shapes: Sequence[LayerShape]) -> bool:
    """Whether the kernels can hold what these layers store."""
    return all(
        shape.dtype in native.TYPES and shape.key_dim % 2 == 0 and max(shape.key_dim, shape.value_dim) <= paged.MAX_HEAD
        for shape in shapes
    )


class PanelStorage:
    """K/V of `num_blocks` x `block_size` slots for every layer, as panels of 16 slots; int8 with a scale per token.

    The tier of `num_host_blocks` blocks lies behind them in the same memory.
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
        self.sinks: dict[int, Tensor] = {}
        self._num_blocks = num_blocks
        self._touched = False
        panels = -(-(num_blocks + num_host_blocks) * block_size // PANEL)
        try:
            self.caches = [_cache(kernels, panels, shape, int8) for shape in shapes]
            self.table = paged.CacheTable(self.caches)
        except (OSError, MemoryError) as error:
            raise no_room(torch.device("cpu"), shapes, num_blocks * block_size, num_host_blocks * block_size) from error

    def touch(self, free_bytes: Callable[[], int]) -> None:
        """Have the system find all pages now, and leave them here; every few seconds the log says how far it is.

        Raises `OutOfMemory` where so much is not free any more: to touch it all the same may end the process.
        """
        self._touched = True
        begin = latest = time.monotonic()
        for done, cache in enumerate(self.caches):
            if (free := free_bytes()) < cache.num_bytes:
                raise OutOfMemory(
                    f"CPU out of memory: preallocate_kv_cache has touched {done} of {len(self.caches)} layers of the "
                    f"K/V cache, the next one takes {cache.num_bytes} bytes, and {free} bytes are free; lower "
                    "memory_pool_size or swap_space, or leave preallocate_kv_cache out"
                )
            cache.touch()
            if time.monotonic() > latest + PROGRESS_S:
                latest = time.monotonic()
                log.info(
                    "touched %d of %d layers of the K/V cache in %.0f s", done + 1, len(self.caches), latest - begin
                )

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks (source, destination) in every layer."""
        if not copies:
            return
        if self.block_size % PANEL == 0:
            moves, panels = runs(copies), self.block_size // PANEL
            for cache in self.caches:
                rows = cache.panels.view(-1, panels * cache.panels.shape[1])
                copy_rows(rows, rows, moves)
            return
        pairs = torch.tensor(copies, dtype=torch.int64, device="cpu")
        offsets = torch.arange(self.block_size, dtype=torch.int64, device="cpu")
        source, destination = ((pairs[:, i, None] * self.block_size + offsets).reshape(-1) for i in (0, 1))
        for cache in self.caches:
            cache.copy(source, destination)

    def swap(self, out: Sequence[tuple[int, int]], back: Sequence[tuple[int, int]]) -> None:
        """Move whole blocks out to the tier, as (block, place), and then in, as (place, block)."""
        self.copy_blocks([(block, self._num_blocks + place) for block, place in out])
        self.copy_blocks([(self._num_blocks + place, block) for place, block in back])

    def give_back(self, blocks: Sequence[int], places: Sequence[int]) -> None:
        """Let the system have the memory of blocks and places that hold nothing, unless it was to be kept."""
        unused = [] if self._touched else [*blocks, *(self._num_blocks + place for place in places)]
        for first, _, count in runs(zip(unused, unused, strict=True)):
            begin, end = first * self.block_size, (first + count) * self.block_size
            for cache in self.caches:
                give_back(cache.panels, -(-begin // PANEL), end // PANEL)


def _cache(kernels: native.Kernels, panels: int, shape: LayerShape, int8: bool) -> paged.PanelCache:
    compute = torch.bfloat16 if int8 else shape.dtype
    stored = torch.int8 if int8 else shape.dtype
    return paged.PanelCache(kernels, panels, shape.heads, shape.key_dim, shape.value_dim, stored, compute)


class PanelAttention:
    """One step's attention: for each layer, write K/V of all rows, then every row reads its own context."""

    def __init__(self, storage: PanelStorage, layout: StepLayout, layers: dict[int, int]) -> None:
        self.storage = storage
        self.kernels = storage.kernels
        self.caches = storage.caches
        self.table = storage.table
        self.steps = steps_of(layout.rows, storage.block_size, layout.write_slots.numpy())
        self._layers = layers

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        """Attend for one layer: [T, H, V]."""
        layer = self._layers[id(module)]
        out = query.new_empty(query.shape[1], query.shape[0], value.shape[-1])
        query, key, value = (_rows_of(x, out.dtype) for x in (query, key, value))
        paged.attend(
            self.kernels,
            self.caches[layer],
            self.steps,
            query,
            key,
            value,
            out,
            scaling=options.scaling,
            window=options.window,
            softcap=options.softcap,
            sinks=None if options.sinks is None else self._sinks(layer, options.sinks),
        )
        return out

    def _sinks(self, layer: int, sinks: Tensor) -> Tensor:
        if layer not in self.storage.sinks:
            self.storage.sinks[layer] = sinks.detach().float().contiguous()
        return self.storage.sinks[layer]


def _rows_of(x_H_T_D: Tensor, dtype: torch.dtype) -> Tensor:
    """Token-major, its numbers of a head side by side."""
    rows = x_H_T_D.to(dtype).transpose(0, 1)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def steps_of(rows: Sequence[Row], block_size: int, slots: np.ndarray) -> paged.Steps:
    """The kernels' index arrays of a step: where contexts lie, and which tokens are attended for together."""
    whole = block_size % PANEL == 0
    tables = [_table(row, block_size, whole) for row in rows]
    firsts = np.cumsum([0, *(row.num_tokens for row in rows)])
    groups = list(_groups(rows, tables, whole))
    order = [index for group, _ in groups for index in group]
    tables = [tables[index] for index in order]
    bundles = np.array(list(_bundles(rows, groups)), dtype=np.int32).reshape(-1, 5)
    names = ("row", "rows", "begin", "end", "shared")
    return paged.Steps(
        whole,
        slots,
        first=firsts[order],
        start=np.array([rows[index].start for index in order]),
        table=np.cumsum([0, *map(len, tables)]),
        tables=np.concatenate(tables),
        **{name: bundles[:, i] for i, name in enumerate(names)},
    )


def _table(row: Row, block_size: int, whole: bool) -> np.ndarray:
    """The panels of a row's context, or its slots where blocks are not whole panels."""
    blocks: np.ndarray = np.array(row.blocks[: -(-row.end // block_size)], dtype=np.int32)
    unit = block_size // PANEL if whole else block_size
    if unit > 1:
        blocks = (blocks[:, None] * unit + np.arange(unit, dtype=np.int32)).reshape(-1)
    return blocks[: -(-row.end // PANEL) if whole else row.end]


def _groups(rows: Sequence[Row], tables: Sequence[np.ndarray], whole: bool) -> Iterable[tuple[list[int], int]]:
    """(row indices, keys they share): one-token rows by their first tile of keys, every other row alone."""
    families: dict[bytes, list[int]] = {}
    for index, row in enumerate(rows):
        if row.num_tokens > 1 or row.start < TILE or not whole:
            yield [index], 0
        else:
            families.setdefault(tables[index][: TILE // PANEL].tobytes(), []).append(index)
    for family in families.values():
        for begin in range(0, len(family), ROWS_PER_TASK):
            part = family[begin : begin + ROWS_PER_TASK]
            yield part, _shared(rows, tables, part)


def _shared(rows: Sequence[Row], tables: Sequence[np.ndarray], group: Sequence[int]) -> int:
    """How many keys, in whole tiles, all rows of a group have in common."""
    if len(group) == 1:
        return 0
    per_tile = TILE // PANEL
    most = min(rows[index].start for index in group) // TILE * per_tile
    same = (np.stack([tables[index][:most] for index in group]) == tables[group[0]][:most]).all(axis=0)
    count = most if same.all() else int(same.argmin())
    return count // per_tile * TILE


def _bundles(rows: Sequence[Row], groups: Sequence[tuple[list[int], int]]) -> Iterable[tuple[int, int, int, int, int]]:
    """(first row, rows, begin, end, shared) of each task; a prompt's last tokens, which see most, come first."""
    at = 0
    for group, shared in groups:
        tokens = rows[group[0]].num_tokens
        for end in range(tokens, 0, -TOKENS_PER_TASK):
            yield at, len(group), max(0, end - TOKENS_PER_TASK), end, shared
        at += len(group)
