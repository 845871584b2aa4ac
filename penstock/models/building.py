"""Builds a module from a checkpoint and, unlike `from_pretrained`, changes no setting of the process: `build`.

The structure is made on the meta device under defaults of this thread alone; tensors are mapped from the files, renamed
and converted by transformers' own rules; buffers that no file holds are computed as transformers computes them. Nothing
is drawn at random and no default, class or function of the process is replaced. Called by `reading`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from penstock.errors import text_of
from penstock.models.checkpoint import Architecture, Checkpoint, stored_dtype, tensors_of
from penstock.models.completeness import Findings
from penstock.models.pinning import PinnedDefaults

T = TypeVar("T", bound=Tensor)


def build(checkpoint: Checkpoint, dtype: torch.dtype | str) -> tuple[nn.Module, Findings]:
    """The module on the CPU in `dtype` ("auto": the checkpoint's own), and what does not fit.

    With fatal findings some parameters are still on the meta device: such a module must be refused.
    """
    architecture, tensors = checkpoint.architecture, tensors_of(checkpoint)
    precision = dtype if isinstance(dtype, torch.dtype) else stored_dtype(architecture.config, tensors)
    module = _structure(architecture, precision)
    findings = _load(module, tensors, precision)
    if not findings.fatal:
        _initialize_missing(module, findings.ignored)
    if module.can_generate():
        module.generation_config = _generation_config(architecture)
    return module.eval(), findings


def _structure(architecture: Architecture, dtype: torch.dtype) -> PreTrainedModel:
    config = copy.deepcopy(architecture.config)
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        if part is not None:
            part.dtype = dtype
    with _WithoutInitialization(dtype, "meta"):
        return architecture.model_class(config)


class _WithoutInitialization(PinnedDefaults):
    """Constructors initialize nothing: what they would write is read from a file, or computed later."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if getattr(func, "__module__", "") in ("torch.nn.init", "transformers.initialization"):
            return args[0] if args else next(iter((kwargs or {}).values()))
        return super().__torch_function__(func, types, args, kwargs)


class _InitializingMissing(PinnedDefaults):
    """`_init_weights` writes only what no file holds.

    `constant_` is recognized by its arguments, since a loader in another thread may have replaced the function.
    """

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if kwargs is not None and kwargs.keys() == {"tensor", "val"}:
            func, args, kwargs = Tensor.fill_, (kwargs["tensor"], kwargs["val"]), None
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place and args and getattr(args[0], "_is_hf_initialized", False):
            return args[0]
        return super().__torch_function__(func, types, args, kwargs)


def _load(module: PreTrainedModel, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Findings:
    """Put every tensor in its place, in the dtype that the structure asks for, and tie what is tied."""
    findings = Findings(missing=set(module.state_dict()))
    for name, value in _converted(module, tensors, _dtypes(module, dtype), findings):
        _put(module, name, value, findings)
    _tie(module, findings.missing)
    findings.ignore(*_ignored_patterns(module))
    return findings


def _converted(
    module: PreTrainedModel, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], findings: Findings
) -> Iterator[tuple[str, Tensor]]:
    """(name in the module, value) of all tensors that have a place there, by transformers' rules for renaming."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(module)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix, places = module.base_model_prefix, module.state_dict()
    conversions: dict[str, WeightConverter] = {}
    for source in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(source, renamings, converters, prefix, places)
        if name not in places and source in places:
            name, pattern = rename_source_key(source, [], [], prefix, places)
        if name not in places:
            findings.unexpected.append(source)
        elif pattern is None:
            yield name, tensors[source].to(dtypes[name])
        else:
            conversion = conversions.setdefault(name, copy.deepcopy(by_pattern[pattern]))
            tensor = partial(tensors[source].to, dtypes[name])  # transformers calls it, or waits for a future
            conversion.add_tensor(name, source, pattern, tensor)  # type: ignore[arg-type]
    while conversions:  # for instance, all experts of a layer become one tensor
        name, conversion = conversions.popitem()
        try:
            values = conversion.convert(name, model=module, config=module.config)
        except Exception as error:
            findings.failed[name] = text_of(error)
            continue
        for target, value in values.items():
            yield target, value[0] if isinstance(value, list) else value


def _dtypes(module: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype of every entry of the state dict: the structure's, or float32 where the model demands that."""
    return {name: place.dtype for name, place in module.state_dict().items()} | dtype_exceptions(module, dtype)


def dtype_exceptions(module: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The entries of the state dict that have another dtype where the model's is `dtype`, by transformers' rules."""
    from transformers.core_model_loading import build_glob_alternation

    plan = cast(PreTrainedModel, module)._get_dtype_plan(dtype) if hasattr(module, "_get_dtype_plan") else {}
    if not plan:
        return {}
    pattern, plan_keys, _ = build_glob_alternation(list(plan))
    matches = ((name, pattern.search(name)) for name in module.state_dict())
    return {name: plan[plan_keys[str(match.lastgroup)]] for name, match in matches if match}


def _put(module: nn.Module, name: str, value: Tensor, findings: Findings) -> None:
    """Write into the module's own dictionaries: `setattr` calls `register_parameter`, which other loaders replace."""
    path, _, leaf = name.rpartition(".")
    part = module.get_submodule(path)
    place = part._parameters.get(leaf, part._buffers.get(leaf))
    findings.missing.discard(name)
    if place is None:
        findings.unexpected.append(name)
    elif place.shape != value.shape:
        findings.mismatched[name] = tuple(value.shape), tuple(place.shape)
    elif leaf in part._parameters:
        part._parameters[leaf] = _marked(nn.Parameter(value, requires_grad=value.is_floating_point()))
    else:
        part._buffers[leaf] = _marked(value)


def _marked(value: T) -> T:
    """The tensor, marked for `_init_weights` as needing no initialization."""
    value._is_hf_initialized = True  # type: ignore[attr-defined]
    return value


def _tie(module: PreTrainedModel, missing: set[str]) -> None:
    """Make tied parameters one. Whichever the file holds is used; two that differ stay apart.

    Not by `tie_weights`, which `from_pretrained` replaces for the whole process while it loads.
    """
    ties: dict[str, str] = module.all_tied_weights_keys
    for target, source in list(ties.items()):
        group = (source, target, *(name for name, origin in ties.items() if origin == source))
        loaded = [name for name in group if name not in missing]
        if not loaded:
            continue
        if source in loaded and target in loaded and not _equal(module, source, target):
            del ties[target]
            continue
        parameter = module.get_parameter(loaded[0])
        for name in (source, target):
            path, _, leaf = name.rpartition(".")
            module.get_submodule(path)._parameters[leaf] = parameter
            missing.discard(name)


def _equal(module: nn.Module, name: str, other_name: str) -> bool:
    left, right = module.get_parameter(name), module.get_parameter(other_name)
    return left.data_ptr() == right.data_ptr() or torch.equal(left, right)


def _ignored_patterns(module: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Patterns of names that may be missing, and of names that old files hold although nothing uses them."""
    buffers = [name for name, _ in module.named_buffers()]
    unused = list(module._keys_to_ignore_on_load_unexpected or ())
    unused += [r"rotary_emb\.inv_freq"] if any(name.endswith("rotary_emb.inv_freq") for name in buffers) else []
    unused += [r"(^|\.)position_ids$"] if any(name.endswith("position_ids") for name in buffers) else []
    return list(module._keys_to_ignore_on_load_missing or ()), unused


def _initialize_missing(module: PreTrainedModel, names: Iterable[str]) -> None:
    """Compute buffers that are in no file, and the entries `names`, which may be missing, as transformers does."""
    for name in [*names, *(name for name, _ in module.named_non_persistent_buffers())]:
        path, _, leaf = name.rpartition(".")
        part = module.get_submodule(path)
        if leaf in part._parameters:
            empty = torch.empty_like(part.get_parameter(leaf), device="cpu")
            part._parameters[leaf] = nn.Parameter(empty, requires_grad=empty.is_floating_point())
        else:
            part._buffers[leaf] = torch.empty_like(part.get_buffer(leaf), device="cpu")
    with torch.no_grad(), _InitializingMissing(torch.float32):
        _initialize(module, module)
    tensors = (*module.named_parameters(), *module.named_buffers())
    uninitialized = [name for name, value in tensors if value.is_meta]
    if uninitialized:
        raise RuntimeError(f"nothing was read or computed for {uninitialized[0]}")


def _initialize(part: nn.Module, owner: PreTrainedModel) -> None:
    """Call `_init_weights` of the nearest model above each module, children first."""
    for child in part.children():
        _initialize(child, child if isinstance(child, PreTrainedModel) else owner)
    owner._init_weights(part)


def _generation_config(architecture: Architecture) -> GenerationConfig:
    """The file's, or one made of the defaults that old models keep in their config."""
    source, hub = architecture.source, architecture.hub
    try:
        return GenerationConfig.from_pretrained(source, **hub)
    except OSError:
        return GenerationConfig.from_pretrained(source, config_file_name="config.json", _from_model_config=True, **hub)
