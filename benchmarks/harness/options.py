"""The options for the model and the engine's settings, and their meaning. Called by the benchmarks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

from harness.shapes import folder_of
from penstock.demo import MODEL_DIR
from penstock.models.baseline import SHAPES


def parser_for(doc: str | None, epilog: str = "") -> argparse.ArgumentParser:
    """A parser whose help is the benchmark's own docstring."""
    return argparse.ArgumentParser(description=doc, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_model_options(parser: argparse.ArgumentParser, default_shape: str | None = None) -> None:
    """Add --model or --shape, --dtype, --quantization and --set."""
    group = parser.add_argument_group("model and engine")
    source = group.add_mutually_exclusive_group()
    default = f"the shape {default_shape}" if default_shape else "the small model in the package"
    source.add_argument("--model", metavar="M", help=f"folder or hub id (default: {default})")
    source.add_argument(
        "--shape", choices=tuple(SHAPES), help="random bfloat16 weights of this shape, written to a cache folder once"
    )
    group.add_argument("--dtype", metavar="T", help="bfloat16, float32 or float16 (default: the checkpoint's)")
    group.add_argument("--quantization", metavar="Q", help="int8: quantize the weights at load (default: none)")
    group.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="any setting of EngineConfig, repeatable"
    )
    parser.set_defaults(default_shape=default_shape)


def source_of(args: argparse.Namespace) -> str:
    """The model's folder or hub id; a shape is written on first use."""
    if args.model:
        return str(args.model)
    shape = args.shape or args.default_shape
    return str(folder_of(shape) if shape else MODEL_DIR)


def name_of(args: argparse.Namespace) -> str:
    """The model's name in tables and results."""
    if args.model:
        return Path(args.model).name
    return str(args.shape or args.default_shape or "demo")


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords of `EngineConfig` from the options."""
    settings = {name: getattr(args, name) for name in ("dtype", "quantization") if getattr(args, name) is not None}
    for item in args.set:
        name, mark, value = item.partition("=")
        if not mark:
            raise SystemExit(f"--set {item}: write NAME=VALUE, as in --set max_batch_size=64")
        settings[name] = yaml.safe_load(value)
    return settings


def numbers(text: str) -> list[float]:
    """A comma-separated list of positive numbers, for argparse."""
    values = [float(part) for part in text.split(",") if part.strip()]
    if not values or min(values) <= 0:
        raise argparse.ArgumentTypeError(f"must be positive numbers like 1,2,4, got {text!r}")
    return values


def integers(text: str) -> list[int]:
    """A comma-separated list of positive integers, for argparse."""
    values = [int(part) for part in text.split(",") if part.strip()]
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"must be positive integers like 1,2,4, got {text!r}")
    return values
