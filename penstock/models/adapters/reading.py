"""`read_adapter`: the matrices of a LoRA adapter, from a folder that peft wrote or from a live module with its layers.

Changes nothing, and copies nothing of a live module. What the engine does not apply is refused by its name in peft's
config. Called by the stores of adapters, off the model's thread.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from penstock.errors import WeightsError, described, shown
from penstock.kernels.native import FLOATS
from penstock.models.watch import is_adapter_layer
from penstock.models.wrappers import name_before_compiling

PREFIX = "base_model.model."  # of names inside a `PeftModel`

# Fields of peft's config -> the values with which the adapter is a plain one. What is not here changes training, or the
# choice of the layers, which shows in the names of the matrices.
_PLAIN: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None,),
    "megatron_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "lora_bias": (False, None),
}
# These change the weights of the base model itself.
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
_KEY = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """What an adapter adds to one linear layer: scaling * b [N, r] @ a [r, K], of any floating dtype."""

    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True, slots=True)
class Adapter:
    """The matrices of an adapter by the name of the layer in the base model."""

    layers: Mapping[str, LoraLayer]

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(len(layer.a) for layer in self.layers.values())


def read_adapter(source: object, name: str) -> Adapter:
    """The adapter in a folder, or in a live module: the one called `name`, or its only one. Raises `WeightsError`."""
    if isinstance(source, nn.Module):
        adapted = {plain_name(path): part for path, part in adapter_layers(source)}
        layers = dict(_live_layers(source, adapted, _name_in(adapted, name)))
    elif isinstance(source, str | PathLike):
        layers = _read_folder(Path(source))
    else:
        raise WeightsError(
            f"an adapter cannot come from a {type(source).__name__}: pass a folder that peft wrote, or a live module "
            "with peft's adapters"
        )
    if not layers:
        raise WeightsError("the adapter has no LoRA matrices")
    return Adapter(layers)


def not_finite(path: str) -> WeightsError:
    """The error for an adapter whose matrices of this layer have a NaN or an infinity."""
    return WeightsError(f"the adapter's matrices of {path} are not finite")


def adapter_layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers of peft inside a module, by their names. A tenth of what they consist of is looked at."""
    for name, part in module._modules.items():
        if part is None:
            continue
        path = f"{prefix}{name}"
        if is_adapter_layer(part):
            yield path, part
            inner = part._modules.get("base_layer")
            if inner is not None and inner._modules:
                yield from adapter_layers(inner, f"{path}.base_layer.")
        else:
            yield from adapter_layers(part, f"{path}.")


def plain_name(name: str) -> str:
    """The name of a module as it is in the base model alone."""
    return name_before_compiling(name).removeprefix(PREFIX)


def _layer(path: str, a: Tensor, b: Tensor, scaling: float) -> LoraLayer:
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise WeightsError(
            f"the adapter's matrices of {path} have the shapes {list(a.shape)} and {list(b.shape)}: only linear layers "
            "can have adapters"
        )
    if a.dtype not in FLOATS or b.dtype not in FLOATS or a.is_meta or b.is_meta:
        raise WeightsError(
            f"the adapter's matrices of {path} are {a.dtype} on {a.device}: a floating dtype of up to 32 bits is "
            "needed, in memory"
        )
    return LoraLayer(a.detach(), b.detach(), scaling)


def _check_config(config: Mapping[str, Any]) -> None:
    for field, plain in _PLAIN.items():
        if field in config and config[field] not in plain:
            raise WeightsError(
                f"adapters with {field}={shown(config[field])} are not supported: train a plain LoRA adapter, or "
                "merge this one into its base model and load that"
            )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_BASE_CHANGING):
        raise WeightsError(
            f"adapters with init_lora_weights={init!r} belong to a base model with other weights: save it with "
            "path_initial_model_for_weight_conversion=..."
        )


# A live module.


def _name_in(adapted: Mapping[str, nn.Module], name: str) -> str:
    """The name that the adapter has in the module. Raises `WeightsError`."""
    layers = adapted.values()
    names: list[str] = sorted({key for layer in layers for key in (*_keys(layer, "lora_A"), *_contents(layer))})
    if name in names:
        return name
    if len(names) == 1:
        return names[0]
    there = f"its adapters are {', '.join(names)}" if names else "it has no LoRA adapters"
    raise WeightsError(f"the live module has no adapter {name!r}: {there}")


