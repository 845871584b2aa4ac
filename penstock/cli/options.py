"""Options that several commands share, and their translation into settings and `SamplingParams`.

Only options that were given are passed on: environment variables and the model's own defaults apply to the rest. Called
by the commands.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from penstock.cli.session import JsonObject
from penstock.config import EngineConfig
from penstock.errors import ConfigurationError, RequestError, text_of
from penstock.sampling import SamplingParams
from penstock.structured_outputs import StructuredOutputs

_ENGINE = ("device", "dtype", "tokenizer")
_SAMPLING = ("temperature", "top_p", "top_k", "seed", "n", "stop", "logprobs", "max_tokens", "min_tokens")


def add_model_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add --model, --device, --dtype and --tokenizer."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", metavar="M", help="hub id or folder (default: the small model that ships with Penstock)"
    )
    add_device_options(group)
    group.add_argument("--tokenizer", metavar="T", help="hub id or folder of the tokenizer (default: the model's own)")
    return group


def add_device_options(group: argparse._ArgumentGroup) -> None:
    """Add --device and --dtype."""
    group.add_argument("--device", metavar="D", help="auto, cpu, cuda or cuda:1 (default: auto)")
    group.add_argument("--dtype", metavar="T", help="auto, float32, float16 or bfloat16 (default: the checkpoint's)")


def add_sampling_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the sampling parameters."""
    max_tokens = EngineConfig.model_fields["default_max_tokens"].default
    group = parser.add_argument_group("sampling", "Options that are not given have the model's own defaults.")
    group.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help=f"maximum number of new tokens (default: the model's, else {max_tokens}; fewer if the context is full)",
    )
    group.add_argument("--min-tokens", type=int, metavar="N", help="minimum number of new tokens")
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy; higher values are more random")
    group.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the most likely tokens with total probability P"
    )
    group.add_argument("--top-k", type=int, metavar="K", help="sample from the K most likely tokens; 0 disables it")
    group.add_argument("--seed", type=int, metavar="S", help="the same seed samples the same tokens")
    group.add_argument("--stop", action="append", metavar="TEXT", help="stop before this text; repeatable")
    constraint = group.add_mutually_exclusive_group()
    constraint.add_argument("--json-schema", metavar="FILE", help="the output is JSON that this schema admits")
    constraint.add_argument("--regex", metavar="R", help="the output is what this regular expression matches")
    constraint.add_argument("--choice", action="append", metavar="TEXT", help="the output is one of these; repeatable")
    return group


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `penstock bench --url`."""
    group = parser.add_argument_group(
        "load on a server",
        "Requests arrive at random times (a Poisson process), whether or not earlier ones were answered.",
    )
    group.add_argument("--url", metavar="URL", help="OpenAI-compatible server, such as http://127.0.0.1:8000")
    group.add_argument("--api-key", metavar="KEY", help="key of the server (default: $OPENAI_API_KEY)")
    group.add_argument("--endpoint", choices=("chat", "completions"), default="chat", help="default: chat")
    group.add_argument("--requests", type=positive, metavar="N", default=100, help="number of requests (default: 100)")
    group.add_argument("--rate", type=rate, metavar="R", default=math.inf, help="mean requests/s, else all at once")
    group.add_argument(
        "--concurrency",
        type=positive,
        metavar="C",
        help="at most C requests at once",
    )
    group.add_argument(
        "--prompt-words", type=positive, metavar="N", default=100, help="words per prompt (default: 100)"
    )
    group.add_argument(
        "--output-tokens", type=positive, metavar="N", default=64, help="maximum tokens per answer (default: 64)"
    )
    group.add_argument("--ignore-eos", action="store_true", help="generate exactly that many")
    group.add_argument("--temperature", type=float, metavar="T", help="default: what the server takes by itself")
    group.add_argument(
        "--disconnecting", type=share, metavar="S", default=0.0, help="share of clients that leave early (0 to 1)"
    )
    group.add_argument(
        "--slow-readers", type=share, metavar="S", default=0.0, help="share of clients that read a chunk per second"
    )
    group.add_argument("--seed", type=int, metavar="S", default=0, help="the same seed sends the same requests")
    group.add_argument("--plot", type=Path, metavar="FILE", help="save the distributions as a picture (.png, .svg)")


def engine_settings(args: argparse.Namespace) -> JsonObject:
    """Keywords of `EngineConfig` for the options that were given."""
    return {name: value for name in _ENGINE if (value := getattr(args, name, None)) is not None}


def sampling_settings(args: argparse.Namespace) -> JsonObject:
    """Keywords of `SamplingParams` for the options that were given.

    They are validated now, before a model is loaded. Raises `RequestError`.
    """
    settings = {name: value for name in _SAMPLING if (value := getattr(args, name, None)) is not None}
    if args.json_schema is not None:
        settings["structured_outputs"] = StructuredOutputs(json=_text_of(Path(args.json_schema)))
    elif args.regex is not None or args.choice is not None:
        settings["structured_outputs"] = StructuredOutputs(regex=args.regex, choice=args.choice)
    SamplingParams(**settings)
    return settings


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--json-schema {path}: {text_of(error)}") from None


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def rate(text: str) -> float:
    """A positive number, or inf, for argparse."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def share(text: str) -> float:
    """A number from 0 to 1, for argparse."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, got {text}")
    return value


def names_from(text: str, choices: tuple[str, ...]) -> list[str]:
    """The names in a comma-separated list. Raises `ConfigurationError` for one that is not among `choices`."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ConfigurationError(f"the list is empty: choose from {', '.join(choices)}")
    if unknown := [name for name in names if name not in choices]:
        raise ConfigurationError(f"unknown: {', '.join(map(repr, unknown))}; choose from {', '.join(choices)}")
    return names
