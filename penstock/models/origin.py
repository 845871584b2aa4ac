"""`Origin`: where the weights of a model were read, so that an engine that dropped them can read them again.

Reads files and holds no weights. Called by `loading`, `updates` and, when an engine wakes, by `ModelWeights`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from penstock.config import EngineConfig
from penstock.errors import ConfigurationError, OutOfMemory, PenstockError, WeightsError, described
from penstock.models.checkpoint import hub_options
from penstock.models.folder import check_source
from penstock.models.memory import WEIGHT_FILES
from penstock.models.reading import read_module

Stamps = dict[str, tuple[int, int]]  # of each weight file: bytes, and nanoseconds of its last change


class Origin:
    """The files of a folder, or of a hub's snapshot, as they are now."""

    def __init__(self, source: str, config: EngineConfig) -> None:
        self._folder = str(Path(source).absolute()) if Path(source).is_dir() else _snapshot(source, config)
        self._config = config
        self._stamps = _stamps(self._folder)

    def __str__(self) -> str:
        return self._folder

    def read(self) -> nn.Module:
        """A module with the weights, on the CPU, in the dtypes of the files. Raises `WeightsError`, `OutOfMemory`."""
        with reading(self._folder):
            check_source(self._folder)
            return read_module(self._folder, "auto", self._config)

    def read_again(self) -> nn.Module:
        """`read`. Raises `WeightsError` also where the files of a folder are not those that were there at first."""
        if _stamps(self._folder) != self._stamps:
            raise WeightsError(
                f"the weight files in {self._folder} are not those that were read before: put these back, or pass new "
                "weights to update_weights(), then call wake() again"
            )
        return self.read()


@contextmanager
def reading(source: object) -> Iterator[None]:
    """A block that reads weights from `source`: whatever it raises becomes `WeightsError` or `OutOfMemory`."""
    try:
        yield
    except ConfigurationError as error:
        raise WeightsError(str(error)) from error
    except PenstockError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(f"out of memory while reading the weights in {source}: free some, then try again") from error
    except Exception as error:
        raise WeightsError(f"the weights in {source} cannot be read: {described(error)}") from error


def _snapshot(source: str, config: EngineConfig) -> str:
    """The folder in the hub's cache that a model was loaded from: a branch may go on meanwhile."""
    from transformers.utils.hub import cached_file

    path = cached_file(source, "config.json", **hub_options(source, config))
    assert path is not None, "a model was loaded from there"
    return str(Path(path).parent)


def _stamps(source: str) -> Stamps:
    folder = Path(source)
    files = [file for file in folder.iterdir() if file.suffix in WEIGHT_FILES] if folder.is_dir() else []
    return {file.name: (stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()]}
