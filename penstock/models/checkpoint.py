"""What a model source holds: its config and class (`locate`), its weight files (`fetch`) and their tensors.

Understands folders and hub snapshots whose architecture transformers itself defines; for anything else `locate`
returns None, and the model is left to `from_pretrained`. Reads and downloads files; makes no module. Called by
`reading` and `building`.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from penstock.config import EngineConfig
from penstock.errors import ConfigurationError
from penstock.models.completeness import listed
from penstock.models.hub import unreachable

_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_FORMATS = {"auto": (*_SAFETENSORS, *_PICKLED), "safetensors": _SAFETENSORS, "pt": _PICKLED}
# Parts of a config that only `from_pretrained` acts upon.
_SPECIAL = ("quantization_config", "fusion_config", "transformers_weights")
# Loading methods that a model class may override; one that does is left to `from_pretrained`.
_LOADING = ("from_pretrained", "get_init_context", "tie_weights", "init_weights", "initialize_weights")
# What reads the process's default dtype in a way that a thread's pinned default does not reach.
_UNPINNED = re.compile(r"get_default_dtype|torch\.(Float)?Tensor\(")
# Keywords of transformers' functions that say where on the hub, and in the cache, files are found.
HubOptions = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a model is. With `hub`, transformers finds further files of the same revision."""

    source: str
    config: PreTrainedConfig
    model_class: type[PreTrainedModel]
    hub: HubOptions


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model that can be built: its files are on disk."""

    architecture: Architecture
    files: tuple[str, ...]


def hub_options(source: str, config: EngineConfig) -> HubOptions:
    """Where transformers looks for files: only in the cache if the hub cannot be reached."""
    cache_only = not Path(source).is_dir() and bool(unreachable())
    return {"revision": config.revision or "main", "cache_dir": config.download_dir, "local_files_only": cache_only}


def locate(source: str, config: EngineConfig) -> Architecture | None:
    """The model at a folder or hub id; None for what only `from_pretrained` can load.

    Imports the module that defines it. Raises what transformers raises for a source without a config.
    """
    from transformers import AutoConfig
    from transformers.utils.hub import resolve_revision

    hub = hub_options(source, config)
    hub["revision"] = resolve_revision(source, **hub)
    if _transformers_is_patched() or _has_adapter(source, hub):
        return None
    model_config: PreTrainedConfig
    model_config = AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code, **hub)
    if config.trust_remote_code and "AutoModelForCausalLM" in (getattr(model_config, "auto_map", None) or {}):
        return None
    model_config, model_class = _class_for(model_config)
    if model_class is None or _is_special(model_config, model_class):
        return None
    model_config.name_or_path = source
    return Architecture(source, model_config, model_class, hub)


def fetch(architecture: Architecture, load_format: str) -> Checkpoint | None:
    """Download the weights unless they are cached; None where no file has a known name.

    Of several formats, the one that transformers prefers. Raises `ConfigurationError` for a missing shard.
    """
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    source, hub = architecture.source, architecture.hub
    for name in _FORMATS[load_format]:
        path = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub)
        if path is not None:
            files = get_checkpoint_shard_files(source, path, **hub)[0] if name.endswith(".json") else [path]
            _check_shards(source, files)
            return Checkpoint(architecture, tuple(map(str, files)))
    return None


def tensors_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """All tensors by name, mapped from the files: nothing is read yet."""
    from transformers.modeling_utils import load_state_dict

    tensors: dict[str, torch.Tensor] = {}
    for file in checkpoint.files:
        tensors.update(load_state_dict(file))
    return tensors


def stored_dtype(config: PreTrainedConfig, tensors: Mapping[str, torch.Tensor]) -> torch.dtype:
    """What dtype="auto" means: the config's, else that of the first floating-point tensor."""
    dtype: torch.dtype | str | None = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    if isinstance(dtype, torch.dtype):
        return dtype
    floats = (tensor.dtype for tensor in tensors.values() if tensor.is_floating_point() and tensor.element_size() > 1)
    return next(floats, torch.float32)


def _transformers_is_patched() -> bool:
    """Whether the program changed how transformers makes modules: replaced classes, DeepSpeed, FSDP."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
    from transformers.integrations.fsdp import is_fsdp_enabled
    from transformers.monkey_patching import get_patch_mapping

    return bool(get_patch_mapping()) or is_deepspeed_zero3_enabled() or is_fsdp_enabled()


def _has_adapter(source: str, hub: HubOptions) -> bool:
    from transformers.utils.peft_utils import find_adapter_config_file

    return find_adapter_config_file(source, **hub) is not None


def _class_for(model_config: PreTrainedConfig) -> tuple[PreTrainedConfig, type[PreTrainedModel] | None]:
    """The config to use and its class in transformers, or None: of a multimodal model, the text model if it has one."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model_config), None)
    if not isinstance(model_class, type):
        return model_config, None
    text_class = model_config.sub_configs.get("text_config")
    if text_class is not None and getattr(model_class, "config_class", None) is text_class:
        quantized = getattr(model_config, "quantization_config", None) is not None
        return model_config.get_text_config(), None if quantized else model_class
    return model_config, model_class


def _is_special(model_config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> bool:
    """Whether loading the model takes more than its class and its tensors."""
    classes = [
        base for base in model_class.__mro__ if issubclass(base, PreTrainedModel) and base is not PreTrainedModel
    ]
    return (
        model_class.is_custom_code()
        or any(getattr(model_config, name, None) is not None for name in _SPECIAL)
        or bool(getattr(type(model_config), "extra_files", ()))
        or any(name in vars(base) for base in classes for name in _LOADING)
        or _UNPINNED.search(inspect.getsource(sys.modules[model_class.__module__])) is not None
    )


def _check_shards(source: str, files: Sequence[str]) -> None:
    missing = sorted(Path(file).name for file in files if not Path(file).is_file())
    if missing:
        raise ConfigurationError(
            f"{source} lacks {len(missing)} of its {len(files)} weight files ({listed(missing)}): "
            "the download or the save was interrupted; get the missing files"
        )
