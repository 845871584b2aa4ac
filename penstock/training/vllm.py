"""`VLLMBackend`: vLLM behind `InferenceModule`; `best_backend`: which backend "auto" means.

Called by `InferenceModule` and by `penstock.backends`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection
from typing import Any

from penstock.config import ALIASES, EngineConfig
from penstock.demo import MODEL_DIR
from penstock.training.backend import EngineBackend

# What both engines take under the same name; all other settings of `EngineConfig` ask for the native one.
_SHARED = frozenset({"dtype", "gpu_memory_utilization", "revision", "seed", "trust_remote_code"})


class VLLMBackend(EngineBackend):
    """Generates and scores with vLLM: `model_name` is a name, a folder, a running `AsyncLLM`, or None for the demo.

    `model_kwargs` are fields of vLLM's `AsyncEngineArgs`, such as `tensor_parallel_size` and `max_model_len`. Logits
    need `logprobs_mode="raw_logits"`; log probabilities are then computed by a score after generation. There is no
    module of torch and there are no gradients; new weights come from a folder, by `engine.update_weights`. Raises
    `ConfigurationError`, which is an `ImportError` too where vLLM is not installed.
    """

    def __init__(self, model_name: object = None, **model_kwargs: Any) -> None:
        # Imported here: `backends` is written over this package, and most programs have no vLLM.
        from penstock.backends.vllm_engine import VLLMEngine

        super().__init__(VLLMEngine(str(MODEL_DIR) if model_name is None else model_name, **model_kwargs))
        self.engine.start()


def best_backend(model: object, options: Collection[str]) -> str:
    """The name of the backend for a model and settings of these names.

    vLLM for a model by name or folder, if it is installed and there is a GPU, unless a setting asks for this package's
    own engine; otherwise that one.
    """
    native = {"device", "tokenizer", "replicas", *EngineConfig.model_fields, *ALIASES} - _SHARED
    if not isinstance(model, str | os.PathLike) or native & set(options) or importlib.util.find_spec("vllm") is None:
        return "huggingface"
    from penstock.training.tensors import has_gpu

    return "vllm" if has_gpu() else "huggingface"
