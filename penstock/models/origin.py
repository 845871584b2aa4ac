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
    """A folder with its files as they are now, or a model on the hub at its present commit."""

    def __init__(self, source: str, config: EngineConfig) -> None:
        self._source = str(Path(source).absolute()) if Path(source).is_dir() else source
        self._config = config
        self._stamps = _stamps(self._source)
        if not self._stamps:
            from transformers.utils.hub import resolve_revision

            revision = resolve_revision(source, **hub_options(source, config))
            self._config = config.model_copy(update={"revision": revision})

    def __str__(self) -> str:
        return self._source

    def read(self) -> nn.Module:
        """A module with the weights, on the CPU, in the dtypes of the files. Raises `WeightsError`, `OutOfMemory`."""
        with reading(self._source):
            if self._stamps:
                check_source(self._source)
            return read_module(self._source, "auto", self._config)

    def read_again(self) -> nn.Module:
        """`read`. Raises `WeightsError` also where the files of a folder are not those that were there at first."""
        if _stamps(self._source) != self._stamps:
            raise WeightsError(
                f"the weight files in {self._source} are not those that were read before: put these back, or pass new "
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


def _stamps(source: str) -> Stamps:
    folder = Path(source)
    files = [file for file in folder.iterdir() if file.suffix in WEIGHT_FILES] if folder.is_dir() else []
    return {file.name: (stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()]}
