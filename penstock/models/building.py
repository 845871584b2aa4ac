"""A module from a checkpoint without any of the process-wide switches that `from_pretrained` throws: `build`.

The structure is made on the meta device under defaults of this thread alone; tensors are mapped from the files, renamed
and converted by transformers' own rules; buffers that no file holds are computed as transformers computes them. Nothing
is drawn at random and no default, class or function of the process is replaced. Called by `reading`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from penstock.errors import text_of
from penstock.models.checkpoint import Architecture, Checkpoint, stored_dtype, tensors_of
from penstock.models.completeness import Findings
from penstock.models.pinning import PinnedDefaults


def build(checkpoint: Checkpoint, dtype: torch.dtype | str) -> tuple[nn.Module, Findings]:
    """The module on the CPU in `dtype` ("auto": the checkpoint's own), and what does not fit.

    With fatal findings some parameters are on the meta device still: such a module is to be refused.
    """
    model, tensors = checkpoint.architecture, tensors_of(checkpoint)
    precision = dtype if isinstance(dtype, torch.dtype) else stored_dtype(model.config, tensors)
    module = _structure(model, precision)
    findings = _fill(module, tensors, precision)
    if not findings.fatal:
        _compute_the_rest(module, findings.ignored)
    if module.can_generate():
        module.generation_config = _generation_config(model)
    return module.eval(), findings


def _structure(model: Architecture, dtype: torch.dtype) -> Any:
    config = copy.deepcopy(model.config)
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        if part is not None:
            part.dtype = dtype
    with _Constructing(dtype, "meta"):
        return model.model_class(config)


class _Constructing(PinnedDefaults):
    """Constructors initialise nothing: what they would write is read from a file, or computed later."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", "") in ("torch.nn.init", "transformers.initialization"):
            return args[0] if args else next(iter((kwargs or {}).values()))
        return super().__torch_function__(func, types, args, kwargs)


class _Completing(PinnedDefaults):
    """`_init_weights` writes only what no file holds.

    `constant_` is recognised by its arguments: what arrives here is whatever a loader has put in its place.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if kwargs is not None and kwargs.keys() == {"tensor", "val"}:
            func, args, kwargs = Tensor.fill_, (kwargs["tensor"], kwargs["val"]), None
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place and args and getattr(args[0], "_is_hf_initialized", False):
            return args[0]
        return super().__torch_function__(func, types, args, kwargs)


def _fill(module: Any, tensors: dict[str, Tensor], dtype: torch.dtype) -> Findings:
    """Put every tensor in its place, in the dtype that the structure asks for, and tie what is tied."""
    findings = Findings(missing=set(module.state_dict()))
    for name, value in _converted(module, tensors, _dtypes(module, dtype), findings):
        _put(module, name, value, findings)
    _tie(module, findings.missing)
    findings.ignore(*_ignored_patterns(module))
    return findings


def _converted(
    module: Any, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], findings: Findings
) -> Iterator[tuple[str, Tensor]]:
    """(name in the module, value) of all tensors that have a place there, by transformers' rules for renaming."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(module)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix, places = module.base_model_prefix, module.state_dict()
    gathered: dict[str, Any] = {}
    for source in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(source, renamings, converters, prefix, places)
        if name not in places and source in places:
            name, pattern = rename_source_key(source, [], [], prefix, places)
        if name not in places:
            findings.unexpected.append(source)
        elif pattern is None:
            yield name, tensors[source].to(dtypes[name])
        else:
            rule = gathered.setdefault(name, copy.deepcopy(by_pattern[pattern]))
            rule.add_tensor(name, source, pattern, partial(tensors[source].to, dtypes[name]))
    yield from _merged(module, gathered, findings)


def _merged(module: Any, gathered: dict[str, Any], findings: Findings) -> Iterator[tuple[str, Tensor]]:
    """What converters make of the tensors that they gathered (all experts of a layer become one tensor, say)."""
    while gathered:
        first, rule = gathered.popitem()
        try:
            values = rule.convert(first, model=module, config=module.config)
        except Exception as error:
            findings.failed[first] = text_of(error)
            continue
        for name, value in values.items():
            yield name, value[0] if isinstance(value, list) else value


