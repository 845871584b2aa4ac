"""Several copies of one model: where each runs, and how copies of a live module come to be and follow it.

Owns nothing. Called while replicas are loaded, on the thread of each one's model, and when their weights are updated.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from penstock.config import EngineConfig
from penstock.errors import ConfigurationError, OutOfMemory, described
from penstock.models.borrow import device_and_dtype
from penstock.models.hardware import usable_cores
from penstock.models.loading import resolve_device
from penstock.models.updates import named_weights
from penstock.models.wrappers import unwrapped


def device_of_replica(number: int, count: int, device: str) -> str:
    """The device of replica `number` of `count`, where `device` is that of the settings: a GPU for each, or the CPU.

    "auto" means GPUs if there are any. Raises `ConfigurationError` where there are fewer GPUs than replicas.
    """
    if device == "auto" and not torch.cuda.is_available():
        return "cpu"
    if count == 1 or device not in ("auto", "cuda"):
        return device
    return _gpus(count)[number]


def device_of_copy(module: nn.Module, number: int, count: int) -> str:
    """The device of replica `number`, above 0, of a live module: the CPU if the module is there, or another GPU."""
    device, _ = device_and_dtype(unwrapped(module))
    if device.type != "cuda":
        return str(device)
    return [gpu for gpu in _gpus(count) if gpu != f"cuda:{device.index or 0}"][number - 1]


def device_of(module: nn.Module) -> str:
    """The device of a live module, which stays where it is."""
    return str(device_and_dtype(unwrapped(module))[0])


def check_device(module: nn.Module, device: str) -> None:
    """Raise `ConfigurationError` for a live module that is not on the device which is named for it."""
    place, (actual, _) = resolve_device(device), device_and_dtype(unwrapped(module))
    if (place.type, place.index or 0) != (actual.type, actual.index or 0):
        raise ConfigurationError(f"the live module is on {actual}, and devices names {device} for it: name {actual}")


def _gpus(count: int) -> list[str]:
    """All GPUs, of which there are enough for so many replicas. Raises `ConfigurationError`."""
    num_gpus = torch.cuda.device_count()
    if num_gpus < count:
        raise ConfigurationError(
            f"{count} replicas need a GPU each, and there are {num_gpus}: use fewer, device='cpu', or name the device "
            "of each replica in devices"
        )
    return [f"cuda:{index}" for index in range(num_gpus)]


def config_of_replica(config: EngineConfig, device: str, num_sharing: int) -> EngineConfig:
    """The settings of a replica on a device that `num_sharing` replicas share: its cores and its memory are divided."""
    changes: dict[str, object] = {} if device == config.device else {"device": device}
    if config.gpu_memory_utilization is not None and num_sharing > 1:
        changes["gpu_memory_utilization"] = config.gpu_memory_utilization / num_sharing
    if device == "cpu" and config.num_threads is None and num_sharing > 1:
        changes["num_threads"] = max(1, usable_cores() // num_sharing)
    return config.model_copy(update=changes) if changes else config


def copy_of(module: nn.Module, device: str) -> nn.Module:
    """A copy of a live module with weights of its own, which are not trained.

    Raises `ConfigurationError` for a module that cannot be copied and for an unknown device, and `OutOfMemory`.
    """
    owner, place = unwrapped(module), resolve_device(device)
    try:
        # No copies of gradients: an optimizer never sees this one.
        memo = {id(parameter.grad): None for parameter in owner.parameters() if parameter.grad is not None}
        return copy.deepcopy(owner, memo).requires_grad_(False).to(place)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(
            f"{place.type.upper()} out of memory while copying the live module: use fewer replicas, or another device"
        ) from error
    except Exception as error:
        raise ConfigurationError(f"this module cannot be copied for a second replica: {described(error)}") from error


def weights_to_follow(module: nn.Module) -> Mapping[str, Tensor]:
    """The weights of a live module, by the names that they have in its copies."""
    return named_weights(unwrapped(module))
