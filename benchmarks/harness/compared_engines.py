"""The engines of a comparison: this one in its precisions, and peers, each with its own Python interpreter.

Owns the table of known kinds, and reads peers from the command line or a TOML file. Runs nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.processes import BENCHMARKS, foreign_environment, own_environment

OWN = {"penstock-bf16": ("bf16", ()), "penstock-int8": ("int8", ("--quantization", "int8"))}
# Kind -> (script, its arguments, precision of the weights).
KINDS: Mapping[str, tuple[str, tuple[str, ...], str]] = {
    "transformers": ("run_transformers.py", (), "bf16"),
    "transformers-cb": ("run_transformers.py", ("--continuous",), "bf16"),
    "vllm": ("run_vllm.py", (), "bf16"),
    "openvino": ("run_openvino.py", ("--hint", "bf16"), "bf16"),
    "openvino-int8": ("run_openvino.py", ("--hint", "f32"), "int8"),
    "llamacpp": ("run_llamacpp.py", ("--type", "bf16"), "bf16"),
    "llamacpp-q8": ("run_llamacpp.py", ("--type", "q8_0"), "int8"),
}


class BadPeer(Exception):
    """An invalid description of a peer; the message says what to write."""


@dataclass(frozen=True, slots=True)
class ComparedEngine:
    """One engine: `python script model --workloads ...`; `model` replaces the common one if it needs its own."""

    name: str
    python: str
    script: str
    precision: str
    args: tuple[str, ...] = ()
    model: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    is_ours: bool = False

    def command(self, model: str, workloads: list[str], repeats: int) -> list[str]:
        """The process that measures these workloads."""
        script = str(BENCHMARKS / "peers" / self.script)
        options = ["--workloads", ",".join(workloads), "--repeats", str(repeats)]
        return [self.python, script, self.model or model, *options, *self.args]

    def environment(self) -> dict[str, str]:
        """The environment variables of the process."""
        return own_environment(self.env) if self.is_ours else foreign_environment(self.env)

    def missing(self) -> str | None:
        """What is not installed, if anything."""
        if shutil.which(self.python) is None:
            return f"there is no {self.python}"
        if self.model is not None and not Path(self.model).is_dir():
            return f"there is no folder {self.model}"
        return None


def own_engines(names: list[str], settings: list[str]) -> list[ComparedEngine]:
    """This engine, once per name in `OWN`; `settings` are NAME=VALUE."""
    extra = [part for setting in settings for part in ("--set", setting)]
    return [
        ComparedEngine(name, sys.executable, "run_penstock.py", OWN[name][0], (*OWN[name][1], *extra), is_ours=True)
        for name in names
    ]


def from_option(text: str) -> ComparedEngine:
    """A peer from `KIND=PYTHON` or `KIND=PYTHON,MODEL`. Raises `argparse.ArgumentTypeError`."""
    kind, mark, value = text.partition("=")
    python, _, model = value.partition(",")
    if not mark or not python:
        raise argparse.ArgumentTypeError(f"write KIND=PYTHON or KIND=PYTHON,MODEL, not {text!r}")
    try:
        return from_table(kind, {"python": python} | ({"model": model} if model else {}))
    except BadPeer as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def from_file(path: Path) -> list[ComparedEngine]:
    """The peers in a TOML file, one table each; its name is a kind, or the table has one. Raises `BadPeer`."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise BadPeer(f"cannot read the peers in {path}: {error}") from None
    return [from_table(name, table) for name, table in tables.items()]


def from_table(name: str, table: Mapping[str, Any]) -> ComparedEngine:
    """One peer. Raises `BadPeer`."""
    kind = table.get("kind", name)
    if kind not in KINDS:
        raise BadPeer(f"peer {name}: there is no kind {kind!r}: choose from {', '.join(KINDS)}")
    unknown = set(table) - {"kind", "python", "model", "args", "env"}
    if unknown or "python" not in table:
        raise BadPeer(f"peer {name}: it needs python, and may have kind, model, args and env")
    script, args, precision = KINDS[kind]
    model = table.get("model")
    return ComparedEngine(
        name=name,
        python=os.path.expanduser(table["python"]),
        script=script,
        precision=precision,
        args=(*args, *map(str, table.get("args", ()))),
        model=os.path.expanduser(model) if model else None,
        env=dict(table.get("env", {})),
    )
