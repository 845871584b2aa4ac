"""Models of a known shape with random weights, made once and kept in the user's cache: `python -m harness.shapes NAME`.

Owns that folder. A tokenizer lies beside the weights, because other engines want one; its text means nothing.
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
    """Where the benchmarks keep models and results."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "penstock" / "benchmarks"


def folder_of(shape: str) -> Path:
    """The folder of a shape; written on first use, in a process that takes its memory along when it ends.

    Raises `ProcessFailed`, and `KeyError` for a shape that is not in `SHAPES`.
    """
    SHAPES[shape]
    folder = cache_folder() / "models" / shape
    if not (folder / "config.json").exists():
        note(f"writing random weights of the shape {shape} to {folder}")
        fresh("harness.shapes", shape, str(folder))
    return folder


def write(shape: str, folder: Path) -> None:
    """Make the model beside its place and move it there in one go, so that no half of it is ever found."""
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
