"""The options that `compare` and `scaling` share, and their meaning. Measures nothing."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.compared_engines import OWN, BadPeer, ComparedEngine, from_file, from_option, own_engines
from harness.results import Results
from harness.runs import Plan
from harness.shapes import cache_folder, folder_of
from peers.workloads import Workload
from penstock.models.baseline import SHAPES


def add_options(parser: argparse.ArgumentParser, results: str) -> None:
    """Add the shared options."""
    model = parser.add_argument_group("model")
    source = model.add_mutually_exclusive_group()
    source.add_argument("--model", type=Path, metavar="FOLDER", help="a model folder")
    source.add_argument("--shape", choices=tuple(SHAPES), default="qwen3-0.6b", help="random weights (the default)")
    engines = parser.add_argument_group("engines")
    engines.add_argument(
        "--own",
        default=",".join(OWN),
        metavar="E,E",
        help=f"this engine as {', '.join(OWN)} (default: both)",
    )
    engines.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of this engine")
    engines.add_argument("--peer", type=from_option, action="append", default=[], metavar="KIND=PYTHON")
    engines.add_argument("--peers", type=Path, metavar="FILE", help="TOML, one table per peer")
    measurement = parser.add_argument_group("measurement")
    measurement.add_argument("--runs", type=int, metavar="N", default=3, help="runs of every engine (default: 3)")
    measurement.add_argument("--repeats", type=int, metavar="N", default=3, help="repeats in a run (default: 3)")
    measurement.add_argument("--timeout", type=float, metavar="S", default=3600, help="of a process (default: 3600)")
    measurement.add_argument("--results", type=Path, metavar="FILE", help=f"default: {results} in the cache folder")
    parser.set_defaults(default_results=results)


def engines_of(args: argparse.Namespace) -> list[ComparedEngine]:
    """The engines of the options, this one first."""
    names = [name for name in args.own.split(",") if name]
    unknown = set(names) - set(OWN)
    if unknown:
        raise SystemExit(f"there is no {', '.join(unknown)}: choose from {', '.join(OWN)}")
    try:
        peers = from_file(args.peers) if args.peers else []
    except BadPeer as error:
        raise SystemExit(str(error)) from None
    return [*own_engines(names, args.set), *args.peer, *peers]


def results_of(args: argparse.Namespace) -> Results:
    """The file of measurements."""
    return Results(args.results or cache_folder() / args.default_results)


def model_name(args: argparse.Namespace) -> str:
    """The model's name in the results."""
    return str(args.model.resolve().name if args.model else args.shape)


def model_folder(args: argparse.Namespace) -> Path:
    """The model's folder; a shape is written on first use."""
    folder = Path(args.model) if args.model else folder_of(args.shape)
    if not (folder / "config.json").exists():
        raise SystemExit(f"{folder} is not a model folder: it has no config.json")
    return folder


def plan_of(args: argparse.Namespace, workloads: list[Workload]) -> Plan:
    """The plan of the measurements."""
    names = tuple(workload.name for workload in workloads)
    return Plan(model_folder(args), model_name(args), names, args.runs, args.repeats, args.timeout)
