"""Attention over the paged cache, entered through transformers' `AttentionInterface`.

Registers one function, `penstock`; the step's attention reaches it as the keyword argument `paged` of `model(...)`.
Names what an implementation provides (`AttentionBackend`, `KVStorage`, `StepAttention`); `torch_attention` and
`panels` implement it. Owns no weights and no memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from penstock.kernels.logits import LogitKernels
from penstock.kernels.paged import AttentionOptions
from penstock.models.layout import StepLayout
from penstock.models.storage import LayerShape

IMPLEMENTATION = "penstock"


class StepAttention(Protocol):
    """The attention of one forward pass. Query is [H, T, D], key [K, T, D], value [K, T, V]."""

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """Attend for one layer: [T, H, V]."""
        ...


class KVStorage(Protocol):
    """K/V of all layers in blocks, on the device and in a host tier, whose blocks are called places.

    Knows nothing of sequences, reference counts or prefixes; that is `cache`.
    """

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        ...

    def attention(self, layout: StepLayout, layers: Mapping[int, int]) -> StepAttention:
        """The attention of one step over this storage; `layers` has the layer of each module, by the module's id."""
        ...

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (source, destination) in every layer."""
        ...

    def swap(self, out: Sequence[tuple[int, int]], back: Sequence[tuple[int, int]]) -> None:
        """Move blocks to the host tier, as (block, place), then others in, as (place, block)."""
        ...

    def release(self, blocks: Sequence[int], places: Sequence[int]) -> None:
        """Give the memory of blocks that hold nothing back to the system, where that is possible in pieces."""
        ...


class AttentionBackend(Protocol):
    """Makes K/V storages; chosen once per load. Used by the executor and by the trial passes of `checks`."""

    @property
    def logit_kernels(self) -> LogitKernels | None:
        """The sampler's kernels; None: it computes in plain torch."""
        ...

    def storage(
        self, shapes: Sequence[LayerShape], num_blocks: int, block_size: int, num_host_blocks: int = 0
    ) -> KVStorage:
        """Allocate K/V blocks, and those of the host tier. Raises `OutOfMemory`."""
        ...

    def bytes_per_token(self, shapes: Sequence[LayerShape]) -> int:
        """Bytes of K and V of one token, all layers together."""
        ...

    def close(self) -> None:
        """End threads and free memory."""
        ...


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    paged: StepAttention,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """The function transformers' attention modules call; tensors are [1, heads, T, head size]."""
    options = AttentionOptions(scaling or query.shape[-1] ** -0.5, sliding_window, softcap, s_aux)
    return paged.attend(module, query[0], key[0], value[0], options).unsqueeze(0), None


AttentionInterface.register(IMPLEMENTATION, attention_forward)


class ShapeProbe:
    """Records, in call order, which modules attend, how, and what they would store; attends plainly and causally."""

    def __init__(self) -> None:
        self.layers: dict[int, int] = {}
        self.shapes: list[LayerShape] = []
        self.options: list[AttentionOptions] = []

    @property
    def num_windows(self) -> int:
        """Number of layers with a sliding window."""
        return sum(options.window is not None for options in self.options)

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """Attend without a cache: [T, H, V]."""
        self.layers[id(module)] = len(self.shapes)
        self.options.append(options)
        self.shapes.append(LayerShape(key.shape[0], key.shape[-1], value.shape[-1], key.dtype))
        out = F.scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=True, scale=options.scaling, enable_gqa=True
        )
        return out[0].transpose(0, 1)
