"""Whether a checkpoint holds all tensors of its model: `Findings`, filled by a loader, and the messages about them.

Reads no files. Called by `building`, `checkpoint` and `reading`.
"""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from penstock.errors import ConfigurationError

NUM_NAMED = 3  # tensors that a message names
MAX_REPORTED = 20  # lines of names in a note
_FIRST_NUMBER = re.compile(r"(.+?)\.(\d+)\.(.+)")
# What wrappers add to the names of a module's parameters, and what they are.
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
    """How a checkpoint and its model differ; written while the module is built, then checked.

    Names of the model that no file holds, tensors of the files that fit nowhere, and tensors of another shape. `failed`
    are conversions that raised (name: error); `ignored` is what may be missing.
    transformers warns and serves random numbers instead; here such a model is refused, with the likely cause.
    """

    missing: set[str] = field(default_factory=set)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, Shapes] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> Findings:
        """From the report that `from_pretrained(output_loading_info=True)` returns."""
        mismatched = {name: (tuple(file), tuple(model)) for name, file, model in info.get("mismatched_keys") or ()}
        return cls(set(info.get("missing_keys") or ()), sorted(info.get("unexpected_keys") or ()), mismatched)

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
        """Raise `ConfigurationError` when `fatal`; log one warning about tensors that are not used."""
        if self.failed:
            name, reason = next(iter(self.failed.items()))
            raise ConfigurationError(
                f"the checkpoint {source} does not fit its model: {len(self.failed)} tensors cannot be converted "
                f"({name}: {reason}). Likely cause: an interrupted save; save or download it again"
            )
        if self.mismatched:
            error = ConfigurationError(f"the checkpoint {source} does not fit its model: {_mismatch(self.mismatched)}")
            raise self._with_report(error)
        if self.missing:
            raise self._with_report(
                ConfigurationError(
                    f"the checkpoint {source} lacks {_count(self.missing)} of its model ({listed(self.missing)}). "
                    f"Likely cause: {_cause(self.missing, self.unexpected)}"
                )
            )
        if self.unexpected:
            log.warning(
                "the checkpoint %s holds %s that its model has no place for (%s): they are not used",
                source,
                _count(self.unexpected),
                listed(self.unexpected),
            )

    def _with_report(self, error: ConfigurationError) -> ConfigurationError:
        """Add all names as notes, where the message shows only the first of them. Tracebacks show notes too."""
        for title, names in (
            ("in the model, not in the file", self.missing),
            ("in the file, not in the model", self.unexpected),
            ("of another shape", self.mismatched),
        ):
            if len(names) > NUM_NAMED:
                lines = [f"    {line}" for line in grouped(names)]
                more = [f"    and {len(lines) - MAX_REPORTED} more lines"] if len(lines) > MAX_REPORTED else []
                error.add_note("\n".join([f"  {title}:", *lines[:MAX_REPORTED], *more]))
        return error


def grouped(names: Iterable[str]) -> list[str]:
    """The names, one entry for those that differ only in their first number: "layers.{0-3,5}.norm.weight"."""
    groups: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    entries: list[str] = []
    for name in names:
        match = _FIRST_NUMBER.fullmatch(name)
        if match is None:
            entries.append(name)
        else:
            groups[match[1], match[3]].append(int(match[2]))
    for (prefix, suffix), numbers in groups.items():
        numbered = f"{numbers[0]}" if len(numbers) == 1 else f"{{{','.join(_ranges(sorted(numbers)))}}}"
        entries.append(f"{prefix}.{numbered}.{suffix}")
    return sorted(entries)


def _ranges(numbers: list[int]) -> Iterator[str]:
    """Runs of consecutive numbers of a sorted list: [0, 1, 2, 5] is "0-2" and "5"."""
    start = 0
    for index, number in enumerate(numbers):
        if index + 1 == len(numbers) or numbers[index + 1] > number + 1:
            yield f"{number}" if start == index else f"{numbers[start]}-{number}"
            start = index + 1


def _matches(patterns: Iterable[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _count(names: Iterable[str]) -> str:
    count = sum(1 for _ in names)
    return f"{count} tensor{'s' if count != 1 else ''}"


def listed(entries: Iterable[str], separator: str = ", ") -> str:
    """The first entries, and the number of the others."""
    ordered = sorted(entries)
    suffix = f" and {len(ordered) - NUM_NAMED} more" if len(ordered) > NUM_NAMED else ""
    return separator.join(ordered[:NUM_NAMED]) + suffix


def _mismatch(mismatched: Mapping[str, Shapes]) -> str:
    entries = [
        f"{name} is {list(file)} in the file and {list(model)} in the model"
        for name, (file, model) in mismatched.items()
    ]
    return (
        f"{_count(mismatched)} of another shape ({listed(entries, '; ')}). Likely cause: config.json is "
        "another model's, or the vocabulary was resized and config.json not saved again"
    )


def _cause(missing: set[str], unexpected: list[str]) -> str:
    """Why tensors are missing, and what to do."""
    added = _added_part(missing, unexpected)
    if added:
        wrapper = next((f" by {wrapper}" for part, wrapper in _WRAPPERS.items() if part in added), "")
        return f"the names in the file have {added!r} added{wrapper}: rename the tensors, or save the module inside"
    if any("lora_" in name for name in unexpected):
        return "the file holds a LoRA adapter and not the model: merge it into its base model, and save that"
    if all(name.startswith(("lm_head.", "embed_out.", "output.")) for name in missing):
        return (
            "the model was saved with its head tied to the embedding and config.json says tie_word_embeddings=false "
            "(set it to true), or the save was interrupted (save it again)"
        )
    if unexpected:
        return (
            f"config.json is another model's ({_count(unexpected)} of the file fit nowhere: {listed(unexpected)}), or "
            "the names were changed: save it again with save_pretrained"
        )
    return "an interrupted save or download, or config.json of a larger model: save or download it again"


def _added_part(missing: set[str], unexpected: list[str]) -> str:
    """What most names of the file have that the model's lack: a prefix, or a wrapper's name inside; "" for none."""
    for part in _WRAPPERS:
        if sum(part in name and name.replace(part, "") in missing for name in unexpected) * 2 > len(missing):
            return part
    prefixes: Counter[str] = Counter()
    for name in unexpected:
        parts = name.split(".")
        suffixes = (".".join(parts[i:]) for i in range(1, len(parts)))
        prefixes.update(name[: -len(suffix)] for suffix in suffixes if suffix in missing)
    prefix, count = next(iter(prefixes.most_common(1)), ("", 0))
    return prefix if count * 2 > len(missing) else ""
