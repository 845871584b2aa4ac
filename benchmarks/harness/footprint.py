"""The bytes and operations that a model needs at least, from a folder's config and safetensors headers.

Pure arithmetic on shapes; reads no weight. For dense models whose embedding is looked up, not multiplied.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

SCALE_BYTES = 4  # of each output row of an int8 matrix


@dataclass(frozen=True, slots=True)
class Footprint:
    """Numbers in all matrices that every token goes through (`layers`), in the one that makes logits (`head`), and
    rows of both; `attention` is layers x heads x head size."""

    layers: int
    head: int
    rows: int
    attention: int

    def read_bytes(self, precision: str) -> int:
        """Bytes of weights that a decode step of one row reads, in bf16 or int8."""
        if precision == "int8":
            return self.layers + self.head + SCALE_BYTES * self.rows
        return 2 * (self.layers + self.head)

    def prefill_operations(self, tokens: int) -> int:
        """Operations of a prompt of `tokens` tokens with logits for the last one; a multiply-add counts as two."""
        causal = tokens * (tokens + 1) // 2
        return 2 * tokens * self.layers + 2 * self.head + 4 * causal * self.attention


def footprint(folder: Path) -> Footprint | None:
    """The footprint of a model folder; None if it has no safetensors files or is a mixture of experts."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        shapes |= tensor_shapes(file)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not shapes or any("expert" in name for name in shapes):
        return None
    return count(shapes, config.get("text_config", config))


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Name to shape, from a safetensors file's header: its length in eight bytes, then JSON."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header: dict[str, Any] = json.loads(stream.read(length))
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def count(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> Footprint:
    """The footprint by tensor shapes. Without a separate head the embedding is the head too."""
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    embedding = {name for name in matrices if "embed" in name or name.endswith("wte.weight")}
    heads = {name for name in matrices if "lm_head" in name} or embedding
    layers = [shape for name, shape in matrices.items() if name not in embedding | heads]
    head = [matrices[name] for name in heads]
    queries = config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // queries
    return Footprint(
        layers=sum(map(prod, layers)),
        head=sum(map(prod, head)),
        rows=sum(shape[0] for shape in [*layers, *head]),
        attention=config["num_hidden_layers"] * queries * head_size,
    )
