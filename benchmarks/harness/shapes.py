"""Models of a known shape with random weights, written once to the user's cache: `python -m harness.shapes NAME`.

Owns that folder. It has a tokenizer too, because other engines need one; its text means nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from harness.console import note
from harness.processes import fresh
from penstock.config import EngineConfig
from penstock.demo import MODEL_DIR
from penstock.models.baseline import SHAPES, random_module

# Rotary positions cost nothing, so that these shapes reach every context length that is measured.
MAX_POSITIONS = 32768


def cache_folder() -> Path:
    """The folder for models and results of the benchmarks."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "penstock" / "benchmarks"


def folder_of(shape: str) -> Path:
    """The folder of a shape; written on first use, in a process of its own, which frees its memory.

    Raises `ProcessFailed`, and `KeyError` for an unknown shape.
    """
    SHAPES[shape]
    folder = cache_folder() / "models" / shape
    if not (folder / "config.json").exists():
        note(f"writing random weights of the shape {shape} to {folder}")
        fresh("harness.shapes", shape, str(folder))
    return folder


def write(shape: str, folder: Path) -> None:
    """Write the model to a temporary folder and rename that, so that the folder is never incomplete."""
    from transformers import AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        module = random_module(shape, EngineConfig())
        module.config.max_position_embeddings = MAX_POSITIONS
        module.save_pretrained(part)
        AutoTokenizer.from_pretrained(str(MODEL_DIR)).save_pretrained(part)
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
    print(json.dumps({"folder": sys.argv[2]}))
