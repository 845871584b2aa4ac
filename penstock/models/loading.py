"""From what a caller has (hub id, folder, live module, nothing) to a model that runs: `load`, `load_draft`.

Resolves device and dtype, and turns every way in which a load can fail into an error with a remedy. Never downloads
when a local path was meant. Called once per engine, off the event loop; imports torch and transformers.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from penstock.config import EngineConfig
from penstock.demo import MODEL_DIR
from penstock.errors import ConfigurationError, OutOfMemory, PenstockError, described, text_of
from penstock.models.borrow import Borrowed, device_and_dtype, weight_bytes
from penstock.models.calibration import calibration_ids
from penstock.models.checks import hidden_size, refuse_unsupported, text_config, vocab_size
from penstock.models.draft_runner import DraftRunner
from penstock.models.executor import Executor
from penstock.models.folder import check_tokenizer_files, expanded
from penstock.models.generation_defaults import eos_token_ids, generation_defaults
from penstock.models.hardware import torch_threads_kept
from penstock.models.hub import check_available
from penstock.models.origin import Origin
from penstock.models.pinning import PinnedDefaults
from penstock.models.positions import LengthLimit, length_limit
from penstock.models.preparation import PreparedModel, prepare
from penstock.models.protocol import ModelSpec
from penstock.models.reading import read_module, read_tokenizer
from penstock.models.wrappers import unwrapped
from penstock.optimizers.rewrites.recipes import DerivedWeights

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
    """A model ready to run, and its tokenizer: transformers' or the caller's own; None for token ids only."""

    runner: Executor
    tokenizer: Any


def load(model: str | Path | nn.Module | None, tokenizer: object, config: EngineConfig) -> LoadedModel:
    """Load or borrow `model` (None: the demo model) and switch it to paged attention.

    Raises `ConfigurationError` for what cannot be found, read or run, `OutOfMemory` when weights do not fit.
    """
    borrowed: Borrowed | None = None
    origin: Origin | None = None
    if isinstance(model, nn.Module):
        tokenizer = _tokenizer_for(None, tokenizer, config)
        model = unwrapped(model)
        borrowed = Borrowed(model, packed=config.weight_mode == "packed", dtype=_packed_dtype(model, config))
        module = borrowed.view
        name = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
    else:
        name = expanded(str(MODEL_DIR if model is None else model))
        if not config.skip_tokenizer_init and (tokenizer is None or isinstance(tokenizer, str | Path)):
            check_tokenizer_files(str(tokenizer or config.tokenizer or name))
        module = load_bare(name, config)
        origin = Origin(name, config)
        tokenizer = _tokenizer_for(name, tokenizer, config)
    prepared, spec, ignored = _prepare(module, borrowed, tokenizer, config, name)
    runner = Executor(prepared, spec, config.logits_chunk_bytes, borrowed, origin)
    if ignored:
        log.warning("the generation config of %s is not followed in: %s", name, "; ".join(ignored))
    return LoadedModel(runner, tokenizer)


def load_draft(source: str, target: ModelSpec, config: EngineConfig) -> DraftRunner:
    """Load a model that drafts for `target`. Raises `ConfigurationError`, also when its vocabulary is another one.

    A very small model gains nothing from a second thread: handing work to it costs more than it saves. The target
    model, which runs on the same thread of the program, keeps as many of PyTorch's threads as it has.
    """
    overrides = {"max_sequence_length": None, "revision": None, "deterministic": False, "skip_tokenizer_init": True}
    config = config.model_copy(update=overrides | {"weight_mode": None})
    module = load_bare(source, config)
    if weight_bytes(module) <= ONE_THREAD_BYTES:
        config.num_threads = 1
    if (size := vocab_size(module)) != target.vocab_size:
        raise ConfigurationError(
            f"the draft model {source} has {size} tokens in its vocabulary and {target.name} has "
            f"{target.vocab_size}: choose a smaller model of the same family, or drafter='ngram'"
        )
    with torch_threads_kept():
        prepared, spec, _ = _prepare(module, None, None, config, source)
        return DraftRunner(prepared, spec, config.logits_chunk_bytes)


def load_bare(source: str, config: EngineConfig) -> nn.Module:
    """The module at a folder or hub id as transformers runs it, on the device and in the dtype of `config`.

    Raises `ConfigurationError` for what cannot be found, read, or is not complete, and `OutOfMemory`.
    """
    source = check_available(source, config)
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
        hint = "" if Path(source).is_dir() else " (there is no such folder here, so it was taken for a hub id)"
        raise ConfigurationError(f"cannot load the model {source!r}{hint}: {text_of(error)}") from error


def resolve_device(name: str) -> torch.device:
    """ "auto" prefers CUDA. Raises `ConfigurationError` for a device that does not exist."""
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


def _tokenizer_for(source: str | None, tokenizer: object, config: EngineConfig) -> object:
    """The caller's tokenizer object, or the one named, or the model's own; None when skipped."""
    if config.skip_tokenizer_init:
        return None
    if tokenizer is not None and not isinstance(tokenizer, str | Path):
        return tokenizer
    name = config.tokenizer if tokenizer is None else str(tokenizer)
    if source is None and name is None:
        raise ConfigurationError(
            "a live module needs its tokenizer: InferenceEngine(model, tokenizer), or skip_tokenizer_init=True"
        )
    path = expanded(name or str(source))
    check_tokenizer_files(path)
    try:
        return read_tokenizer(path, config)
    except Exception as error:
        raise ConfigurationError(
            f"cannot load a tokenizer from {path!r} ({text_of(error)}): name a folder or hub id that has one, with "
            "tokenizer='...' (--tokenizer on the command line); skip_tokenizer_init=True serves token ids without one"
        ) from error


def _packed_dtype(module: nn.Module, config: EngineConfig) -> torch.dtype | None:
    """The dtype of packed copies of a live module, where it is not the module's own."""
    dtype = resolve_dtype(config.dtype)
    if not isinstance(dtype, torch.dtype) or dtype == device_and_dtype(module)[1]:
        return None
    if config.weight_mode != "packed":
        raise ConfigurationError(
            f"dtype={config.dtype!r} needs copies of the weights, and the engine shares those of a live module: set "
            "weight_mode='packed', or leave dtype out"
        )
    return dtype


