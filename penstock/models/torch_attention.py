"""Paged attention in plain torch, on any device: `TorchBackend`, `SlotStorage` and `PagedAttention`.

The reference that the compiled kernels are compared with, and what runs where they cannot. Owns the tensors of K/V
slots and the grouping of a step's rows. One-token rows with contexts of similar length are padded and computed
together; every longer row is computed alone.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from penstock.kernels import reference
from penstock.kernels.logits import LogitKernels
from penstock.kernels.paged import AttentionOptions
from penstock.models.attention import KVStorage, StepAttention
from penstock.models.layout import StepLayout, on_device, slots_of
from penstock.models.storage import LayerShape, cache_out_of_memory, contiguous_runs, copy_rows, release_rows
from penstock.step import Row


class TorchBackend:
    """Makes `SlotStorage`s on one device."""

    logit_kernels: LogitKernels | None = None

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def storage(
        self, shapes: Sequence[LayerShape], num_blocks: int, block_size: int, num_host_blocks: int = 0
    ) -> KVStorage:
        """Allocate K/V blocks, and those of the host tier. Raises `OutOfMemory`."""
        return SlotStorage(shapes, num_blocks, block_size, self._device, num_host_blocks)

    def bytes_per_token(self, shapes: Sequence[LayerShape]) -> int:
        """Bytes of K and V of one token, all layers together."""
        return sum(shape.bytes_per_token for shape in shapes)

    def close(self) -> None:
        """There is nothing to close."""


class SlotStorage:
    """K/V of `num_blocks` x `block_size` slots for every layer: `keys[i]` is [slots, heads, key_dim].

    The host tier of `num_host_blocks` blocks lies in ordinary memory, pinned where the device is another one.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        num_blocks: int,
        block_size: int,
        device: torch.device,
        num_host_blocks: int = 0,
    ) -> None:
        self.block_size = block_size
        self._device = device
        slots = num_blocks * block_size
        try:
            self.keys = [_zeros((slots, s.heads, s.key_dim), s.dtype, device) for s in shapes]
            self.values = [_zeros((slots, s.heads, s.value_dim), s.dtype, device) for s in shapes]
            self._blocks = [cache.view(num_blocks, -1) for cache in (*self.keys, *self.values)]
            self._host_blocks = [_host_like(blocks, num_host_blocks) for blocks in self._blocks]
        except (RuntimeError, MemoryError, OSError) as error:
            raise cache_out_of_memory(device, shapes, slots, num_host_blocks * block_size) from error

    def attention(self, layout: StepLayout, layers: Mapping[int, int]) -> StepAttention:
        """The attention of one step over this storage."""
        return PagedAttention(self, layout, layers)

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (source, destination) in every layer."""
        if not copies:
            return
        pairs = torch.tensor(copies, dtype=torch.int64, device=self._device)
        offsets = torch.arange(self.block_size, dtype=torch.int64, device=self._device)
        source, destination = ((pairs[:, i, None] * self.block_size + offsets).reshape(-1) for i in (0, 1))
        for cache in (*self.keys, *self.values):
            reference.copy_slots(cache, source, destination)

    def swap(self, out: Sequence[tuple[int, int]], back: Sequence[tuple[int, int]]) -> None:
        """Move blocks to the host tier, as (block, place), then others in, as (place, block); synchronous."""
        runs_out, runs_back = contiguous_runs(out), contiguous_runs(back)
        for blocks, host_blocks in zip(self._blocks, self._host_blocks, strict=True):
            copy_rows(blocks, host_blocks, runs_out)
            copy_rows(host_blocks, blocks, runs_back)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def release(self, blocks: Sequence[int], places: Sequence[int]) -> None:
        """Give the memory of blocks that hold nothing back to the system, where that is possible in pieces."""
        for tensors, unused in ((self._blocks, blocks), (self._host_blocks, places)):
            for first, _, count in contiguous_runs(zip(unused, unused, strict=True)):
                for rows in tensors:
                    release_rows(rows, first, first + count)


def _host_like(blocks: Tensor, count: int) -> Tensor:
    """`count` such blocks in host memory. A bus copies at full speed only from and to pinned memory."""
    if blocks.device.type == "cuda":
        return torch.empty(count, blocks.shape[1], dtype=blocks.dtype, device="cpu", pin_memory=True)
    return _zeros((count, blocks.shape[1]), blocks.dtype, blocks.device)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that take no host memory until they are written: fresh pages of the operating system."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=dtype).view(shape)


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """B one-token rows: `tokens` [B] are their indices in the step, `slots` [B, L] their padded contexts.

    Padding repeats the row's newest slot: a NaN in a foreign slot would survive a weight of 0. `visible`
    [B, 1, 1, L] is False on the padding; None when all contexts have the same length.
    """

    tokens: Tensor
    slots: Tensor
    visible: Tensor | None


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """N tokens at [begin, end) of the step; `slots` [L] is their context, `visible` [N, L] causal and windowed.

    All N tokens see the first `common` positions of the context.
    """

    begin: int
    end: int
    slots: Tensor
    visible: Tensor
    common: int


Groups = tuple[list[DecodeGroup], list[PrefillRow]]


class PagedAttention:
    """The attention of one step: for each layer, stores K/V of all rows; then every row attends to its own context."""

    def __init__(self, storage: SlotStorage, layout: StepLayout, layers: Mapping[int, int]) -> None:
        self._storage = storage
        self._layout = layout
        self._layers = layers
        self._groups: dict[int | None, Groups] = {}

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """Attend for one layer: [T, H, V]."""
        layer = self._layers[id(module)]
        keys, values = self._storage.keys[layer], self._storage.values[layer]
        reference.write_kv(keys, values, self._layout.write_slots, key.transpose(0, 1), value.transpose(0, 1))
        out = query.new_empty(query.shape[1], query.shape[0], value.shape[-1])
        groups = self._groups.get(options.window)
        if groups is None:
            groups = self._groups[options.window] = attention_groups(self._layout, options.window)
        decodes, prefills = groups
        for group in decodes:
            out[group.tokens] = _decode(query, keys, values, group, options)
        for row in prefills:
            out[row.begin : row.end] = _prefill(query, keys, values, row, options)
        return out


def attention_groups(layout: StepLayout, window: int | None) -> Groups:
    """The step's rows, grouped for layers whose queries see at most the last `window` positions, itself included."""
    device = layout.input_ids.device
    buckets: dict[int, list[tuple[int, np.ndarray]]] = {}
    prefills: list[PrefillRow] = []
    begin = 0
    for row in layout.rows:
        num_tokens, slots = row.end - row.start, slots_of(row, 0, layout.block_size)
        if num_tokens == 1:
            context = slots if window is None else slots[-window:]
            buckets.setdefault(_bucket(len(context)), []).append((begin, context))
        else:
            prefills.append(_prefill_row(row, slots, begin, window, device))
        begin += num_tokens
    return [_decode_group(members, device) for members in buckets.values()], prefills


