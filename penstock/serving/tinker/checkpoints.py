"""`Checkpoints`: saved adapters as folders, by paths `tinker://RUN/weights/NAME` and `tinker://RUN/sampler_weights/NAME`.

Owns the layout `FOLDER/RUN/KIND/NAME` and what is said of each adapter in its `checkpoint.json`. A path's parts are
checked before any of them reaches the file system. Folders appear whole or not at all. Used from any thread.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from penstock.errors import ConfigurationError, RequestError, described, shown
from penstock.serving.errors import HttpError
from penstock.training.lora.records import LoraShape

SCHEME = "tinker://"
TRAINING, SAMPLER = "weights", "sampler_weights"
TYPES = {TRAINING: "training", SAMPLER: "sampler"}
_SNAPSHOTS = "snapshots"  # of no name: no path leads there
_INFO = "checkpoint.json"
_RUN = re.compile(r"[\w-]{1,80}(:train:\d{1,20})", re.ASCII)
_NAME = re.compile(r"\w[\w.-]{0,127}", re.ASCII)


@dataclass(frozen=True, slots=True)
class WeightsPath:
    """The place of a saved adapter. Raises `RequestError` for an invalid run, kind or name."""

    run: str
    kind: str
    name: str

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise RequestError(
                f"{shown(self.name)} cannot name saved weights: use up to 128 letters, digits, '_', '-' and '.', the "
                "first of them a letter, a digit or '_'"
            )
        if not _RUN.fullmatch(self.run) or self.kind not in TYPES:
            raise RequestError(
                f"{shown(str(self))} is not a path of saved weights: these are tinker://RUN/weights/NAME"
            )

    @classmethod
    def parse(cls, path: str) -> WeightsPath:
        """The parts of a path. Raises `RequestError`."""
        parts = path.removeprefix(SCHEME).split("/")
        if not path.startswith(SCHEME) or len(parts) != 3:
            raise RequestError(f"{shown(path)} is not a path of saved weights: these are tinker://RUN/weights/NAME")
        return cls(*parts)

    def __str__(self) -> str:
        return f"{SCHEME}{self.run}/{self.kind}/{self.name}"


@dataclass(frozen=True, slots=True)
class Info:
    """What is known of a saved adapter. `id` is its own, also where a name is used again; times are Unix seconds."""

    id: str
    owner: str
    base_model: str
    rank: int
    train_attn: bool
    train_mlp: bool
    train_unembed: bool
    created: float
    expires: float | None = None
    user_metadata: Mapping[str, str] | None = None

    @classmethod
    def new(cls, owner: str, base_model: str, shape: LoraShape) -> Info:
        """The facts of an adapter that is saved now."""
        layers = shape.train_attn, shape.train_mlp, shape.train_unembed
        return cls(uuid.uuid4().hex, owner, base_model, shape.rank, *layers, time.time())

    def shape(self) -> LoraShape:
        """The adapter's shape."""
        return LoraShape(self.rank, None, self.train_attn, self.train_mlp, self.train_unembed)


@dataclass(frozen=True, slots=True)
class Saved:
    """A saved adapter: its folder, and what is known of it."""

    folder: Path
    info: Info

    def is_there(self) -> bool:
        """Whether the folder still holds this very adapter."""
        info = _read_info(self.folder)
        return info is not None and info.id == self.info.id


