"""transformers on the CPU: pip install torch transformers (or this project's own environment)

`generate` on a static batch, padded on the left, sdpa attention; with --continuous its `generate_batch`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from workloads import Limits, Run, Work, arguments, measure

BATCH = 2048


def main() -> None:
    """Measure."""
    parser = arguments(__doc__)
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 (default) or float32")
    parser.add_argument("--continuous", action="store_true", help="measure generate_batch, continuous batching")
    args = parser.parse_args()
    measure(lambda limits: load(args.model, args.dtype, args.continuous, limits), args)


def load(model: str, dtype: str, continuous: bool, limits: Limits) -> Run:
    """The module and its own `generate`."""
    import torch
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    module = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    module.eval()
    return partial(run_continuous, module, limits) if continuous else partial(run_static, module)


def run_static(module: Any, work: Work) -> list[list[int]]:
    """One padded batch, which runs until its longest output is complete; shorter outputs are cut."""
    import torch

    width, longest = max(len(ids) for ids, _ in work), max(count for _, count in work)
    ids = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids, _ in work])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in work])
    options = {"do_sample": False, "min_new_tokens": longest, "max_new_tokens": longest, "repetition_penalty": 1.0}
    with torch.inference_mode():
        rows = module.generate(ids, attention_mask=mask, eos_token_id=None, pad_token_id=0, **options)
    return [row[width : width + count].tolist() for row, (_, count) in zip(rows, work, strict=True)]


def run_continuous(module: Any, limits: Limits, work: Work) -> list[list[int]]:
    """One call per output length, as `generate_batch` takes one for all, with a cache for what is asked of it."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    room = ContinuousBatchingConfig(max_batch_tokens=BATCH)
    room.num_blocks = limits.tokens // room.page_size + 2 * limits.requests
    outputs: list[list[int]] = [[] for _ in work]
    for count in sorted({count for _, count in work}):
        places = [i for i, (_, max_tokens) in enumerate(work) if max_tokens == count]
        config = GenerationConfig(max_new_tokens=count, eos_token_id=-1, pad_token_id=0, do_sample=False)
        outputs = module.generate_batch(
            [work[i][0] for i in places], config, continuous_batching_config=room, progress_bar=False
        )
        for place, result in zip(places, outputs.values(), strict=True):
            outputs[place] = result.generated_tokens
    return outputs


if __name__ == "__main__":
    main()
