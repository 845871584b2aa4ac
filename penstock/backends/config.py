"""`BackendConfig`, and the settings of each kind of backend: read from mappings, YAML or JSON, and checked at once.

A kind of backend is a class of settings with an `open` method, under a name in `BACKEND_TYPES`. An unknown key is
refused with the nearest known one, and a key of another backend with the backend it belongs to.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from penstock.backends import sglang_process, vllm_process
from penstock.config import EngineConfig
from penstock.errors import ConfigurationError, shown, text_of
from penstock.training.backend import EngineBackend
from penstock.training.huggingface import HuggingFaceBackend
from penstock.training.sglang import SGLangBackend
from penstock.training.vllm import VLLMBackend
from penstock.values import integer, real

CONFIGS = Path(__file__).with_name("configs")  # a file of defaults for each kind
_DTYPES = (None, "auto", "float32", "float16", "bfloat16")
_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
_LARGEST = 1 << 20


@dataclass(frozen=True, slots=True)
class HuggingFaceBackendConfig:
    """A transformers model, served by this package's engine in this process.

    `device`: "cpu", "cuda", "cuda:1"; None finds a GPU if there is one. `torch_dtype`: "float32", "float16",
    "bfloat16"; None is the checkpoint's. `device_map`, a strategy or a mapping, overrides `device`; every strategy puts
    the whole model on one device. `num_gpus` replicas of the model share the requests, each on a GPU of its own; with
    `device="cpu"`, that many on the CPU. `tp_size` above 1 is refused, after the check that it divides `num_gpus`.
    `options` are further settings of `EngineConfig`.
    """

    name: ClassVar[str] = "huggingface"

    device: str | None = None
    torch_dtype: str | None = None
    device_map: str | Mapping[str, str | int] | None = None
    tp_size: int | None = None
    num_gpus: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.torch_dtype not in _DTYPES:
            raise ConfigurationError(f"torch_dtype={shown(self.torch_dtype)}: use float32, float16, bfloat16 or null")
        _check_count("tp_size", self.tp_size)
        _check_count("num_gpus", self.num_gpus)
        self._check_parallel(self.tp_size or 1, self.num_gpus or 1)
        _mapping("options", self.options)
        if taken := {"device", "dtype"} & self.options.keys():
            raise ConfigurationError(
                f"{min(taken)} does not belong into options: set device or torch_dtype beside them"
            )
        EngineConfig(**self._settings())

    def check_available(self) -> None:
        """It is always there."""

    def open(self, model: str | None) -> EngineBackend:
        """Loads the model. Raises `ConfigurationError`, also where there are too few GPUs, and `OutOfMemory`."""
        from penstock.training.tensors import has_gpu

        count, settings = self.num_gpus or 1, self._settings()
        if count > 1 and settings["device"] == "auto" and not has_gpu():
            raise ConfigurationError(f"num_gpus={count}, and there is no GPU: device='cpu' makes {count} on the CPU")
        return HuggingFaceBackend(model, replicas=count, **settings)

    def _settings(self) -> dict[str, Any]:
        device = _device_of(self.device_map) if self.device_map is not None else self.device
        return {**self.options, "device": "auto" if device is None else device, "dtype": self.torch_dtype or "auto"}

    def _check_parallel(self, tp_size: int, num_gpus: int) -> None:
        if self.num_gpus is not None and num_gpus % tp_size:
            raise ConfigurationError(f"num_gpus={num_gpus} is not divisible by tp_size={tp_size}")
        if tp_size > 1:
            raise ConfigurationError(
                f"tp_size={tp_size}: this engine runs each copy of the model on one device; to split a model, use "
                "backend_type 'vllm' with tensor_parallel_size; for copies of it, num_gpus"
            )
        device = str(_device_of(self.device_map) if self.device_map is not None else self.device or "auto")
        if num_gpus > 1 and device not in ("auto", "cpu", "cuda"):
            raise ConfigurationError(f"device {device} is one device, for num_gpus={num_gpus}: use 'cuda', or 'cpu'")


@dataclass(frozen=True, slots=True)
class VLLMBackendConfig:
    """vLLM, in processes of its own.

    `tensor_parallel_size`: number of GPUs for one copy of the model, 1 by default. `gpu_memory_utilization`: fraction
    of the memory of each, 0.9 by default. `max_model_len`: tokens of the longest sequence; None is the model's.
    `options` are further fields of vLLM's `AsyncEngineArgs`; `logprobs_mode` is "raw_logits", which logits need.
    """

    name: ClassVar[str] = "vllm"

    tensor_parallel_size: int | None = None
    gpu_memory_utilization: float | None = None
    max_model_len: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_count("tensor_parallel_size", self.tensor_parallel_size)
        _check_fraction("gpu_memory_utilization", self.gpu_memory_utilization)
        _check_count("max_model_len", self.max_model_len)
        _check_options(self.options, "tensor_parallel_size", "gpu_memory_utilization", "max_model_len")
        if self.options.get("logprobs_mode", "raw_logits") != "raw_logits":
            raise ConfigurationError('logprobs_mode is "raw_logits" here, which logits need: leave it out of options')

    def check_available(self) -> None:
        """Raises `PackageMissing` without vLLM."""
        vllm_process.check_options(self.options)

    def open(self, model: str | None) -> EngineBackend:
        """Starts vLLM. Raises `ConfigurationError`, also for options that vLLM does not know."""
        settings: dict[str, Any] = {
            "tensor_parallel_size": self.tensor_parallel_size or 1,
            "gpu_memory_utilization": 0.9 if self.gpu_memory_utilization is None else self.gpu_memory_utilization,
            "logprobs_mode": "raw_logits",
        }
        if self.max_model_len is not None:
            settings["max_model_len"] = self.max_model_len
        return VLLMBackend(model, **{**settings, **self.options})


@dataclass(frozen=True, slots=True)
class SGLangBackendConfig:
    """SGLang, in processes of its own.

    `tp_size`: number of GPUs for one copy of the model, 1 by default. `mem_fraction_static`: fraction of the memory of
    each for weights and K/V, 0.85 by default. `context_length`: tokens of the longest sequence; None is the model's.
    `options` are further fields of SGLang's `ServerArgs`.
    """

    name: ClassVar[str] = "sglang"

    tp_size: int | None = None
    mem_fraction_static: float | None = None
    context_length: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_count("tp_size", self.tp_size)
        _check_fraction("mem_fraction_static", self.mem_fraction_static)
        _check_count("context_length", self.context_length)
        _check_options(self.options, "tp_size", "mem_fraction_static", "context_length")

    def check_available(self) -> None:
        """Raises `PackageMissing` without SGLang."""
        sglang_process.check_options(self.options)

    def open(self, model: str | None) -> EngineBackend:
        """Starts SGLang. Raises `ConfigurationError`, also for options that SGLang does not know."""
        settings: dict[str, Any] = {
            "tp_size": self.tp_size or 1,
            "mem_fraction_static": 0.85 if self.mem_fraction_static is None else self.mem_fraction_static,
        }
        if self.context_length is not None:
            settings["context_length"] = self.context_length
        return SGLangBackend(model, **settings, **self.options)


BACKEND_TYPES: Mapping[str, type[Any]] = {
    "huggingface": HuggingFaceBackendConfig,
    "native": HuggingFaceBackendConfig,
    "vllm": VLLMBackendConfig,
    "sglang": SGLangBackendConfig,
}


@dataclass(frozen=True, slots=True)
class BackendConfig:
    """Which backend, with which model and settings. `model_name` of None is the model of this package.

    `backend_config` is the class of settings of `backend_type`, by default with its defaults. Raises
    `ConfigurationError`, a `ValueError`.
    """

    backend_type: str = "huggingface"
    model_name: str | None = None
    backend_config: Any = None

    def __post_init__(self) -> None:
        if self.backend_type not in BACKEND_TYPES:
            known = ", ".join(map(repr, BACKEND_TYPES))
            raise ConfigurationError(f"there is no backend_type {shown(self.backend_type)}: use {known}")
        if self.model_name is not None and not isinstance(self.model_name, str):
            raise ConfigurationError(f"model_name must be a name, a folder or null, not {shown(self.model_name)}")
        kind = BACKEND_TYPES[self.backend_type]
        if self.backend_config is None:
            object.__setattr__(self, "backend_config", kind())
        elif not isinstance(self.backend_config, kind):
            found = type(self.backend_config).__name__
            raise ConfigurationError(f"backend_type {self.backend_type!r} takes a {kind.__name__}, not a {found}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From the keys `backend_type`, `model_name` and `backend_specific`, a mapping of the backend's settings."""
        values = _mapping("the config of a backend", values)
        _check_keys("the config of a backend", values, ("backend_type", "model_name", "backend_specific"))
        config = cls(values.get("backend_type", "huggingface"), values.get("model_name"))
        specific = _mapping("backend_specific", values.get("backend_specific") or {})
        kind = BACKEND_TYPES[config.backend_type]
        _check_keys(f"backend_specific of {config.backend_type}", specific, [each.name for each in fields(kind)])
        return cls(config.backend_type, config.model_name, kind(**specific))

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """From a YAML file, or from JSON. Defaults of every kind are in `CONFIGS`."""
        import yaml

        try:
            text = Path(path).read_text(encoding="utf-8")
            values = json.loads(text) if Path(path).suffix == ".json" else yaml.safe_load(text)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigurationError(f"cannot read the configuration {path}: {text_of(error)}") from error
        return cls.from_dict({} if values is None else values)

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` makes an equal config from."""
        names = {"backend_type": self.backend_type, "model_name": self.model_name}
        return {**names, "backend_specific": asdict(self.backend_config)}


def _mapping(name: str, values: object) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ConfigurationError(f"{name} must be a mapping, not {shown(values)}")
    return {str(key): value for key, value in values.items()}


def _check_options(options: object, *settings: str) -> None:
    """Raises `ConfigurationError` for no mapping, and for a setting that has a place of its own."""
    if taken := _mapping("options", options).keys() & {"model", "model_name"}:
        raise ConfigurationError(f"{min(taken)} does not belong into options: the model is model_name of the config")
    if misplaced := _mapping("options", options).keys() & set(settings):
        raise ConfigurationError(f"{min(misplaced)} does not belong into options: set it beside them")


def _check_keys(place: str, values: Mapping[str, object], known: Any) -> None:
    """Raises `ConfigurationError` for a key that is not known here."""
    for key in sorted(values.keys() - set(known)):
        matches = difflib.get_close_matches(key, known, n=1)
        owners = [name for name, kind in BACKEND_TYPES.items() if key in (each.name for each in fields(kind))]
        hint = f": it is one of backend_specific of {' and '.join(owners)}" if owners else ""
        raise ConfigurationError(
            f"{place} has no key {key!r}{hint}; "
            + (f"did you mean {matches[0]!r}?" if matches else f"its keys are {', '.join(known)}")
        )


def _device_of(device_map: object) -> str:
    """The device of a map that has only one."""
    if isinstance(device_map, Mapping):
        devices = {f"cuda:{place}" if isinstance(place, int) else str(place) for place in device_map.values()}
        if len(devices) == 1:
            return devices.pop()
        raise ConfigurationError(
            f"device_map names {len(devices)} devices: this engine runs on one; use 'vllm' for more"
        )
    if not isinstance(device_map, str):
        raise ConfigurationError(f"device_map must be a strategy or a mapping, not {shown(device_map)}")
    return "auto" if device_map in _STRATEGIES else device_map


def _check_count(name: str, value: object) -> None:
    if value is not None:
        _check(integer, name, value, 1, _LARGEST)


def _check_fraction(name: str, value: object) -> None:
    if value is not None:
        _check(real, name, value, 1e-6, 1.0, "a number above 0 and at most 1")


def _check(check: Any, *arguments: Any) -> None:
    """Run a check of `penstock.values`. Raises `ConfigurationError` for what it refuses."""
    try:
        check(*arguments)
    except ValueError as error:
        raise ConfigurationError(text_of(error)) from None
