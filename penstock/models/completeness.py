"""Whether a checkpoint holds what its model needs: what was missing, of another shape, or left over (`Findings`).

transformers warns and serves random numbers instead; here such a model is refused, naming the tensors and the likely
cause. Called by `reading`, for both ways of loading. Knows names and shapes only.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from penstock.errors import ConfigurationError

NUM_NAMED = 3
# What wrappers put into the names of a module's parameters, and what they are.
_WRAPPERS = {
    "_orig_mod.": "a module compiled by torch.compile",
    "_fsdp_wrapped_module.": "an FSDP module",
    "_checkpoint_wrapped_module.": "a module with activation checkpointing",
    "module.": "a DataParallel or DeepSpeed module",
    "base_model.model.": "a peft module",
    "base_layer.": "a peft module",
}
Shapes = tuple[tuple[int, ...], tuple[int, ...]]  # in the file, in the model

log = logging.getLogger("penstock")


@dataclass(slots=True)
class Findings:
    """Names of the model that no file holds, tensors of the files that fit nowhere, and tensors that do not fit.

    `failed` are conversions that raised (name: error); `ignored` is what may be missing.
    """

    missing: set[str] = field(default_factory=set)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, Shapes] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)

    @property
    def fatal(self) -> bool:
        """Whether the model would compute with numbers that no file holds."""
        return bool(self.missing or self.mismatched or self.failed)

    def ignore(self, missing: Iterable[str], unexpected: Iterable[str]) -> None:
        """Set aside names that match patterns: those that may be missing, and those that old files hold."""
        self.ignored = {name for name in self.missing if _matches(missing, name)}
        self.missing -= self.ignored
        self.unexpected = [name for name in self.unexpected if not _matches(unexpected, name)]

    def check(self, source: str) -> None:
        """Raise `ConfigurationError` when `fatal`; log one warning about tensors that are left over."""
        if self.failed:
            name, error = next(iter(self.failed.items()))
            raise ConfigurationError(
                f"the checkpoint {source} does not fit its model: {len(self.failed)} tensors cannot be put together "
                f"({name}: {error}). Likely cause: an interrupted save; save or download it again"
            )
        if self.mismatched:
            raise ConfigurationError(f"the checkpoint {source} does not fit its model: {_of_shapes(self.mismatched)}")
        if self.missing:
            raise ConfigurationError(
                f"the checkpoint {source} lacks {_count(self.missing)} of its model ({_some(self.missing)}). "
                f"Likely cause: {_cause(self.missing, self.unexpected)}"
            )
        if self.unexpected:
            log.warning(
                "the checkpoint %s holds %s that its model has no place for (%s): they are not used",
                source,
                _count(self.unexpected),
                _some(self.unexpected),
            )


def findings_of(info: Mapping[str, Any]) -> Findings:
    """Of the report that `from_pretrained(output_loading_info=True)` gives."""
    mismatched = {name: (tuple(file), tuple(model)) for name, file, model in info.get("mismatched_keys") or ()}
    return Findings(set(info.get("missing_keys") or ()), sorted(info.get("unexpected_keys") or ()), mismatched)


def _matches(patterns: Iterable[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _count(names: Iterable[str]) -> str:
    count = sum(1 for _ in names)
    return f"{count} tensor{'s' if count != 1 else ''}"


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    rest = f" and {len(ordered) - NUM_NAMED} more" if len(ordered) > NUM_NAMED else ""
    return ", ".join(ordered[:NUM_NAMED]) + rest


def _of_shapes(mismatched: Mapping[str, Shapes]) -> str:
    named = [
        f"{name} is {list(file)} in the file and {list(model)} in the model"
        for name, (file, model) in sorted(mismatched.items())
    ]
    rest = f" and {len(named) - NUM_NAMED} more" if len(named) > NUM_NAMED else ""
    return (
        f"{_count(mismatched)} of another shape ({'; '.join(named[:NUM_NAMED])}{rest}). Likely cause: config.json is "
        "another model's, or the vocabulary was resized and config.json not saved again"
    )


def _cause(missing: set[str], unexpected: list[str]) -> str:
    """Why tensors are missing, in words that end with what to do."""
    added = _added(missing, unexpected)
    if added:
        who = next((f" by {wrapper}" for text, wrapper in _WRAPPERS.items() if text in added), "")
        return f"the names in the file have {added!r} added{who}: rename the tensors, or save the module inside"
    if any("lora_" in name for name in unexpected):
        return "the file holds a LoRA adapter and not the model: merge it into its base model, and save that"
    if all(name.startswith(("lm_head.", "embed_out.", "output.")) for name in missing):
        return (
            "the model was saved with its head tied to the embedding and config.json says tie_word_embeddings=false "
            "(set it to true), or the save was interrupted (save it again)"
        )
    if unexpected:
        return (
            f"config.json is another model's ({_count(unexpected)} of the file fit nowhere: {_some(unexpected)}), or "
            "the names were changed: save it again with save_pretrained"
        )
    return "an interrupted save or download, or config.json of a larger model: save or download it again"


def _added(missing: set[str], unexpected: list[str]) -> str:
    """What most names of the file have that the model's lack: a prefix, or a wrapper's name inside; "" for none."""
    for text in _WRAPPERS:
        if sum(text in name and name.replace(text, "") in missing for name in unexpected) * 2 > len(missing):
            return text
    ends: Counter[str] = Counter()
    for name in unexpected:
        parts = name.split(".")
        ends.update(name[: -len(rest)] for i in range(1, len(parts)) if (rest := ".".join(parts[i:])) in missing)
    prefix, count = next(iter(ends.most_common(1)), ("", 0))
    return prefix if count * 2 > len(missing) else ""
