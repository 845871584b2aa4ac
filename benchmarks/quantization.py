"""How much quality does int8 quantization cost, and how much memory does it save?

Scores text from this machine, the source or the documentation of Python's standard library, in float32 and then in the
checkpoint's own dtype, with int8 weights, with an int8 cache, and with both. Reported are the change in perplexity, the
fraction of positions with the same most likely token, and the bytes of the weights.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import contextlib
import math
import sysconfig
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from harness.console import finish, note, show
from harness.options import add_model_options, name_of, parser_for, settings_of, source_of
from penstock import EngineConfig, InferenceEngine, SamplingParams

EPILOG = """examples:
  python benchmarks/quantization.py
  python benchmarks/quantization.py --model ./my-chat-model --text docs
  python benchmarks/quantization.py --windows 100 --length 512
"""
WAYS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "as it is": {},
    "int8 weights": {"quantization": "int8"},
    "int8 weights and cache": {"quantization": "int8", "kv_cache_dtype": "int8"},
    "int8 cache": {"kv_cache_dtype": "int8"},
}
Scored = list[tuple[float, int]]
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def sources(files: Iterable[Path]) -> Iterator[str]:
    """The files themselves."""
    return (path.read_text(errors="ignore") for path in files)


def docs(files: Iterable[Path]) -> Iterator[str]:
    """The docstrings of each file, joined."""
    for text in sources(files):
        with contextlib.suppress(SyntaxError):
            places = (node for node in ast.walk(ast.parse(text)) if isinstance(node, DOCUMENTED))
            yield "\n\n".join(filter(None, map(ast.get_docstring, places)))


TEXTS = {"source": sources, "docs": docs}


def windows_of(tokenizer: Any, text: str, count: int, length: int) -> list[list[int]]:
    """Token ids of `count` pieces of the standard library, from files in alphabetical order, one piece a file."""
    texts = TEXTS[text](sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")))
    pieces = (tokenizer.encode(text[: 8 * length])[:length] for text in texts if len(text) > 8 * length)
    return list(islice(pieces, count))


async def score(engine: InferenceEngine, windows: list[list[int]]) -> Scored:
    """(logprob of the actual token, most likely token) at every position but the first."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    outputs = await asyncio.gather(*(engine.generate(window, params) for window in windows))
    scores: Scored = []
    for window, output in zip(windows, outputs, strict=True):
        for token, entry in zip(window[1:], (output.prompt_logprobs or [])[1:], strict=True):
            assert entry is not None
            scores.append((entry[token].logprob, max(entry, key=lambda token_id: entry[token_id].logprob)))
    return scores


async def measure(source: str, settings: dict[str, Any], windows: list[list[int]]) -> tuple[Scored, int]:
    """The scores, and the bytes of the weights."""
    config = EngineConfig(log_level="ERROR", enable_kv_cache=False, **settings)
    async with InferenceEngine(source, config=config) as engine:
        return await score(engine, windows), engine.get_stats()["weight_bytes"]


def compared(scores: Scored, exact: Scored) -> dict[str, float]:
    """Perplexity, its change, and the fraction of positions with the same most likely token."""
    nats, exact_nats = (-math.fsum(logprob for logprob, _ in scored) / len(scored) for scored in (scores, exact))
    agreement = sum(a[1] == b[1] for a, b in zip(scores, exact, strict=True)) / len(exact)
    return {"perplexity": math.exp(nats), "change": math.exp(nats - exact_nats) - 1, "agreement": agreement}


def main() -> None:
    """Measure, and print the table and the JSON line."""
    parser = parser_for(__doc__, EPILOG)
    add_model_options(parser)
    parser.add_argument("--text", choices=TEXTS, default="source", help="what is scored (default: source)")
    parser.add_argument("--windows", type=int, default=60, help="pieces of text (default: 60)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a piece (default: 256)")
    run(parser.parse_args())


def run(args: argparse.Namespace) -> None:
    """Measure what was asked for."""
    from transformers import AutoTokenizer

    source, base_settings = source_of(args), settings_of(args)
    windows = windows_of(AutoTokenizer.from_pretrained(source), args.text, args.windows, args.length)
    results: dict[str, dict[str, float]] = {}
    exact: Scored = []
    for name, settings in WAYS.items():
        note(name)
        scores, size = asyncio.run(measure(source, {**base_settings, **settings}, windows))
        exact = exact or scores
        results[name] = {**compared(scores, exact), "weight_bytes": size}
    rows = [[name, *result.values()] for name, result in results.items()]
    show(f"{name_of(args)}, {len(exact):,} tokens", ("", "perplexity", "change", "agreement", "weight bytes"), rows)
    finish({"model": name_of(args), "tokens": len(exact), "results": results})


if __name__ == "__main__":
    main()