def _contents(layer: nn.Module) -> list[str]:
    """The names of the adapters of another kind than LoRA matrices."""
    return [key for field in ("lora_embedding_A", "modules_to_save") for key in _keys(layer, field)]


def _keys(layer: nn.Module, field: str) -> Collection[str]:
    """The names of the adapters in one of a layer's dictionaries. The attributes of a module are slow to look up."""
    return cast(Mapping[str, object], layer._modules.get(field) or {}).keys()


def _live_layers(module: nn.Module, adapted: Mapping[str, nn.Module], name: str) -> Iterator[tuple[str, LoraLayer]]:
    config = getattr(module, "peft_config", {}).get(name)
    if config is not None:
        _check_config(vars(config) | {"peft_type": getattr(config.peft_type, "value", config.peft_type)})
    for path, layer in adapted.items():
        if name in _contents(layer):
            raise WeightsError(f"the adapter {name!r} has an embedding at {path}: only linear layers can have adapters")
        if name not in _keys(layer, "lora_A"):
            continue
        if name in (variants := vars(layer).get("lora_variant", {})):
            kind = type(variants[name]).__name__
            raise WeightsError(f"the adapter {name!r} is a {kind} at {path}, which is not supported: use plain LoRA")
        yield path, _live_layer(path, layer, name)


def _live_layer(path: str, layer: Any, name: str) -> LoraLayer:
    """`layer` is a layer of peft, which this package does not import."""
    a, b = (layer._modules[field]._modules[name] for field in ("lora_A", "lora_B"))
    if b._parameters.get("bias") is not None:
        raise WeightsError(f"adapters with lora_bias=True are not supported, and {path} has one: train without it")
    return _layer(path, _weight_of(a), _weight_of(b), layer.scaling[name])


def _weight_of(part: Any) -> Tensor:
    weight = part._parameters.get("weight")
    return part.weight if weight is None else weight  # type: ignore[no-any-return]


# A folder.


def _read_folder(folder: Path) -> dict[str, LoraLayer]:
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
    except Exception as error:
        raise WeightsError(
            f"the adapter in {folder} cannot be read ({described(error)}): pass a folder with adapter_config.json and "
            "adapter_model.safetensors, as peft's save_pretrained writes it"
        ) from error
    if not isinstance(config, dict):
        raise WeightsError(f"{folder / 'adapter_config.json'} must hold an object, not {shown(config)}")
    _check_config(config)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise _not_a_matrix(key)
        pairs.setdefault(plain_name(match[1]), {})[match[2]] = tensor
    if half := next((path for path, pair in pairs.items() if len(pair) < 2), None):
        raise WeightsError(f"the adapter lacks one of the two matrices of {half}")
    return {path: _layer(path, pair["A"], pair["B"], _scaling(config, path, pair)) for path, pair in pairs.items()}


def _not_a_matrix(key: str) -> WeightsError:
    if ".base_layer." in key:  # peft saves the weight of a head or embedding that has an adapter
        remedy = "save it with save_pretrained(folder, save_embedding_layers=False)"
        return WeightsError(f"the adapter holds {key}, which is a weight of the base model: {remedy}")
    return WeightsError(f"the adapter holds {key}, and only LoRA matrices of linear layers are supported")


def _scaling(config: Mapping[str, Any], path: str, pair: Mapping[str, Tensor]) -> float:
    """alpha / r, or alpha / sqrt(r) with `use_rslora`, where the first pattern that fits the name decides alpha."""
    patterns, rank = config.get("alpha_pattern") or {}, len(pair["A"])
    try:
        fitting = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path))
        alpha = float(next(fitting, config.get("lora_alpha", 8)))
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (AttributeError, TypeError, ValueError, ZeroDivisionError, re.error) as error:
        settings = f"lora_alpha={shown(config.get('lora_alpha'))} and alpha_pattern={shown(patterns)}"
        raise WeightsError(
            f"the adapter's config has {settings}, which give no scaling for rank {rank} at {path} ({described(error)})"
        ) from error
