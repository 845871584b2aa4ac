"""Options that several commands share, and what they mean to the engine.

Owns the translation from the command line to settings and `SamplingParams`: only what was given is passed on, so that
environment variables and the model's own defaults hold for the rest. Called by the commands.
"""

from __future__ import annotations

import argparse
from typing import Any

from penstock.errors import ConfigurationError
from penstock.sampling import SamplingParams

_SAMPLING = ("temperature", "top_p", "top_k", "seed", "n", "stop", "logprobs", "max_tokens", "min_tokens")


def add_model_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """--model, --device, --dtype."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", metavar="M", help="hub id or folder (default: the small model that ships with Penstock)"
    )
    add_device_options(group)
    return group


def add_device_options(group: argparse._ArgumentGroup) -> None:
    """--device, --dtype."""
    group.add_argument("--device", metavar="D", help="auto, cpu, cuda or cuda:1 (default: auto)")
    group.add_argument("--dtype", metavar="T", help="auto, float32, float16 or bfloat16 (default: the checkpoint's)")


def add_sampling_options(parser: argparse.ArgumentParser, max_tokens: int) -> argparse._ArgumentGroup:
    """How tokens are chosen; `max_tokens` is only named, as the default."""
    group = parser.add_argument_group("sampling", "What is not given is the model's own default.")
    group.add_argument(
        "--max-tokens", type=int, metavar="N", help=f"most new tokens (default: {max_tokens}, or what fits)"
    )
    group.add_argument("--min-tokens", type=int, metavar="N", help="do not end before this many new tokens")
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy; higher is wilder")
    group.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the likeliest tokens that make up P together"
    )
    group.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens; 0 is off")
    group.add_argument("--seed", type=int, metavar="S", help="the same seed draws the same tokens")
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; may be given several times"
    )
    return group


def engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords of `EngineConfig` that were given."""
    return {name: value for name in ("device", "dtype") if (value := getattr(args, name, None)) is not None}


def sampling_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords of `SamplingParams` that were given, checked now, before a model is loaded. Raises `RequestError`."""
    given = {name: value for name in _SAMPLING if (value := getattr(args, name, None)) is not None}
    SamplingParams(**given)
    return given


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def names_of(text: str, known: tuple[str, ...]) -> list[str]:
    """A comma-separated choice among `known`. Raises `ConfigurationError` naming what there is."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ConfigurationError(
            f"there is no {', '.join(map(repr, unknown)) or 'choice given'}: choose from {', '.join(known)}"
        )
    return names