def _prepare(
    module: nn.Module, borrowed: Borrowed | None, tokenizer: object, config: EngineConfig, name: str
) -> tuple[PreparedModel, ModelSpec, list[str]]:
    """The module ready to run, its facts, and the fields of its generation config that have no effect, in words."""
    refuse_unsupported(module)
    device, dtype = device_and_dtype(module)
    eos, vocabulary = eos_token_ids(module, tokenizer), vocab_size(module)
    max_length = _max_length(limit := length_limit(text_config(module)), config)
    defaults, ignored = generation_defaults(module, vocabulary, eos, has_text=tokenizer is not None)
    loaded_bytes = weight_bytes(module)
    quantizes = config.quantization == "int8"
    text_ids = calibration_ids(tokenizer, max_length, vocabulary, device) if quantizes else None
    prepared = _try_to_prepare(module, borrowed, device, max_length, config, text_ids)
    spec = ModelSpec(
        name=name,
        vocab_size=vocabulary,
        max_length=max_length,
        max_length_reason=limit.reason if max_length == limit.tokens else "",
        eos_token_ids=eos,
        hidden_size=hidden_size(module),
        kv_bytes_per_token=prepared.kv_bytes_per_token,
        # A head tied to the embedding counts once.
        weight_bytes=min(loaded_bytes, weight_bytes(module) + prepared.packed_bytes),
        packed_bytes=prepared.packed_bytes + (weight_bytes(module) if borrowed and borrowed.is_cast else 0),
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        kernels=prepared.kernels,
        rewrites=prepared.rewrites,
        is_batch_invariant=prepared.is_batch_invariant,
        checks_candidates=prepared.backend.logit_kernels is not None,
        defaults=defaults,
    )
    return prepared, spec, ignored


def _max_length(limit: LengthLimit, config: EngineConfig) -> int:
    requested = config.max_sequence_length or limit.tokens
    if requested > limit.tokens and "max_sequence_length" in config.model_fields_set:
        log.warning("max_sequence_length=%d is cut to %d: %s", requested, limit.tokens, limit.reason)
    return min(requested, limit.tokens)


def _try_to_prepare(
    module: nn.Module,
    borrowed: Borrowed | None,
    device: torch.device,
    max_length: int,
    config: EngineConfig,
    text_ids: Tensor | None,
) -> PreparedModel:
    packs = (config.weight_mode or ("packed" if borrowed is None else "shared")) == "packed"
    weights = DerivedWeights(module, shares=borrowed is not None and not borrowed.is_cast)
    try:
        with torch.inference_mode(), PinnedDefaults(torch.float32):
            prepared = prepare(module, weights, device, max_length, config, packs=packs, text_ids=text_ids)
            weights.follow()
            if borrowed is not None and borrowed.is_cast:
                weights.refresh(borrowed.parameters())  # the passes worked with copies that were rounded already
            return prepared
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(f"{device.type.upper()} out of memory while trying the model: use a smaller one") from error
    except PenstockError:
        raise
    except Exception as error:
        raise ConfigurationError(f"a trial pass of the model failed: {described(error)}") from error
