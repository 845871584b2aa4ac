"""From a module that was read to one that runs fast: probe, choice of kernels, rewrites, comparison (`prepare`).

Owns the order of these steps and what a load may leave out. Called by `loading`; refusals are `ConfigurationError`s.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from penstock.config import EngineConfig
from penstock.errors import ConfigurationError
from penstock.kernels import native
from penstock.models.attention import AttentionBackend
from penstock.models.checks import ProbeResult, compare, probe, trial_pass
from penstock.models.hardware import kernel_threads, use_one_torch_thread
from penstock.models.memory import release_file_pages
from penstock.models.panels import PanelBackend, supports
from penstock.models.storage import LayerShape
from penstock.models.torch_attention import TorchBackend
from penstock.optimizers.rewrites.calibration import calibrated
from penstock.optimizers.rewrites.fused_layer import FusedLayer
from penstock.optimizers.rewrites.memory_pool import MemoryPool
from penstock.optimizers.rewrites.passes import rewrite
from penstock.optimizers.rewrites.recipes import DerivedWeights

log = logging.getLogger("penstock")


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """A module that was switched to paged attention, and what an executor runs it with.

    `layers` has the layer of each attention module, by the module's id; `shapes` what each layer stores. `weights` are
    written again after an update. `is_batch_invariant`: nothing runs outside the kernels, whose results do not depend
    on the other rows of a step.
    """

    module: nn.Module
    weights: DerivedWeights
    device: torch.device
    layers: dict[int, int]
    shapes: list[LayerShape]
    backend: AttentionBackend
    workspaces: MemoryPool
    native: native.Kernels | None
    kernels: str
    rewrites: tuple[str, ...]
    is_batch_invariant: bool

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of one token, all layers together."""
        return self.backend.bytes_per_token(self.shapes)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the weights that rewrites packed."""
        return sum(vars(part).get("num_bytes", 0) for part in self.module.modules())


def prepare(
    module: nn.Module, weights: DerivedWeights, device: torch.device, max_length: int, config: EngineConfig, *,
    packs: bool, text_ids: Tensor | None = None,
) -> PreparedModel:  # fmt: skip
    """Switch `module` to paged attention and, on a CPU with kernels and if it `packs`, rewrite it in place.

    Quantization is calibrated with `text_ids`. Raises `ConfigurationError` for a model that cannot run as configured.
    """
    probed = probe(module, device, verify=config.verify_model, max_length=max_length)
    workspaces = MemoryPool(config.logits_chunk_bytes if config.enable_memory_pooling else 0, device)
    kernels = _kernels(probed, device, config)
    backend: AttentionBackend = TorchBackend(device)
    rewrites: tuple[str, ...] = ()
    if kernels is None:
        _refuse_kernel_settings(config)
        description = "plain torch" + _why_plain(device, config)
        compare(module, probed, backend)
    else:
        backend = PanelBackend(kernels, config.kv_cache_dtype == "int8", touch=config.preallocate_kv_cache)
        description = f"{native.note()}, {kernels.threads} threads"
        try:
            if packs:
                rewrites = _rewrite(module, probed, kernels, backend, workspaces, config, text_ids)
            else:
                _refuse_rewriting_settings(config)
            compare(module, probed, backend, quantized=_quantized_settings(config))
        except BaseException:
            backend.close()
            raise
    workspaces.return_all()
    workspaces.clear_pool()  # of what the trial passes took
    is_invariant = kernels is not None and packs and not _parts_outside_kernels(module, probed)
    parts = (probed.layers, probed.shapes, backend, workspaces, kernels)
    return PreparedModel(module, weights, device, *parts, description, rewrites, is_invariant)


def _quantized_settings(config: EngineConfig) -> list[str]:
    """The settings that store numbers in fewer bits than the checkpoint does."""
    settings = {"quantization": config.quantization, "kv_cache_dtype": config.kv_cache_dtype}
    return [f"{name}={value!r}" for name, value in settings.items() if value not in (None, "auto")]


def _why_plain(device: torch.device, config: EngineConfig) -> str:
    if device.type != "cpu" or "kernels" in config.disabled_rewrites:
        return ""
    return f": {'this model stores what the kernels do not' if native.available() else native.note()}"


def _kernels(probed: ProbeResult, device: torch.device, config: EngineConfig) -> native.Kernels | None:
    usable = device.type == "cpu" and "kernels" not in config.disabled_rewrites and supports(probed.shapes)
    return native.Kernels(kernel_threads(config.num_threads)) if usable and native.available() else None


def _rewrite(
    module: nn.Module,
    probed: ProbeResult,
    kernels: native.Kernels,
    backend: AttentionBackend,
    workspaces: MemoryPool,
    config: EngineConfig,
    text_ids: Tensor | None,
) -> tuple[str, ...]:
    """Rewrite the module, which is on the CPU; what each pass did."""

    def run(ids: Tensor | None = None) -> Tensor:
        return trial_pass(module, probed, backend, workspaces.device, ids)

    with nullcontext() if text_ids is None else calibrated(module, partial(run, text_ids)):
        use_one_torch_thread()
        report = rewrite(
            module,
            probed,
            kernels,
            run,
            quantize=config.quantization == "int8",
            disabled=config.disabled_rewrites,
            workspaces=workspaces,
        )
    release_file_pages((*module.parameters(), *module.buffers()))
    log.debug("rewrites: %s", ", ".join(map(str, report)))
    if config.deterministic:
        _require_all_in_kernels(module, probed)
    return tuple(map(str, report))


def _refuse_kernel_settings(config: EngineConfig) -> None:
    """Raise `ConfigurationError` for a setting that only the kernels fulfil."""
    for name, is_set in (
        ("quantization", config.quantization is not None),
        ("kv_cache_dtype", config.kv_cache_dtype != "auto"),
        ("deterministic", config.deterministic),
    ):
        if is_set:
            raise ConfigurationError(
                f"{name}={getattr(config, name)!r} needs the compiled CPU kernels: device='cpu', a C compiler, and "
                f"no 'kernels' in disabled_rewrites (`penstock doctor` says what is missing); or leave {name} out"
            )


def _refuse_rewriting_settings(config: EngineConfig) -> None:
    """Raise `ConfigurationError` for a setting that works on packed weights alone."""
    for name in ("quantization", "deterministic"):
        if getattr(config, name):
            raise ConfigurationError(
                f"{name} needs packed copies of the weights, and the engine shares them: set weight_mode='packed'"
            )


def _require_all_in_kernels(module: nn.Module, probed: ProbeResult) -> None:
    if outside := _parts_outside_kernels(module, probed):
        raise ConfigurationError(
            f"deterministic=True is not possible for {type(module).__name__}: {', '.join(outside)} run outside the "
            "kernels; leave deterministic or disabled_rewrites out"
        )


def _parts_outside_kernels(module: nn.Module, probed: ProbeResult) -> list[str]:
    """Only the kernels' results are deterministic; those of torch's products depend on the other rows of the batch."""
    num_layers = len(probed.layers)
    fused = sum(part.num_layers for part in module.modules() if isinstance(part, FusedLayer))
    outside = [f"{num_layers - fused} of {num_layers} layers"] if fused < num_layers else []
    return outside + sorted({type(part).__name__ for part in module.modules() if _computes_with_weights(part)})


def _computes_with_weights(part: nn.Module) -> bool:
    return not isinstance(part, nn.Embedding) and any(True for _ in part.parameters(recurse=False))
