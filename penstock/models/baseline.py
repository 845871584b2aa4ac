"""`transformers.generate` as the baseline of a benchmark, and modules for it: loaded, or random of a known shape.

Owns the module, which the engine borrows for the comparison: both run the same weights. Never tunes either side. Loads
torch and transformers only when used, so that the command line can list the shapes at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from penstock.config import EngineConfig
from penstock.errors import ConfigurationError, ExecutionError
from penstock.models.hub import check_available

# By name: the transformers model type, and the fields of its config. Speed does not depend on the weights' values.
SHAPES: Mapping[str, tuple[str, Mapping[str, int]]] = {
    "qwen3-0.6b": (
        "qwen3",
        {
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
        },
    ),
    "llama-160m": (
        "llama",
        {
            "vocab_size": 32000,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 2048,
        },
    ),
    "llama-15m": (
        "llama",
        {
            "vocab_size": 8000,
            "hidden_size": 288,
            "intermediate_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        },
    ),
}
_SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def load_module(source: str | Path, config: EngineConfig) -> Any:
    """The model at a hub id or folder, on the device and in the dtype of `config`, with sdpa attention.

    Raises `ConfigurationError`, `OutOfMemory`.
    """
    check_available(str(source), config)  # before the import of torch, which takes seconds
    from penstock.models.loading import load_bare

    return load_bare(str(source), config)


def random_module(shape: str, config: EngineConfig) -> Any:
    """A model with random weights, always the same; bfloat16 where `config` names no dtype.

    Raises `ConfigurationError`.
    """
    if shape not in SHAPES:
        raise ConfigurationError(f"there is no shape {shape!r}: choose from {', '.join(SHAPES)}")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from penstock.models.loading import resolve_device, resolve_dtype

    model_type, sizes = SHAPES[shape]
    dtype = torch.bfloat16 if config.dtype == "auto" else resolve_dtype(config.dtype)
    device = resolve_device(config.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_config = AutoConfig.for_model(model_type, **sizes, **_SPECIAL)
        module = AutoModelForCausalLM.from_config(model_config, dtype=dtype, attn_implementation="sdpa")
    return module.to(device).eval()


class Baseline:
    """A transformers module and its own `generate`: greedy, a static batch, padded on the left."""

    def __init__(self, module: Any) -> None:
        import torch

        self.module = module
        self.device = str(module.device)
        self.dtype = str(module.dtype).removeprefix("torch.")
        self.threads = torch.get_num_threads()
        text = module.config.get_text_config()
        self.vocab_size = int(text.vocab_size)
        self.max_length = int(getattr(text, "max_position_embeddings", None) or 1 << 31)

    def generate(self, work: Sequence[tuple[list[int], int]]) -> list[list[int]]:
        """New token ids for each (prompt ids, number of new tokens); EOS ends nothing.

        A static batch runs until its longest output is complete; shorter ones are cut from it. Raises
        `ExecutionError` when a row comes out short.
        """
        import torch

        width, num_tokens = max(len(prompt) for prompt, _ in work), max(count for _, count in work)
        padded = [[0] * (width - len(p)) + p for p, _ in work], [[0] * (width - len(p)) + [1] * len(p) for p, _ in work]
        ids, mask = (torch.tensor(rows, dtype=torch.int64, device=self.module.device) for rows in padded)
        with torch.inference_mode():
            out = self.module.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                repetition_penalty=1.0,
                eos_token_id=None,
                pad_token_id=0,
            )
        rows = out[:, width:].tolist()
        if len(rows[0]) != num_tokens:
            raise ExecutionError(f"transformers made {len(rows[0])} tokens where {num_tokens} were asked for")
        return [row[:count] for row, (_, count) in zip(rows, work, strict=True)]
