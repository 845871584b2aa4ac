"""From a module that was read to one that runs fast: probe, choice of kernels, rewrites, comparison (`ready`).

Owns the order of these steps and what a load may leave out. Called by `loading`; refusals are `ConfigurationError`s.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import nn

from penstock.config import EngineConfig
from penstock.errors import ConfigurationError
from penstock.kernels import native
from penstock.models.checks import Probed, compare, probe, trial_pass
from penstock.models.filepages import release_file_pages
from penstock.models.paging import Paging, PanelPaging, PlainPaging
from penstock.models.panels import supports
from penstock.models.storage import LayerShape
from penstock.models.threads import kernel_threads, one_torch_thread
from penstock.optimizers.fused import FusedLayer
from penstock.optimizers.memory_pool import MemoryPool
from penstock.optimizers.rewriting import rewrite

log = logging.getLogger("penstock")


@dataclass(frozen=True, slots=True)
class Ready:
    """What the executor needs of a module that is ready to run."""

    layers: dict[int, int]
    shapes: list[LayerShape]
    paging: Paging
    workspaces: MemoryPool
    kv_bytes_per_token: int
    packed_bytes: int
    kernels: str
    rewrites: tuple[str, ...]


def ready(module: nn.Module, device: torch.device, longest: int, config: EngineConfig, *, owned: bool) -> Ready:
    """Switch `module` to paged attention and, on a CPU with kernels, rewrite it in place if it is `owned`.

    Raises `ConfigurationError` for a model that cannot run, or not as the config demands.
    """
    probed = probe(module, device, verify=config.verify_model, longest=longest)
    workspaces = MemoryPool(config.logits_chunk_bytes if config.enable_memory_pooling else 0, device)
    kernels = _kernels(probed, device, config)
    if kernels is None:
        _demand_nothing(config)
        paging: Paging = PlainPaging(device)
        compare(module, probed, paging)
        return _ready(module, probed, paging, workspaces, "plain torch" + _why_plain(device, config), ())
    paging = PanelPaging(kernels, config.kv_cache_dtype == "int8", touch=config.preallocate_kv_cache)
    rewrites: tuple[str, ...] = ()
    try:
        if not owned:
            _demand_owned(config)
        else:
            rewrites = _rewrite(module, probed, kernels, paging, workspaces, device, config)
        compare(module, probed, paging, quantized=_quantized(config))
    except BaseException:
        paging.close()
        raise
    return _ready(module, probed, paging, workspaces, f"{native.note()}, {kernels.threads} threads", rewrites)


def _ready(
    module: nn.Module,
    probed: Probed,
    paging: Paging,
    workspaces: MemoryPool,
    kernels: str,
    rewrites: tuple[str, ...],
) -> Ready:
    workspaces.return_all()
    workspaces.clear_pool()  # of what the trial passes took
    packed = sum(getattr(part, "num_bytes", 0) for part in module.modules())
    per_token = paging.bytes_per_token(probed.shapes)
    return Ready(probed.layers, probed.shapes, paging, workspaces, per_token, packed, kernels, rewrites)


def _quantized(config: EngineConfig) -> list[str]:
    """The settings that store numbers in fewer bits than the checkpoint does."""
    settings = {"quantization": config.quantization, "kv_cache_dtype": config.kv_cache_dtype}
    return [f"{name}={value!r}" for name, value in settings.items() if value not in (None, "auto")]


def _why_plain(device: torch.device, config: EngineConfig) -> str:
    if device.type != "cpu" or "kernels" in config.disabled_rewrites:
        return ""
    return f": {'this model stores what the kernels do not' if native.available() else native.note()}"


def _kernels(probed: Probed, device: torch.device, config: EngineConfig) -> native.Kernels | None:
    usable = device.type == "cpu" and "kernels" not in config.disabled_rewrites and supports(probed.shapes)
    return native.Kernels(kernel_threads(config.num_threads)) if usable and native.available() else None


def _rewrite(
    module: nn.Module,
    probed: Probed,
    kernels: native.Kernels,
    paging: Paging,
    workspaces: MemoryPool,
    device: torch.device,
    config: EngineConfig,
) -> tuple[str, ...]:
    one_torch_thread()
    report = rewrite(
        module,
        probed,
        kernels,
        lambda: trial_pass(module, probed, paging, device),
        quantize=config.quantization == "int8",
        without=config.disabled_rewrites,
        workspaces=workspaces,
    )
    release_file_pages((*module.parameters(), *module.buffers()))
    log.debug("rewrites: %s", ", ".join(map(str, report)))
    if config.deterministic:
        _demand_all_fused(module, probed)
    return tuple(map(str, report))


def _demand_nothing(config: EngineConfig) -> None:
    for name, wanted in (
        ("quantization", config.quantization),
        ("kv_cache_dtype", config.kv_cache_dtype != "auto"),
        ("deterministic", config.deterministic),
    ):
        if wanted:
            raise ConfigurationError(
                f"{name}={getattr(config, name)!r} needs the compiled CPU kernels: device='cpu', a C compiler, and "
                f"no 'kernels' in disabled_rewrites (`penstock doctor` says what is missing); or leave {name} out"
            )


def _demand_owned(config: EngineConfig) -> None:
    for name in ("quantization", "deterministic"):
        if getattr(config, name):
            raise ConfigurationError(
                f"{name} rewrites the weights, and this module is yours: set compile_model=True to work on "
                "packed copies, or save it with save_pretrained and pass the folder"
            )


def _demand_all_fused(module: nn.Module, probed: Probed) -> None:
    """Deterministic outputs hold for what the kernels compute; a product of torch's minds its neighbours."""
    fused = sum(part.num_layers for part in module.modules() if isinstance(part, FusedLayer))
    left = [f"{len(probed.layers) - fused} of {len(probed.layers)} layers"] if fused < len(probed.layers) else []
    left += sorted({type(part).__name__ for part in module.modules() if _computes_with_weights(part)})
    if left:
        raise ConfigurationError(
            f"deterministic=True is not possible for {type(module).__name__}: {', '.join(left)} run outside the "
            "kernels; leave deterministic or disabled_rewrites out"
        )


def _computes_with_weights(part: nn.Module) -> bool:
    return not isinstance(part, nn.Embedding) and any(True for _ in part.parameters(recurse=False))