def _bucket(length: int) -> int:
    """Contexts whose padded work differs by at most a quarter share a bucket (quarter steps of a power of two)."""
    power = max(64, 1 << (length - 1).bit_length())
    step = power // 8
    return -(-length // step) * step


def _decode_group(members: Sequence[tuple[int, np.ndarray]], device: torch.device) -> DecodeGroup:
    lengths = np.array([len(slots) for _, slots in members])
    longest = int(lengths.max())
    padded = np.empty((len(members), longest), dtype=np.int64)
    for i, (_, slots) in enumerate(members):
        padded[i, : len(slots)] = slots
        padded[i, len(slots) :] = slots[-1]
    visible = None
    if int(lengths.min()) < longest:
        visible = on_device(np.arange(longest) < lengths[:, None], device)[:, None, None, :]
    tokens = on_device(np.array([token for token, _ in members], dtype=np.int64), device)
    return DecodeGroup(tokens, on_device(padded, device), visible)


def _prefill_row(row: Row, slots: np.ndarray, begin: int, window: int | None, device: torch.device) -> PrefillRow:
    context_begin = 0 if window is None else max(0, row.start - window + 1)
    query = torch.arange(row.start, row.end, dtype=torch.int64, device=device)[:, None]
    context = torch.arange(context_begin, row.end, dtype=torch.int64, device=device)[None, :]
    visible = context <= query
    if window is not None:
        visible &= context > query - window
    common = row.start if window is None or row.end <= window else 0
    return PrefillRow(begin, begin + row.num_tokens, on_device(slots[context_begin:], device), visible, common)


def _decode(query_H_T_D: Tensor, keys: Tensor, values: Tensor, group: DecodeGroup, options: AttentionOptions) -> Tensor:
    """One query per row, its heads grouped by the key/value head they share: [B, H, V]."""
    heads, kv_heads, rows = query_H_T_D.shape[0], keys.shape[1], group.tokens.shape[0]
    query = query_H_T_D.index_select(1, group.tokens).transpose(0, 1).reshape(rows, kv_heads, heads // kv_heads, -1)
    out = reference.grouped_attention(
        query,
        reference.gather_slots(keys, group.slots).transpose(1, 2),
        reference.gather_slots(values, group.slots).transpose(1, 2),
        group.visible,
        scaling=options.scaling,
        softcap=options.softcap,
        sinks_K_Q=None if options.sinks is None else options.sinks.view(kv_heads, -1),
    )
    return out.reshape(rows, heads, -1)


def _prefill(query_H_T_D: Tensor, keys: Tensor, values: Tensor, row: PrefillRow, options: AttentionOptions) -> Tensor:
    """N queries of one row: [N, H, V]. Heads of a group and their positions form one run of queries."""
    heads, kv_heads, n = query_H_T_D.shape[0], keys.shape[1], row.end - row.begin
    group = heads // kv_heads
    query = query_H_T_D[:, row.begin : row.end].reshape(1, kv_heads, group * n, -1)
    key, value = (reference.gather_slots(cache, row.slots) for cache in (keys, values))
    broken = reference.mute_broken(key[row.common :], value[row.common :])
    sinks = None if options.sinks is None else options.sinks.view(kv_heads, group).repeat_interleave(n, dim=1)
    out = reference.grouped_attention(
        query,
        key.transpose(0, 1).unsqueeze(0),
        value.transpose(0, 1).unsqueeze(0),
        row.visible.repeat(group, 1),
        scaling=options.scaling,
        softcap=options.softcap,
        sinks_K_Q=sinks,
    )
    poison = torch.where(row.visible[:, row.common :], broken, 0).sum(-1)  # NaN where a query sees a broken token
    return out.view(heads, n, -1).transpose(0, 1) + poison[:, None, None]
