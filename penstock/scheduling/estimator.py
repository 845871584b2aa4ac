"""`MemoryEstimator`: how many bytes a batch takes: K/V cache, activations and, if they are known, weights.

Owns the arithmetic from a model's sizes to bytes, for models with attention in every layer. Queries no device and loads
nothing. Called by programs that size their batches, by `DynamicBatcher` and by `benchmarks/memory.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self, TypedDict, Unpack

from penstock.errors import ConfigurationError

ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "int8": 1}
SCALE_BYTES = 4  # of an int8 key or value, per token and head
LOGIT_BYTES = 4  # logits are float32
# Model types whose MLP is two matrices instead of three.
UNGATED = frozenset(
    {"codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "opt", "phi", "starcoder2"}
)


class SizeOptions(TypedDict, total=False):
    """Sizes with defaults. None means as in Llama: as many K/V heads as heads, heads of model_hidden_size / num_heads,
    an MLP of 8/3 of the hidden size. `vocab_size` is 32,000 if it is left out."""

    num_kv_heads: int | None
    head_dim: int | None
    intermediate_size: int | None
    vocab_size: int


class EstimatorOptions(SizeOptions, total=False):
    """What `MemoryEstimator.from_config` passes on; sizes replace those of the config."""

    cache_dtype: object
    max_step_tokens: int


class MemoryEstimator:
    """A model of `num_layers` layers, whose `num_heads` query heads share `num_kv_heads` heads of keys and values.

    `sizes` are num_kv_heads, head_dim, intermediate_size and vocab_size; see `SizeOptions`. `dtype` is that of weights,
    activations and cache (a name or a torch dtype), `cache_dtype` the cache's own. A step computes at most
    `max_step_tokens` tokens, as the engine's does. `weight_bytes` count towards every limit, together with the batch;
    with 0, the default, limits are for batches alone. Raises `ConfigurationError`.
    """

    def __init__(
        self,
        model_hidden_size: int = 4096,
        num_layers: int = 32,
        num_heads: int = 32,
        *,
        dtype: object = "float16",
        cache_dtype: object = None,
        weight_bytes: int = 0,
        max_step_tokens: int = 512,
        **sizes: Unpack[SizeOptions],
    ) -> None:
        for name in sizes.keys() - SizeOptions.__annotations__:
            raise TypeError(f"MemoryEstimator() got an unexpected keyword argument {name!r}")
        head_dim, mlp_size = sizes.get("head_dim"), sizes.get("intermediate_size")
        self.hidden_size = _positive("model_hidden_size", model_hidden_size)
        self.num_layers = _positive("num_layers", num_layers)
        self.num_heads = _positive("num_heads", num_heads)
        self.num_kv_heads = _positive("num_kv_heads", sizes.get("num_kv_heads") or num_heads)
        self.head_dim = _positive("head_dim", head_dim or model_hidden_size // num_heads)
        self.intermediate_size = _positive("intermediate_size", mlp_size or -(-8 * model_hidden_size // 3))
        self.vocab_size = _positive("vocab_size", sizes.get("vocab_size", 32000))
        self.max_step_tokens = _positive("max_step_tokens", max_step_tokens)
        self.weight_bytes = weight_bytes
        self.dtype = dtype_name(dtype)
        self.cache_dtype = dtype_name(cache_dtype) if cache_dtype is not None else None

    @classmethod
    def from_config(
        cls,
        config: object,
        *,
        dtype: object = None,
        weight_bytes: int | None = None,
        **options: Unpack[EstimatorOptions],
    ) -> Self:
        """Sizes from a transformers config, weights included; `dtype` defaults to the config's own, or float16.

        `weight_bytes` defaults to the bytes of all parameters at these sizes. Raises `ConfigurationError` for a config
        without sizes.
        """
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        dtype = dtype_name(dtype or getattr(config, "dtype", None) or "float16")
        num_heads = _size(config, "num_attention_heads", "n_head")
        sizes: EstimatorOptions = {
            "num_kv_heads": _kv_heads(config, num_heads),
            "head_dim": getattr(config, "head_dim", None),
            "intermediate_size": _mlp_size(config),
            "vocab_size": _size(config, "vocab_size"),
            **options,
        }
        hidden_size = _size(config, "hidden_size", "n_embd")
        estimator = cls(hidden_size, _size(config, "num_hidden_layers", "n_layer"), num_heads, dtype=dtype, **sizes)
        estimator.weight_bytes = estimator._count_weights(config) if weight_bytes is None else weight_bytes
        return estimator

    def cache_bytes(self, batch_size: int, sequence_length: int, dtype: object = None) -> int:
        """Bytes of keys and values of `batch_size` sequences of `sequence_length` tokens."""
        name = dtype_name(dtype) if dtype is not None else self.cache_dtype or self.dtype
        scale_bytes = SCALE_BYTES if name == "int8" else 0
        per_head = 2 * (self.head_dim * ITEM_BYTES[name] + scale_bytes)
        return batch_size * sequence_length * self.num_layers * self.num_kv_heads * per_head

    def activation_bytes(self, batch_size: int, sequence_length: int, dtype: object = None) -> int:
        """Bytes of one step's tensors at their widest: hidden states, one layer's projections, logits of every row.

        Each layer frees its tensors, and attention keeps no matrix of scores.
        """
        item_bytes = ITEM_BYTES[dtype_name(dtype) if dtype is not None else self.dtype]
        tokens = min(batch_size * sequence_length, max(batch_size, self.max_step_tokens))
        attention = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        width = 2 * self.hidden_size + max(attention, 2 * self.intermediate_size)
        return tokens * width * item_bytes + batch_size * self.vocab_size * LOGIT_BYTES

    def estimate_batch_memory(self, batch_size: int, sequence_length: int, dtype: object = None) -> int:
        """Bytes that a batch adds: its cache and its step's activations. Padding counts: all have the same length."""
        cache = self.cache_bytes(batch_size, sequence_length, dtype or self.cache_dtype)
        return cache + self.activation_bytes(batch_size, sequence_length, dtype)

    def estimate_total_memory(self, batch_size: int, sequence_length: int, dtype: object = None) -> int:
        """Bytes of weights and batch together."""
        return self.weight_bytes + self.estimate_batch_memory(batch_size, sequence_length, dtype)

    def find_optimal_batch_size(self, sequence_lengths: Sequence[int], memory_limit: int, max_batch_size: int) -> int:
        """How many of these sequences fit into `memory_limit` bytes together, each padded to the longest.

        0 if not even the longest fits alone, or there are none.
        """
        longest = max(sequence_lengths, default=0)
        low, high = 0, min(max_batch_size, len(sequence_lengths))
        while low < high:
            middle = (low + high + 1) // 2
            if self.estimate_total_memory(middle, longest) <= memory_limit:
                low = middle
            else:
                high = middle - 1
        return low

    def _count_weights(self, config: object) -> int:
        """Bytes of all parameters, by the shapes that the model families have in common."""
        hidden, heads = self.hidden_size, self.num_heads * self.head_dim
        attention = hidden * (2 * heads + 2 * self.num_kv_heads * self.head_dim)
        matrices = 2 if getattr(config, "model_type", "") in UNGATED else 3
        experts = _experts(config)
        mlp = max(1, experts) * matrices * hidden * self.intermediate_size + experts * hidden
        embeddings = self.vocab_size * hidden * (1 if getattr(config, "tie_word_embeddings", False) else 2)
        positions = getattr(config, "max_position_embeddings", 0) if _learns_positions(config) else 0
        num_parameters = self.num_layers * (attention + mlp + 2 * hidden) + hidden + embeddings + positions * hidden
        return int(num_parameters) * ITEM_BYTES[self.dtype]


