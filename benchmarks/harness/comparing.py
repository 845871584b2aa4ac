"""What `compare` and `scaling` have in common: their options, and what these mean. Measures nothing."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness import entrants
from harness.results import Results
from harness.shapes import cache_folder, folder_of
from harness.sittings import Plan
from peers.workloads import Workload
from penstock.models.baseline import SHAPES


def add_options(parser: argparse.ArgumentParser, results: str) -> None:
    """What `compare` and `scaling` have in common."""
    model = parser.add_argument_group("model")
    which = model.add_mutually_exclusive_group()
    which.add_argument("--model", type=Path, metavar="FOLDER", help="a model folder")
    which.add_argument("--shape", choices=tuple(SHAPES), default="qwen3-0.6b", help="random weights (the default)")
    who = parser.add_argument_group("engines")
    who.add_argument(
        "--own", default=",".join(entrants.OWN), metavar="E,E", help=f"of {', '.join(entrants.OWN)} (default: both)"
    )
    who.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of this engine")
    who.add_argument("--peer", type=entrants.from_option, action="append", default=[], metavar="KIND=PYTHON")
    who.add_argument("--peers", type=Path, metavar="FILE", help="TOML, one table per peer")
    how = parser.add_argument_group("measurement")
    how.add_argument("--sittings", type=int, metavar="N", default=3, help="default: 3")
    how.add_argument("--repeats", type=int, metavar="N", default=3, help="of a workload in a sitting (default: 3)")
    how.add_argument("--timeout", type=float, metavar="S", default=3600, help="of one process (default: 3600 s)")
    how.add_argument("--results", type=Path, metavar="FILE", help=f"default: {results} in the user's cache folder")
    parser.set_defaults(default_results=results)


def engines_of(args: argparse.Namespace) -> list[entrants.Entrant]:
    """Everybody who was named, this engine first."""
    names = [name for name in args.own.split(",") if name]
    unknown = set(names) - set(entrants.OWN)
    if unknown:
        raise SystemExit(f"there is no {', '.join(unknown)}: choose from {', '.join(entrants.OWN)}")
    try:
        peers = entrants.from_file(args.peers) if args.peers else []
    except entrants.BadPeer as error:
        raise SystemExit(str(error)) from None
    return [*entrants.own_entrants(names, args.set), *args.peer, *peers]


def results_of(args: argparse.Namespace) -> Results:
    """The file of measurements."""
    return Results(args.results or cache_folder() / args.default_results)


def model_name(args: argparse.Namespace) -> str:
    """What results call the model."""
    return str(args.model.resolve().name if args.model else args.shape)


def model_folder(args: argparse.Namespace) -> Path:
    """Where the model is; a shape is written there on first use."""
    folder = Path(args.model) if args.model else folder_of(args.shape)
    if not (folder / "config.json").exists():
        raise SystemExit(f"{folder} is not a model folder: it has no config.json")
    return folder


def plan_of(args: argparse.Namespace, workloads: list[Workload]) -> Plan:
    """What is to be measured."""
    names = tuple(workload.name for workload in workloads)
    return Plan(model_folder(args), model_name(args), names, args.sittings, args.repeats, args.timeout)
