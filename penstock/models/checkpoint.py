"""What a model source holds: its config and class (`locate`), its weight files (`fetch`), their tensors, and whether
these are all that the model needs (`Findings`).

Understands folders and hub snapshots whose architecture transformers itself defines; for anything else `locate`
returns None, and the model is left to `from_pretrained`. Reads and downloads files; makes no module. Called by
`reading` and `building`.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from penstock.config import EngineConfig
from penstock.errors import ConfigurationError

_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_FORMATS = {"auto": (*_SAFETENSORS, *_PICKLED), "safetensors": _SAFETENSORS, "pt": _PICKLED}
# Parts of a config that only `from_pretrained` acts upon.
_SPECIAL = ("quantization_config", "fusion_config", "transformers_weights")
# Loading methods that a model class may override; one that does is left to `from_pretrained`.
_LOADING = ("from_pretrained", "get_init_context", "tie_weights", "init_weights", "initialize_weights")
# What reads the process's default dtype in a way that a thread's pinned default does not reach.
_UNPINNED = re.compile(r"get_default_dtype|torch\.(Float)?Tensor\(")
NUM_NAMED = 3  # tensors that a message names
# What wrappers add to the names of a module's parameters, and what they are.
_WRAPPERS = {
    "_orig_mod.": "a module compiled by torch.compile",
    "_fsdp_wrapped_module.": "an FSDP module",
    "_checkpoint_wrapped_module.": "a module with activation checkpointing",
    "module.": "a DataParallel or DeepSpeed module",
    "base_model.model.": "a peft module",
    "base_layer.": "a peft module",
}
Shapes = tuple[tuple[int, ...], tuple[int, ...]]  # in the file, in the model
# Keywords of transformers' functions that say where on the hub, and in the cache, files are found.
HubOptions = dict[str, Any]

log = logging.getLogger("penstock")


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


def hub_options(config: EngineConfig) -> HubOptions:
    """Where transformers looks for files."""
    return {"revision": config.revision or "main", "cache_dir": config.download_dir}


def locate(source: str, config: EngineConfig) -> Architecture | None:
    """The model at a folder or hub id; None for what only `from_pretrained` can load.

    Imports the module that defines it. Raises what transformers raises for a source without a config.
    """
    from transformers import AutoConfig
    from transformers.utils.hub import resolve_revision

    hub = hub_options(config)
    hub["revision"] = resolve_revision(source, hub["revision"], cache_dir=hub["cache_dir"])
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
            f"{source} lacks {len(missing)} of its {len(files)} weight files ({', '.join(missing[:NUM_NAMED])}): "
            "the download or the save was interrupted; get the missing files"
        )


@dataclass(slots=True)
class Findings:
    """How a checkpoint and its model differ; written while the module is built, then checked.

    Names of the model that no file holds, tensors of the files that fit nowhere, and tensors of another shape. `failed`
    are conversions that raised (name: error); `ignored` is what may be missing.
    transformers warns and serves random numbers instead; here such a model is refused, with the likely cause.
    """

    missing: set[str] = field(default_factory=set)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, Shapes] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> Findings:
        """From the report that `from_pretrained(output_loading_info=True)` returns."""
        mismatched = {name: (tuple(file), tuple(model)) for name, file, model in info.get("mismatched_keys") or ()}
        return cls(set(info.get("missing_keys") or ()), sorted(info.get("unexpected_keys") or ()), mismatched)

    @property
    def fatal(self) -> bool:
        """Whether the model would compute with numbers that no file holds."""
        return bool(self.missing or self.mismatched or self.failed)

    def ignore(self, missing: Iterable[str], unexpected: Iterable[str]) -> None:
        """Set aside names that match patterns: those that may be missing, and those that old files hold."""
        self.ignored = {name for name in self.missing if _matches(missing, name)}
        self.missing -= self.ignored
        self.unexpected = [name for name in self.unexpected if not _matches(unexpected, name)]

    def check(self, source: str) -> None:
        """Raise `ConfigurationError` when `fatal`; log one warning about tensors that are not used."""
        if self.failed:
            name, error = next(iter(self.failed.items()))
            raise ConfigurationError(
                f"the checkpoint {source} does not fit its model: {len(self.failed)} tensors cannot be converted "
                f"({name}: {error}). Likely cause: an interrupted save; save or download it again"
            )
        if self.mismatched:
            raise ConfigurationError(f"the checkpoint {source} does not fit its model: {_mismatch(self.mismatched)}")
        if self.missing:
            raise ConfigurationError(
                f"the checkpoint {source} lacks {_count(self.missing)} of its model ({_listed(self.missing)}). "
                f"Likely cause: {_cause(self.missing, self.unexpected)}"
            )
        if self.unexpected:
            log.warning(
                "the checkpoint %s holds %s that its model has no place for (%s): they are not used",
                source,
                _count(self.unexpected),
                _listed(self.unexpected),
            )


def _matches(patterns: Iterable[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _count(names: Iterable[str]) -> str:
    count = sum(1 for _ in names)
    return f"{count} tensor{'s' if count != 1 else ''}"


def _listed(entries: Iterable[str], separator: str = ", ") -> str:
    """The first entries, and the number of the others."""
    ordered = sorted(entries)
    suffix = f" and {len(ordered) - NUM_NAMED} more" if len(ordered) > NUM_NAMED else ""
    return separator.join(ordered[:NUM_NAMED]) + suffix


def _mismatch(mismatched: Mapping[str, Shapes]) -> str:
    entries = [
        f"{name} is {list(file)} in the file and {list(model)} in the model"
        for name, (file, model) in mismatched.items()
    ]
    return (
        f"{_count(mismatched)} of another shape ({_listed(entries, '; ')}). Likely cause: config.json is "
        "another model's, or the vocabulary was resized and config.json not saved again"
    )


def _cause(missing: set[str], unexpected: list[str]) -> str:
    """Why tensors are missing, and what to do."""
    added = _added_part(missing, unexpected)
    if added:
        wrapper = next((f" by {wrapper}" for part, wrapper in _WRAPPERS.items() if part in added), "")
        return f"the names in the file have {added!r} added{wrapper}: rename the tensors, or save the module inside"
    if any("lora_" in name for name in unexpected):
        return "the file holds a LoRA adapter and not the model: merge it into its base model, and save that"
    if all(name.startswith(("lm_head.", "embed_out.", "output.")) for name in missing):
        return (
            "the model was saved with its head tied to the embedding and config.json says tie_word_embeddings=false "
            "(set it to true), or the save was interrupted (save it again)"
        )
    if unexpected:
        return (
            f"config.json is another model's ({_count(unexpected)} of the file fit nowhere: {_listed(unexpected)}), or "
            "the names were changed: save it again with save_pretrained"
        )
    return "an interrupted save or download, or config.json of a larger model: save or download it again"


def _added_part(missing: set[str], unexpected: list[str]) -> str:
    """What most names of the file have that the model's lack: a prefix, or a wrapper's name inside; "" for none."""
    for part in _WRAPPERS:
        if sum(part in name and name.replace(part, "") in missing for name in unexpected) * 2 > len(missing):
            return part
    prefixes: Counter[str] = Counter()
    for name in unexpected:
        parts = name.split(".")
        suffixes = (".".join(parts[i:]) for i in range(1, len(parts)))
        prefixes.update(name[: -len(suffix)] for suffix in suffixes if suffix in missing)
    prefix, count = next(iter(prefixes.most_common(1)), ("", 0))
    return prefix if count * 2 > len(missing) else ""