def _dtypes(module: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype of every entry of the state dict: the structure's, or float32 where the model demands that."""
    from transformers.core_model_loading import build_glob_alternation

    dtypes = {name: place.dtype for name, place in module.state_dict().items()}
    plan = module._get_dtype_plan(dtype)
    if plan:
        pattern, plan_keys, _ = build_glob_alternation(list(plan))
        for name in dtypes:
            if match := pattern.search(name):
                dtypes[name] = plan[plan_keys[str(match.lastgroup)]]
    return dtypes


def _put(module: nn.Module, name: str, value: Tensor, findings: Findings) -> None:
    """Into the module's own dictionaries: `setattr` would ask `register_parameter`, which other loaders replace."""
    path, _, leaf = name.rpartition(".")
    part = module.get_submodule(path)
    place = part._parameters.get(leaf, part._buffers.get(leaf))
    findings.missing.discard(name)
    if place is None:
        findings.unexpected.append(name)
    elif place.shape != value.shape:
        findings.mismatched[name] = tuple(value.shape), tuple(place.shape)
    elif leaf in part._parameters:
        part._parameters[leaf] = _read(nn.Parameter(value, requires_grad=value.is_floating_point()))
    else:
        part._buffers[leaf] = _read(value)


def _read(value: Any) -> Any:
    """Marked for `_init_weights`: nothing to initialise."""
    value._is_hf_initialized = True
    return value


def _tie(module: Any, missing: set[str]) -> None:
    """Let tied parameters be one. Whichever the file holds counts; two that differ stay apart.

    Not by `tie_weights`, which `from_pretrained` replaces for the whole process while it loads.
    """
    ties: dict[str, str] = module.all_tied_weights_keys
    for target, source in list(ties.items()):
        group = (source, target, *(other for other, origin in ties.items() if origin == source))
        held = [name for name in group if name not in missing]
        if not held:
            continue
        if source in held and target in held and not _same(module, source, target):
            del ties[target]
            continue
        parameter = module.get_parameter(held[0])
        for name in (source, target):
            path, _, leaf = name.rpartition(".")
            module.get_submodule(path)._parameters[leaf] = parameter
            missing.discard(name)


def _same(module: Any, one: str, other: str) -> bool:
    first, second = module.get_parameter(one), module.get_parameter(other)
    return first.data_ptr() == second.data_ptr() or torch.equal(first, second)


def _ignored_patterns(module: Any) -> tuple[list[str], list[str]]:
    """Patterns of names that may be missing, and of names that old files hold beyond what is used."""
    buffers = [name for name, _ in module.named_buffers()]
    old = [r"rotary_emb\.inv_freq"] if any(name.endswith("rotary_emb.inv_freq") for name in buffers) else []
    old += [r"(^|\.)position_ids$"] if any(name.endswith("position_ids") for name in buffers) else []
    return list(module._keys_to_ignore_on_load_missing or ()), [
        *(module._keys_to_ignore_on_load_unexpected or ()),
        *old,
    ]


def _compute_the_rest(module: Any, names: Iterable[str]) -> None:
    """Buffers that are in no file, and the entries `names`, which may be missing: as transformers initialises them."""
    for name in [*names, *(name for name, _ in module.named_non_persistent_buffers())]:
        path, _, leaf = name.rpartition(".")
        part = module.get_submodule(path)
        places: dict[str, Any] = part._parameters if leaf in part._parameters else part._buffers
        places[leaf] = torch.empty_like(places[leaf], device="cpu")
    with torch.no_grad(), _Completing(torch.float32):
        _initialise(module, module)
    left = [name for name, value in (*module.named_parameters(), *module.named_buffers()) if value.is_meta]
    if left:
        raise RuntimeError(f"nothing was read or computed for {left[0]}")


def _initialise(part: nn.Module, owner: Any) -> None:
    """`_init_weights` of the nearest model above each module, children first."""
    from transformers import PreTrainedModel

    for child in part.children():
        _initialise(child, child if isinstance(child, PreTrainedModel) else owner)
    owner._init_weights(part)


def _generation_config(model: Architecture) -> Any:
    """The file's, or one made of the defaults that old models keep in their config."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(model.source, **model.hub)
    except OSError:
        return GenerationConfig.from_pretrained(
            model.source, config_file_name="config.json", _from_model_config=True, **model.hub
        )
