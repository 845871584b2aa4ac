"""The options that name a model and the engine's settings, and what they mean. Called by the benchmarks."""

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
    """--model or --shape, --dtype, --quantization, --set."""
    group = parser.add_argument_group("model and engine")
    which = group.add_mutually_exclusive_group()
    default = f"the shape {default_shape}" if default_shape else "the small model in the package"
    which.add_argument("--model", metavar="M", help=f"folder or hub id (default: {default})")
    which.add_argument(
        "--shape", choices=tuple(SHAPES), help="random bfloat16 weights of this shape, written to a cache folder once"
    )
    group.add_argument("--dtype", metavar="T", help="bfloat16, float32 or float16 (default: the checkpoint's)")
    group.add_argument("--quantization", metavar="Q", help="int8: quantize the weights at load (default: do not)")
    group.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="any setting of EngineConfig, repeatable"
    )
    parser.set_defaults(default_shape=default_shape)


def source_of(args: argparse.Namespace) -> str:
    """The model's folder or hub id. Writes a shape that is used for the first time."""
    if args.model:
        return str(args.model)
    shape = args.shape or args.default_shape
    return str(folder_of(shape) if shape else MODEL_DIR)


def name_of(args: argparse.Namespace) -> str:
    """What tables and results call the model."""
    if args.model:
        return Path(args.model).name
    return str(args.shape or args.default_shape or "demo")


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords of `EngineConfig` that were given."""
    given = {name: getattr(args, name) for name in ("dtype", "quantization") if getattr(args, name) is not None}
    for item in args.set:
        name, mark, value = item.partition("=")
        if not mark:
            raise SystemExit(f"--set {item}: write NAME=VALUE, as in --set max_batch_size=64")
        given[name] = yaml.safe_load(value)
    return given


def numbers(text: str) -> list[float]:
    """A comma-separated list of positive numbers, for argparse."""
    found = [float(part) for part in text.split(",") if part.strip()]
    if not found or min(found) <= 0:
        raise argparse.ArgumentTypeError(f"must be positive numbers like 1,2,4, got {text!r}")
    return found


def integers(text: str) -> list[int]:
    """A comma-separated list of positive integers, for argparse."""
    found = [int(part) for part in text.split(",") if part.strip()]
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"must be positive integers like 1,2,4, got {text!r}")
    return found
