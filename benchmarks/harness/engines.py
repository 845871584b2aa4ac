"""This engine with room for given workloads, in the benchmark's own process. Called by benchmarks that run it there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peers.workloads import Limits, vocabulary
from penstock import InferenceEngine

MIN_ROWS, MIN_LENGTH = 32, 2048


def room(limits: Limits) -> dict[str, Any]:
    """Settings with which no request waits for rows or cache; never below the engine's defaults."""
    return {
        "max_batch_size": max(MIN_ROWS, limits.requests),
        "max_sequence_length": max(MIN_LENGTH, limits.longest),
        "kv_cache_tokens": limits.tokens,
    }


def engine_for(source: str, settings: dict[str, Any], limits: Limits) -> InferenceEngine:
    """An engine on token ids; `settings` override what the workloads need."""
    quiet = {"skip_tokenizer_init": True, "log_level": "ERROR"}
    return InferenceEngine(source, **{**room(limits), **quiet, **settings})


def vocabulary_of(source: str) -> int:
    """The size of the vocabulary of a model in a folder or on the hub."""
    if Path(source).is_dir():
        return vocabulary(source)
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(source).get_text_config().vocab_size)
