"""From what a caller has (hub id, folder, live module, nothing) to a model that runs: `load`.

Owns device and dtype resolution and every way a load can fail. Never downloads
when a local path was meant. Called once per engine, off the event loop; imports torch and transformers.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from penstock.config import EngineConfig
from penstock.demo import MODEL_DIR
from penstock.errors import ConfigurationError, OutOfMemory, PenstockError, described, text_of
from penstock.models.borrow import Borrowed, device_and_dtype, weight_bytes
from penstock.models.checks import refuse_foreign, vocab_size
from penstock.models.executor import Executor
from penstock.models.folder import check_source, expanded
from penstock.models.generation_defaults import eos_token_ids, generation_defaults, warn_of_ignored
from penstock.models.lean import DraftRunner
from penstock.models.pinning import PinnedDefaults
from penstock.models.positions import Limit, length_limit
from penstock.models.protocol import ModelSpec
from penstock.models.reading import read_module, read_tokenizer
from penstock.models.readying import Ready, ready
from penstock.models.threads import same_torch_threads

ONE_THREAD_BYTES = 16 * 1024**2
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}

log = logging.getLogger("penstock")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, and the tokenizer that belongs to it (None: token ids only)."""

    runner: Executor
    tokenizer: Any


def load(model: str | Path | nn.Module | None, tokenizer: Any, config: EngineConfig) -> LoadedModel:
    """Load or borrow `model` (None: the demo model) and switch it to paged attention.

    Raises `ConfigurationError` for what cannot be found, read or run, `OutOfMemory` when weights do not fit.
    """
    if isinstance(model, nn.Module):
        tokenizer = _tokenizer_for(None, tokenizer, config)
        borrowed = Borrowed(model, packed=config.compile_model)
        owner = borrowed.view if config.compile_model else model  # what is packed is the view's own
        parts = _parts(borrowed.view, owner, tokenizer, config, _name_of(model))
        return _ready(parts, tokenizer, borrowed)
    source = expanded(str(MODEL_DIR if model is None else model))
    module = load_bare(source, config)
    tokenizer = _tokenizer_for(source, tokenizer, config)
    return _ready(_parts(module, module, tokenizer, config, source), tokenizer)


def load_draft(source: str, large: ModelSpec, config: EngineConfig) -> DraftRunner:
    """Load a model that drafts for `large`. Raises `ConfigurationError`, also when its vocabulary is another one.

    A model this small gains nothing from a second thread: handing work over costs more than it saves. The large one,
    which runs on the same thread of the program, keeps as many of PyTorch's threads as it has.
    """
    own = {"max_sequence_length": None, "revision": None, "deterministic": False, "skip_tokenizer_init": True}
    config = config.model_copy(update=own)
    module = load_bare(source, config)
    if weight_bytes(module) <= ONE_THREAD_BYTES:
        config.num_threads = 1
    if vocab_size(module) != large.vocab_size:
        raise ConfigurationError(
            f"the draft model {source} has {vocab_size(module)} tokens in its vocabulary and {large.name} has "
            f"{large.vocab_size}: choose a smaller model of the same family, or drafter='ngram'"
        )
    with same_torch_threads():
        return DraftRunner(*_parts(module, module, None, config, source))


def load_bare(source: str, config: EngineConfig) -> nn.Module:
    """The module at a folder or hub id as transformers runs it, on the device and in the dtype of `config`.

    Raises `ConfigurationError` for what cannot be found, read, or is not complete, and `OutOfMemory`.
    """
    source = check_source(source)
    dtype, device = resolve_dtype(config.dtype), resolve_device(config.device)
    try:
        return read_module(source, dtype, config).to(device)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(
            f"{device.type.upper()} out of memory while loading {source}: "
            "use a smaller model, a smaller dtype, or the CPU"
        ) from error
    except PenstockError:
        raise
    except Exception as error:
        where = "" if Path(source).is_dir() else " (there is no such folder here, so it was taken for a hub id)"
        raise ConfigurationError(f"cannot load the model {source!r}{where}: {text_of(error)}") from error