class Checkpoints:
    """The saved adapters in `root`, which is made if it is not there. Raises `ConfigurationError`.

    Several servers may use a folder: what they save has runs of their own. The first of them deletes the snapshots of
    servers that have ended.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        try:
            root.mkdir(parents=True, exist_ok=True)
            lock = os.open(root / ".lock", os.O_CREAT | os.O_RDWR, 0o600)
        except OSError as error:
            raise ConfigurationError(
                f"adapters cannot be saved in {root} ({described(error)}): name another folder"
            ) from None
        self._unlock = weakref.finalize(self, os.close, lock)
        with suppress(OSError):  # another server holds it
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for run in _folders(root):
                shutil.rmtree(run / _SNAPSHOTS, ignore_errors=True)
        with suppress(OSError):  # of a file system without locks
            fcntl.flock(lock, fcntl.LOCK_SH)

    def close(self) -> None:
        """Let other servers delete what snapshots are left."""
        self._unlock()

    def save(self, path: WeightsPath, info: Info, write: Callable[[Path], None], *, overwrite: bool) -> None:
        """Have `write` fill a folder, and put it in its place. Raises `RequestError` for a name that is taken."""
        folder = self._folder(path)
        self._read(folder)  # which deletes it if its time is over
        if folder.exists() and not overwrite:
            raise RequestError(f"{path} exists: choose another name, or pass overwrite=True")
        written = self._written(path.run, info, write)
        if folder.exists():
            replaced = folder.rename(written.with_name(f"{info.id}.replaced"))
            shutil.rmtree(replaced, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        written.rename(folder)

    def snapshot(self, run: str, info: Info, write: Callable[[Path], None]) -> Saved:
        """Have `write` fill a folder that has no path, and is deleted with its run."""
        return Saved(self._written(run, info, write), info)

    def find(self, path: WeightsPath, owner: str) -> Saved:
        """A saved adapter of this owner. Raises `HttpError` where there is none."""
        saved = self._read(self._folder(path))
        if saved is None or saved.info.owner != owner:
            raise HttpError(404, f"there are no saved weights {path}", code="not_found")
        return saved

    def of_run(self, run: str, owner: str) -> Iterator[tuple[WeightsPath, Saved]]:
        """The saved adapters of one run."""
        if not _RUN.fullmatch(run):
            return
        for kind in TYPES:
            for folder in _folders(self._root / run / kind):
                saved = self._read(folder)
                if saved is not None and saved.info.owner == owner:
                    yield WeightsPath(run, kind, folder.name), saved

    def runs(self) -> list[str]:
        """The runs with saved adapters."""
        return [folder.name for folder in _folders(self._root) if _RUN.fullmatch(folder.name)]

    def delete(self, path: WeightsPath, owner: str) -> Saved:
        """Delete a saved adapter. Raises `HttpError` where there is none."""
        saved = self.find(path, owner)
        shutil.rmtree(saved.folder)
        return saved

    def discard(self, saved: Saved) -> None:
        """Delete a snapshot."""
        shutil.rmtree(saved.folder, ignore_errors=True)

    def drop_snapshots(self, run: str) -> None:
        """Delete what a run saved without names."""
        shutil.rmtree(self._root / run / _SNAPSHOTS, ignore_errors=True)
        with suppress(OSError):
            (self._root / run).rmdir()  # if nothing else is there

    def _folder(self, path: WeightsPath) -> Path:
        return self._root / path.run / path.kind / path.name

    def _written(self, run: str, info: Info, write: Callable[[Path], None]) -> Path:
        folder = self._root / run / _SNAPSHOTS / info.id
        folder.mkdir(parents=True)
        try:
            write(folder)
            (folder / _INFO).write_text(json.dumps(asdict(info)))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return folder

    def _read(self, folder: Path) -> Saved | None:
        """What is saved in a folder; None if nothing is, or if its time is over, and then it is deleted."""
        info = _read_info(folder)
        if info is None:
            return None
        if info.expires is not None and info.expires < time.time():
            shutil.rmtree(folder, ignore_errors=True)
            return None
        return Saved(folder, info)


def _read_info(folder: Path) -> Info | None:
    try:
        return Info(**json.loads((folder / _INFO).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []


def bytes_of(folder: Path) -> int:
    """The size of a saved adapter."""
    try:
        return sum(entry.stat().st_size for entry in os.scandir(folder))
    except OSError:  # it is being deleted
        return 0
