"""`check_folder`: whether a folder of safetensors holds complete weights of the same shapes as a model's own.

Reads the headers of the files, not the weights. Called before an engine is told to load them, because an engine that
finds an error in the middle is left with weights of two kinds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from penstock.errors import WeightsError, shown, text_of

_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format

Shapes = Mapping[str, tuple[int, ...]]


def check_folder(folder: object, model: str | os.PathLike[str]) -> Path:
    """The folder, as an absolute path. `model` is the folder of the model that runs; of a hub's name nothing is known.

    Raises `WeightsError` for a folder that is missing, incomplete or damaged, or whose weights have other names or
    shapes than the model's.
    """
    if not isinstance(folder, str | os.PathLike):
        raise WeightsError(f"new weights must be a folder of safetensors for this engine, got {shown(folder)}")
    path = Path(folder).absolute()
    shapes = read_shapes(path)
    if Path(model).is_dir():
        _compare(shapes, read_shapes(Path(model)), path)
    return path


def read_shapes(folder: Path) -> Shapes:
    """The name and shape of every tensor in a folder. Raises `WeightsError`."""
    if not folder.is_dir():
        raise WeightsError(f"{folder} is not a folder: save the weights there with save_pretrained(..., safetensors)")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightsError(f"{folder} has no .safetensors file: save the weights with save_pretrained")
    shapes = {name: shape for file in files for name, shape in _read_file(file).items()}
    index = folder / "model.safetensors.index.json"
    if index.is_file() and (missing := _indexed(index) - shapes.keys()):
        raise WeightsError(f"{folder} lacks {min(missing)!r}, which its index names: copy all of its files")
    return shapes


def _read_file(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes in one file, which must be as long as its header says."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(length, _MAX_HEADER)))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
        shapes = {name: tuple(entry["shape"]) for name, entry in tensors.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise WeightsError(f"{file} is not a safetensors file ({text_of(error)}): write it again") from None
    if file.stat().st_size != 8 + length + end:
        raise WeightsError(
            f"{file} has {file.stat().st_size} bytes where its header says {8 + length + end}: "
            "write it again, and pass it on only when it is complete"
        )
    return shapes


def _indexed(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_text())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{index} cannot be read: {text_of(error)}") from None


def _compare(new: Shapes, old: Shapes, folder: Path) -> None:
    if missing := old.keys() - new.keys():
        raise WeightsError(f"{folder} lacks {min(missing)!r}: pass all weights of the model")
    if unknown := new.keys() - old.keys():
        raise WeightsError(f"{folder} has {min(unknown)!r}, which the model lacks: pass weights of the same model")
    for name, shape in new.items():
        if shape != old[name]:
            raise WeightsError(f"{name} has shape {list(shape)} in {folder}, and {list(old[name])} in the model")
