"""Checks a model source before torch is imported, so that a wrong path fails in milliseconds.

Reads file names and headers only. Called by `loading` and by the engine's constructor.
"""

from __future__ import annotations

import json
from pathlib import Path

from penstock.errors import ConfigurationError

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
_TOKENIZER_FILES = ("*token*", "*vocab*", "merges.txt", "spiece*", "*.spm", "sentencepiece*", "tekken*", "*.tiktoken")


def check_source(source: str) -> str:
    """`expanded(source)`. Raises `ConfigurationError` for a folder that is missing or incomplete.

    What looks like a hub id ("name" or "owner/name") and is not a folder is left to the hub library.
    """
    if not source.strip():
        raise ConfigurationError("the model's name is empty: pass a folder or a hub id, or None for the demo model")
    folder = Path(expanded(source))
    if folder.is_dir():
        _check_folder(folder)
    elif folder.exists():
        raise ConfigurationError(f"{source} is a file: pass the folder that holds config.json and the weights")
    elif _looks_local(source):
        raise ConfigurationError(f"there is no model folder {source}: check the path, or pass a hub id ('owner/name')")
    return expanded(source)


def check_tokenizer_files(source: str) -> None:
    """Raise `ConfigurationError` for a folder that is missing, or without any file of a tokenizer.

    What is not a folder and looks like a hub id is left to the hub library. Called before weights are read.
    """
    folder = Path(expanded(source))
    if not folder.exists() and _looks_local(source):
        raise ConfigurationError(
            f"there is no tokenizer folder {source}: check the path, or pass a hub id ('owner/name')"
        )
    if folder.is_dir() and not any(True for pattern in _TOKENIZER_FILES for _ in folder.glob(pattern)):
        raise ConfigurationError(
            f"{source} holds no tokenizer (no tokenizer.json or tokenizer_config.json): save it there with "
            "tokenizer.save_pretrained(folder), or name another folder or hub id that has it, with tokenizer='...' "
            "(--tokenizer on the command line); skip_tokenizer_init=True serves token ids without one"
        )


def expanded(source: str) -> str:
    """`source` with "~" replaced by a home folder. Raises `ConfigurationError` where that is unknown."""
    if not source.startswith("~"):
        return source
    try:
        return str(Path(source).expanduser())
    except RuntimeError:
        raise ConfigurationError(f"{source} is in a home folder that is not known here: pass the whole path") from None


def _looks_local(source: str) -> bool:
    return source.startswith(("/", ".", "~")) or source.count("/") > 1 or "\\" in source


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ConfigurationError(
                f"{folder} holds an adapter: load the model that it belongs to, then engine.load_adapter(name, folder)"
            )
        raise ConfigurationError(f"{folder} holds no config.json: pass a folder written by save_pretrained")
    if not any(True for pattern in _WEIGHTS for _ in folder.glob(pattern)):
        raise ConfigurationError(f"{folder} holds no weights (*.safetensors or *.bin): the download may be incomplete")
    for file in folder.glob("*.safetensors"):
        _check_safetensors(file)


def _check_safetensors(file: Path) -> None:
    """The header's offsets must end exactly where the file does."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 0 < length <= size - 8:
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        if 8 + length + end != size:
            raise ValueError(f"{size} bytes where its header says {8 + length + end}")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigurationError(f"{file} is corrupt ({error}): download or save it again") from error
