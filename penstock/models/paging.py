"""How attention over pages is computed: `PlainPaging` in plain torch on any device, `PanelPaging` with CPU kernels.

A `Paging` makes the storage of K/V and the attention of each step over it. Chosen once per load; used by the
executor and by the trial passes of `checks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch

from penstock.kernels.native import Kernels, survey_logits
from penstock.models.attention import Paged, PagedAttention
from penstock.models.layout import StepLayout
from penstock.models.memory import host_free_bytes
from penstock.models.panels import PanelAttention, PanelStorage
from penstock.models.storage import KVStorage, LayerShape
from penstock.models.vocabulary import Survey


class Storage(Protocol):
    """K/V of all layers, in blocks."""

    block_size: int

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks (source, destination) in every layer."""
        ...

    def swap(self, out: Sequence[tuple[int, int]], back: Sequence[tuple[int, int]]) -> None:
        """Move whole blocks out to the host, as (block, place), and then in, as (place, block)."""
        ...

    def give_back(self, blocks: Sequence[int], places: Sequence[int]) -> None:
        """Let the system have the memory of blocks and places that hold nothing."""
        ...


class Paging(Protocol):
    """Makes K/V storages, and the attention of a step over one."""

    def storage(
        self, shapes: Sequence[LayerShape], num_blocks: int, block_size: int, num_host_blocks: int = 0
    ) -> Storage:
        """Room for K/V, and for a tier on the host. Raises `OutOfMemory`."""
        ...

    def attention(self, storage: Any, layout: StepLayout, layers: dict[int, int]) -> Paged:
        """What answers for the attention of one step."""
        ...

    def bytes_per_token(self, shapes: Sequence[LayerShape]) -> int:
        """Bytes of K and V of one token, all layers together."""
        ...

    survey: Survey | None  # how the sampler looks at logits

    def close(self) -> None:
        """Let go of threads and memory."""
        ...


class PlainPaging:
    """The reference: tensors of slots, on any device."""

    survey: Survey | None = None

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def storage(
        self, shapes: Sequence[LayerShape], num_blocks: int, block_size: int, num_host_blocks: int = 0
    ) -> Storage:
        """Room for K/V, and for a tier on the host. Raises `OutOfMemory`."""
        return KVStorage(shapes, num_blocks, block_size, self._device, num_host_blocks)

    def attention(self, storage: KVStorage, layout: StepLayout, layers: dict[int, int]) -> Paged:
        """What answers for the attention of one step."""
        return PagedAttention(storage, layout, layers)

    def bytes_per_token(self, shapes: Sequence[LayerShape]) -> int:
        """Bytes of K and V of one token, all layers together."""
        return sum(shape.bytes_per_token for shape in shapes)

    def close(self) -> None:
        """Nothing to let go of."""


class PanelPaging:
    """The compiled kernels, on the CPU: `int8` stores keys and values in a byte each, `touch` takes all memory now."""

    def __init__(self, kernels: Kernels, int8: bool, *, touch: bool = False) -> None:
        self._kernels = kernels
        self._touch = touch
        self._int8 = int8
        self.survey: Survey | None = partial(survey_logits, kernels)

    def storage(
        self, shapes: Sequence[LayerShape], num_blocks: int, block_size: int, num_host_blocks: int = 0
    ) -> Storage:
        """Room for K/V, and for a tier behind it. Raises `OutOfMemory`."""
        made = PanelStorage(self._kernels, shapes, num_blocks, block_size, self._int8, num_host_blocks)
        if self._touch:
            made.touch(host_free_bytes)
        return made

    def attention(self, storage: PanelStorage, layout: StepLayout, layers: dict[int, int]) -> Paged:
        """What answers for the attention of one step."""
        return PanelAttention(storage, layout, layers)

    def bytes_per_token(self, shapes: Sequence[LayerShape]) -> int:
        """Bytes of K and V of one token, all layers together; int8 has two float32 scales a head."""
        if self._int8:
            return sum(shape.heads * (shape.key_dim + shape.value_dim + 8) for shape in shapes)
        return sum(shape.bytes_per_token for shape in shapes)

    def close(self) -> None:
        """End the threads."""
        self._kernels.close()
