"""The structures that the compiled kernels are called with, field by field as in `cpu/*.c`.

Owns nothing. `native` compares their sizes with those in C when it loads the library; `products`, `low_rank`, `paged`,
`program` and `logits` fill them in.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

Ptr, Long, Int, Float = ctypes.c_void_p, ctypes.c_long, ctypes.c_int32, ctypes.c_float


class NormStruct(ctypes.Structure):
    """`norm` in norms.c."""

    _fields_ = (
        ("n", Long),
        *((name, Int) for name in ("kind", "dtype")),
        *((name, Float) for name in ("eps", "scale")),
        *((name, Ptr) for name in ("weight", "bias")),
    )


class LinearStruct(ctypes.Structure):
    """`linear` in linear.c."""

    _fields_ = (
        *((name, Long) for name in ("n", "k")),
        *((name, Int) for name in ("format", "mode", "act", "in_type", "out_type", "norm_kind")),
        *((name, Float) for name in ("scale", "eps")),
        *((name, Ptr) for name in ("weights", "bias", "scales", "lows", "norm_weight", "norm_bias", "adapters")),
        *((name, Long) for name in ("max_rank", "num_slots")),
    )


class LowRankStruct(ctypes.Structure):
    """`low_rank` in low_rank.c."""

    _fields_ = (
        ("rank", Long),
        *((name, Int) for name in ("type", "unused")),
        *((name, Ptr) for name in ("a", "b", "ranges")),
    )


class LowRankPartStruct(ctypes.Structure):
    """`low_rank_part` in low_rank_packing.c."""

    _fields_ = (
        *((name, Ptr) for name in ("a", "b")),
        *((name, Long) for name in ("a_stride", "b_stride", "rank", "first", "size")),
        *((name, Int) for name in ("a_type", "b_type")),
        ("scaling", Float),
        ("unused", Int),
    )


class LowRankLayerStruct(ctypes.Structure):
    """`low_rank_layer` in low_rank_packing.c."""

    _fields_ = (
        *((name, Ptr) for name in ("layer", "parts", "target")),
        *((name, Long) for name in ("count", "broken")),
    )


class PackingStruct(ctypes.Structure):
    """`packing` in packing.c."""

    _fields_ = (
        ("rows", Ptr),
        *((name, Long) for name in ("n", "k")),
        *((name, Int) for name in ("type", "format")),
        *((name, Ptr) for name in ("weights", "scales", "lows", "directions", "feedback")),
    )


class CacheStruct(ctypes.Structure):
    """`kv_cache` in kv_cache.c."""

    _fields_ = (
        ("base", Ptr),
        *((name, Long) for name in ("heads", "key_dim", "value_dim")),
        *((name, Int) for name in ("format", "compute")),
    )


class MetadataStruct(ctypes.Structure):
    """`attention_metadata` in rotary.c."""

    _fields_ = (
        *((name, Long) for name in ("tokens", "tasks", "by_panel")),
        *((name, Ptr) for name in ("slots", "first_token", "first_position", "table_begin", "tables")),
        *((name, Ptr) for name in ("task_row", "task_rows", "task_begin", "task_end", "task_shared")),
    )


class RotaryStruct(ctypes.Structure):
    """`rotary` in rotary.c."""

    _fields_ = (
        *((name, Int) for name in ("norm", "type")),
        ("width", Long),
        ("eps", Float),
        *((name, Ptr) for name in ("query_norm", "key_norm", "cos", "sin")),
    )


class AttentionStruct(ctypes.Structure):
    """`attention` in rotary.c."""

    _fields_ = (
        *((name, Ptr) for name in ("cache", "metadata", "rotary", "query", "key", "value", "out")),
        *((name, Long) for name in ("query_token", "query_head", "key_token", "key_head", "value_token", "value_head")),
        ("heads", Long),
        ("type", Int),
        *((name, Float) for name in ("scaling", "softcap")),
        ("window", Long),
        ("sinks", Ptr),
        ("layer", Long),
    )


class OperationStruct(ctypes.Structure):
    """`operation` in program.c; its `in` and `out` are `source` and `target` here."""

    _fields_ = (*((name, Int) for name in ("kind", "source", "target", "unused")), ("parameters", Ptr))


class ProgramStruct(ctypes.Structure):
    """`program` in program.c."""

    _fields_ = (
        ("operations", Ptr),
        *((name, Long) for name in ("count", "rows")),
        *((name, Ptr) for name in ("registers", "caches", "metadata", "cos", "sin")),
        ("width", Long),
        ("type", Int),
        ("slots", Ptr),
    )


class LogitSummaryStruct(ctypes.Structure):
    """`logit_summary` in logits.c."""

    _fields_ = (
        ("logits", Ptr),
        *((name, Long) for name in ("rows", "width", "block")),
        *((name, Ptr) for name in ("block_maxima", "maxima", "totals", "tokens")),
    )


class AllowedArgmaxStruct(ctypes.Structure):
    """`allowed_argmax` in logits.c."""

    _fields_ = (
        *((name, Ptr) for name in ("logits", "block_maxima", "indices", "masks")),
        *((name, Long) for name in ("rows", "width", "block", "words")),
        *((name, Ptr) for name in ("maxima", "tokens")),
    )


class TokenDrawStruct(ctypes.Structure):
    """`token_draw` in logits.c."""

    _fields_ = (
        *((name, Ptr) for name in ("logits", "indices", "masks", "peaks", "rates", "floors", "uniforms")),
        *((name, Long) for name in ("rows", "width", "block", "words")),
        *((name, Ptr) for name in ("totals", "tokens", "weights")),
    )


class MaskedCopyStruct(ctypes.Structure):
    """`masked_copy` in logits.c."""

    _fields_ = (
        *((name, Ptr) for name in ("logits", "indices", "masks")),
        *((name, Long) for name in ("rows", "width", "block", "words")),
        *((name, Ptr) for name in ("copy", "block_maxima")),
    )


class GreatestLogitsStruct(ctypes.Structure):
    """`greatest_logits` in logits.c."""

    _fields_ = (
        *((name, Ptr) for name in ("logits", "block_maxima", "indices", "masks")),
        *((name, Long) for name in ("rows", "width", "block", "words", "count")),
        *((name, Ptr) for name in ("greatest", "tokens")),
    )


# By the name of the type in C.
STRUCTURES: Mapping[str, type[ctypes.Structure]] = {
    "norm": NormStruct,
    "linear": LinearStruct,
    "low_rank": LowRankStruct,
    "low_rank_part": LowRankPartStruct,
    "low_rank_layer": LowRankLayerStruct,
    "packing": PackingStruct,
    "kv_cache": CacheStruct,
    "attention_metadata": MetadataStruct,
    "rotary": RotaryStruct,
    "attention": AttentionStruct,
    "operation": OperationStruct,
    "program": ProgramStruct,
    "logit_summary": LogitSummaryStruct,
    "allowed_argmax": AllowedArgmaxStruct,
    "token_draw": TokenDrawStruct,
    "masked_copy": MaskedCopyStruct,
    "greatest_logits": GreatestLogitsStruct,
}