def dtype_name(dtype: object) -> str:
    """ "float16" of "float16", "torch.float16" or `torch.float16`. Raises `ConfigurationError`."""
    name = str(dtype).removeprefix("torch.")
    if name not in ITEM_BYTES:
        raise ConfigurationError(f"dtype {name!r} is unknown: choose from {', '.join(ITEM_BYTES)}")
    return name


def _positive(name: str, value: int) -> int:
    if not hasattr(value, "__index__") or value < 1:
        raise ConfigurationError(f"{name} must be a positive integer, got {value!r}")
    return int(value)


def _size(config: object, *names: str) -> int:
    """The first of these attributes that the config has."""
    for name in names:
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    raise ConfigurationError(f"{type(config).__name__} has no {' or '.join(names)}: pass the sizes to MemoryEstimator")


def _kv_heads(config: object, num_heads: int) -> int:
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    return getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or num_heads


def _mlp_size(config: object) -> int:
    """Inner size of the MLP, or of one expert."""
    names = ("moe_intermediate_size",) if _experts(config) else ()
    for name in (*names, "intermediate_size", "ffn_dim", "n_inner"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    return 4 * _size(config, "hidden_size", "n_embd")


def _experts(config: object) -> int:
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    return 0


def _learns_positions(config: object) -> bool:
    return getattr(config, "model_type", "") in ("gpt2", "gpt_bigcode", "gpt_neo", "opt")
