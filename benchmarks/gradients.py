"""How much faster is a packed forward and backward pass over a group than the padded batch of most trainers?

A group is completions of different lengths for one prompt. The padded batch repeats the prompt and pads every
completion to the longest, with the model's own attention; the packed row holds the prompt once and no padding. Both
compute the log probabilities of the completions and their gradients, in alternating order; the largest difference of
the log probabilities is printed too.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from harness.console import finish, progress, show
from harness.options import add_model_options, name_of, parser_for, source_of
from penstock.models.gradients.scorer import DifferentiableScorer

EPILOG = """examples:
  python benchmarks/gradients.py
  python benchmarks/gradients.py --shape qwen3-0.6b --group 8 --prompt 512 --completion 96 --pairs 3
"""
Ids = list[list[int]]


def main() -> None:
    args = arguments()
    model = load(args)
    prompts, completions = group(args, int(model.config.vocab_size))
    ways: dict[str, Callable[[], Sequence[Tensor]]] = {
        "padded": lambda: padded_logprobs(model, prompts, completions),
        "packed": lambda: packed_logprobs(model, prompts, completions),
    }
    logprobs = {name: torch.cat([*way()]).detach() for name, way in ways.items()}
    difference = float((logprobs["padded"] - logprobs["packed"]).abs().max())
    times: dict[str, list[float]] = {name: [] for name in ways}
    with progress(args.pairs) as step:
        for pair in range(args.pairs):
            for name in list(ways)[:: 1 if pair % 2 else -1]:
                times[name].append(timed(model, ways[name]))
            step("pair")
    ratios = [padded / packed for padded, packed in zip(times["padded"], times["packed"], strict=True)]
    rows = [(name, median(values), min(values), max(values)) for name, values in times.items()]
    show(f"{name_of(args)}: seconds for {args.group} completions", ("", "median", "min", "max"), rows)
    finish(
        {
            "model": name_of(args), "group": args.group, "prompt": args.prompt, "completion": args.completion,
            "seconds": {name: round(median(values), 3) for name, values in times.items()},
            "speedup": round(median(ratios), 2), "largest_difference": difference,
        }
    )  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = parser_for(__doc__, EPILOG)
    add_model_options(parser)
    parser.add_argument("--group", type=int, default=8, metavar="N", help="completions of the prompt (default 8)")
    parser.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens of the prompt (default 512)")
    parser.add_argument("--completion", type=int, default=96, metavar="N", help="most tokens of one (default 96)")
    parser.add_argument("--pairs", type=int, default=5, metavar="N", help="measurements of each way (default 5)")
    return parser.parse_args()


def load(args: argparse.Namespace) -> Any:
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, args.dtype or "float32")
    return AutoModelForCausalLM.from_pretrained(source_of(args), dtype=dtype, attn_implementation="sdpa").train()


def group(args: argparse.Namespace, vocabulary: int) -> tuple[Ids, Ids]:
    """The repeated prompt and the completions, the shortest half as long as the longest."""
    source = random.Random(0)
    lengths = [args.completion - i * args.completion // (2 * args.group) for i in range(args.group)]
    prompt = [source.randrange(vocabulary) for _ in range(args.prompt)]
    return [prompt] * args.group, [[source.randrange(vocabulary) for _ in range(length)] for length in lengths]


def padded_logprobs(model: Any, prompts: Ids, completions: Ids) -> list[Tensor]:
    longest = max(map(len, completions))
    padding = [longest - len(completion) for completion in completions]
    pairs = zip(prompts, completions, padding, strict=True)
    ids = torch.tensor([prompt + completion + [0] * pad for prompt, completion, pad in pairs])
    mask = torch.tensor([[1] * (ids.shape[1] - pad) + [0] * pad for pad in padding])
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=longest + 1, use_cache=False).logits[:, :-1]
    logprobs = logits.float().log_softmax(-1).gather(-1, ids[:, -longest:, None])[..., 0]
    return [row[: len(completion)] for row, completion in zip(logprobs, completions, strict=True)]


def packed_logprobs(model: Any, prompts: Ids, completions: Ids) -> list[Tensor]:
    return [score.logprobs for score in DifferentiableScorer(model).score(prompts, completions)]


def timed(model: Any, way: Callable[[], Sequence[Tensor]]) -> float:
    begin = time.perf_counter()
    torch.cat([*way()]).sum().backward()
    duration = time.perf_counter() - begin
    model.zero_grad()
    return duration


if __name__ == "__main__":
    main()
