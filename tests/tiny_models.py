"""Small random models of real architectures, float32, seed 0: what the equivalence tests run on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

VOCAB = 160
COMMON = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
LLAMA = {
    **COMMON,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
HEADS8 = {**LLAMA, "head_dim": 8}
SLIDING = {"sliding_window": 8}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": HEADS8,
    "mistral": {**LLAMA, **SLIDING},
    "gemma2": {**HEADS8, **SLIDING, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        **HEADS8,
        **SLIDING,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt2": {**COMMON, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "opt": {
        **COMMON,
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "word_embed_proj_dim": 32,
    },
    "phi3": LLAMA,
    "gpt_neox": {
        **COMMON,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "rotary_pct": 0.5,
    },
    "granite": {**LLAMA, "residual_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 2.0},
    "smollm3": {**LLAMA, "no_rope_layers": [1, 0]},
    "olmo2": LLAMA,
    "mixtral": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {
        **HEADS8,
        **SLIDING,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


# How many of the two layers a rewrite takes over; the rest runs as transformers wrote it.
FUSED = dict.fromkeys(ARCHITECTURES, 2) | {"gpt_neox": 0, "gpt_oss": 0}


def build(name: str, **changes: Any) -> nn.Module:
    """A model of the named architecture whose greedy output is decided by wide margins, not by rounding."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**ARCHITECTURES[name], **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return model
