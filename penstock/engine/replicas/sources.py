"""`Models`: what each replica runs, and on which device.

Checked at construction, made when the replicas load: nothing heavy is imported before. Called by `ReplicatedEngine`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from penstock.api.weights import WeightSource
from penstock.config import EngineConfig
from penstock.engine.assembly import check_model, check_tokenizer
from penstock.engine.replicas.replica import Source
from penstock.errors import ConfigurationError, shown, text_of
from penstock.values import integer

MAX_REPLICAS = 1024


@dataclass(frozen=True, slots=True, eq=False)
class Models:
    """`models` has one for each replica, or a single one for all; of a live module all but the first are copies.

    `devices` names the device of each replica; None leaves that to the settings. Raises `ConfigurationError`.
    """

    models: tuple[object, ...]
    tokenizer: object
    config: EngineConfig
    devices: tuple[str, ...] | None
    count: int

    @classmethod
    def read(
        cls, model: object, tokenizer: object, config: EngineConfig, replicas: int | None, devices: Sequence[str] | None
    ) -> Models:
        """From the arguments of `ReplicatedEngine`."""
        models = tuple(model) if isinstance(model, list | tuple) else (model,)
        names = None if devices is None else _device_names(devices)
        is_list = isinstance(model, list | tuple)
        counts = {
            **({"models": len(models)} if is_list else {}),
            **({} if names is None else {"devices": len(names)}),
            **({} if replicas is None else {"replicas": _count(replicas)}),
        }
        if not counts:
            raise ConfigurationError("say how many replicas there are: replicas=2, or devices=['cuda:0', 'cuda:1']")
        if len(set(counts.values())) > 1 or 0 in counts.values():
            text = " and ".join(f"{count} {name}" for name, count in counts.items())
            raise ConfigurationError(f"each replica needs a model and a device, and there are {text}")
        for candidate in models:
            check_model(candidate)
        check_tokenizer(tokenizer)
        count = next(iter(counts.values()))
        if count > 1 and not is_list and not _is_name(model) and not hasattr(model, "parameters"):
            raise ConfigurationError(f"{count} replicas cannot share one {type(model).__name__}: pass a list of them")
        return cls(models, tokenizer, config, names, count)

    @property
    def owner(self) -> object | None:
        """The first live module, whose weights all replicas follow; None if there is none."""
        return next((model for model in self.models if hasattr(model, "parameters")), None)

    def source(self, number: int) -> Source:
        """What makes the model of one replica, its tokenizer and its settings."""

        def make() -> tuple[object, object, EngineConfig]:
            model = self.models[number if len(self.models) > 1 else 0]
            if not _is_name(model) and not hasattr(model, "parameters"):
                return model, self.tokenizer, self.config  # a scripted model, which needs no device
            from penstock.models import copies

            is_copy = number > 0 and len(self.models) == 1 and not _is_name(model)
            device = self._device(number, model, is_copy=is_copy)
            if not is_copy and not _is_name(model) and self.devices is not None:
                copies.check_device(model, device)  # type: ignore[arg-type]  # a module
            num_sharing = self.count if device == "cpu" else (self.devices or ()).count(device)
            config = copies.config_of_replica(self.config, device, num_sharing)
            return copies.copy_of(model, device) if is_copy else model, self.tokenizer, config  # type: ignore[arg-type]

        return make

    def followed(self, number: int) -> WeightSource:
        """The weights that a replica takes over from the owner's module; None for that module, or without one."""
        if (owner := self.owner) is None or (number == 0 and len(self.models) == 1):
            return None
        if len(self.models) > 1 and self.models[number] is owner:
            return None
        from penstock.models.copies import weights_to_follow

        return weights_to_follow(owner)  # type: ignore[arg-type]  # a module

    def _device(self, number: int, model: object, *, is_copy: bool) -> str:
        from penstock.models import copies

        if self.devices is not None:
            return self.devices[number]
        if is_copy:
            return copies.device_of_copy(model, number, self.count)  # type: ignore[arg-type]  # a module
        if not _is_name(model):
            return copies.device_of(model)  # type: ignore[arg-type]  # a module
        return copies.device_of_replica(number, self.count, self.config.device)


def _is_name(model: object) -> bool:
    return model is None or isinstance(model, str | Path)


def _count(replicas: object) -> int:
    try:
        return integer("replicas", replicas, 1, MAX_REPLICAS, f"an integer from 1 to {MAX_REPLICAS}")
    except ValueError as error:
        raise ConfigurationError(text_of(error)) from None


def _device_names(devices: object) -> tuple[str, ...]:
    if isinstance(devices, list | tuple) and all(isinstance(device, str) for device in devices):
        return tuple(map(str, devices))
    raise ConfigurationError(f"devices must be a list with the device of each replica, not {shown(devices)}")