def resolve_device(name: str) -> torch.device:
    """ "auto" prefers CUDA. Raises `ConfigurationError` for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigurationError(f'device {name!r} is unknown: use "auto", "cpu", "cuda" or "cuda:0"') from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigurationError(f'device {name!r} is not there ({torch.cuda.device_count()} CUDA devices): use "cpu"')
    return device


def resolve_dtype(name: str) -> torch.dtype | str:
    """A torch dtype, or "auto" for the checkpoint's own. Raises `ConfigurationError`."""
    if name != "auto" and name not in DTYPES:
        raise ConfigurationError(f"dtype {name!r} is unknown: use auto, {', '.join(DTYPES)}")
    return DTYPES.get(name, "auto")


def _tokenizer_for(source: str | None, tokenizer: Any, config: EngineConfig) -> Any:
    """The caller's tokenizer object, or the one named, or the model's own; None when skipped."""
    if config.skip_tokenizer_init:
        return None
    name = tokenizer if isinstance(tokenizer, str) else config.tokenizer
    if tokenizer is not None and not isinstance(tokenizer, str):
        return tokenizer
    if source is None and name is None:
        raise ConfigurationError(
            "a live module needs its tokenizer: InferenceEngine(model, tokenizer), or skip_tokenizer_init=True"
        )
    return _read_tokenizer(expanded(name or str(source)), config)


def _read_tokenizer(source: str, config: EngineConfig) -> Any:
    try:
        return read_tokenizer(source, config)
    except Exception as error:
        raise ConfigurationError(
            f"cannot load a tokenizer from {source!r} ({text_of(error)}): "
            "pass tokenizer=..., or skip_tokenizer_init=True to serve token ids"
        ) from error


def _ready(parts: tuple[Any, ...], tokenizer: Any, borrowed: Borrowed | None = None) -> LoadedModel:
    runner = Executor(*parts, borrowed=borrowed)
    module: nn.Module = parts[0]
    warn_of_ignored(module, runner.spec, has_text=tokenizer is not None)
    return LoadedModel(runner, tokenizer)


def _parts(module: nn.Module, owner: nn.Module, tokenizer: Any, config: EngineConfig, name: str) -> tuple[Any, ...]:
    """What an `Executor` is made of."""
    refuse_foreign(module)
    device, dtype = device_and_dtype(module)
    eos = eos_token_ids(module, tokenizer)
    limit = length_limit(_text_config(module))
    longest = _longest(limit, config)
    facts: dict[str, Any] = {
        "name": name,
        "vocab_size": vocab_size(module),
        "max_length": longest,
        "max_length_reason": limit.reason if longest == limit.tokens else "",
        "eos_token_ids": eos,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "defaults": generation_defaults(module, vocab_size(module), eos, has_text=tokenizer is not None)[0],
    }
    read = weight_bytes(owner)
    made = _try(module, device, longest, config, owned=module is owner)
    spec = ModelSpec(
        **facts,
        kv_bytes_per_token=made.kv_bytes_per_token,
        weight_bytes=min(read, weight_bytes(owner) + made.packed_bytes),  # a head tied to the embedding counts once
        kernels=made.kernels,
        rewrites=made.rewrites,
    )
    return module, spec, made.layers, made.shapes, made.paging, made.workspaces, device, config.logits_chunk_bytes


def _longest(limit: Limit, config: EngineConfig) -> int:
    asked = config.max_sequence_length or limit.tokens
    if asked > limit.tokens and "max_sequence_length" in config.model_fields_set:
        log.warning("max_sequence_length=%d is cut to %d: %s", asked, limit.tokens, limit.reason)
    return min(asked, limit.tokens)


def _try(module: nn.Module, device: torch.device, longest: int, config: EngineConfig, *, owned: bool) -> Ready:
    try:
        with torch.inference_mode(), PinnedDefaults(torch.float32):
            return ready(module, device, longest, config, owned=owned)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(f"{device.type.upper()} out of memory while trying the model: use a smaller one") from error
    except PenstockError:
        raise
    except Exception as error:
        raise ConfigurationError(f"a trial pass of the model failed: {described(error)}") from error


def _name_of(module: nn.Module) -> str:
    return getattr(getattr(module, "config", None), "name_or_path", "") or type(module).__name__


def _text_config(module: nn.Module) -> Any:
    return module.config.get_text_config()  # type: ignore[union-attr, operator]
