"""`ServiceConfig`: the part of a config that a service client reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from penstock.backends.services.reading import read_section
from penstock.errors import ConfigurationError, shown
from penstock.values import flag, integer, real

SECTION = "inference_service"


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """The section `inference_service`, and `temperature` from beside it; both are defaults of each call.

    `max_retries` counts repetitions. `model_tag` (also `identifier`) names the gate of the weight sync. `tool_parser`
    and `reasoning_parser` are names of `penstock.tools` formats. With `train_record=False` a client asks for nothing
    that only RL needs, and its responses have no `nexrl_train`: for servers that know no token ids.
    """

    model: str = ""
    backend: str = "openai"
    base_url: str = ""
    api_key: str = ""
    tokenizer: str = ""
    max_tokens: int = 2048
    max_retries: int = 10
    freeze_for_weight_sync: bool = True
    model_tag: str = "default"
    identifier: str = ""
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    parse_tool_call_arguments: bool = True
    train_record: bool = True
    temperature: float = 1.0

    @property
    def tokenizer_path(self) -> str:
        """Where the tokenizer is; the model's name if the config does not say."""
        return self.tokenizer or self.model

    @property
    def tag(self) -> str:
        """The model tag, under either name."""
        return self.identifier or self.model_tag


@dataclass(frozen=True, slots=True)
class _Defaults:
    """What is read from beside the section."""

    temperature: float = 1.0


def read_config(config: Mapping[str, object]) -> ServiceConfig:
    """The config of a client, from a mapping or a `DictConfig`. Raises `ConfigurationError`."""
    values = read_section(config, SECTION, ServiceConfig)
    if SECTION in config and "temperature" in values:
        raise ConfigurationError(f"temperature belongs beside {SECTION}, not into it: move it to the top level")
    values |= read_section(config, "", _Defaults)
    if not values.get("model"):
        raise ConfigurationError(f"{SECTION}.model is missing: name the model to call")
    try:
        return ServiceConfig(**{name: _checked(name, value) for name, value in values.items()})  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigurationError(f"{SECTION}: {error}") from None


def _checked(name: str, value: object) -> object:
    if name in ("max_tokens", "max_retries"):
        return integer(name, value, 1 if name == "max_tokens" else 0)
    if name == "temperature":
        return real(name, value, 0.0, 100.0, "a number >= 0")
    if name in ("freeze_for_weight_sync", "parse_tool_call_arguments", "train_record"):
        return flag(name, value)
    if not isinstance(value, str):
        raise ConfigurationError(f"{SECTION}.{name} must be a string, not {shown(value)}")
    return value
