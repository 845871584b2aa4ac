"""OpenVINO GenAI: pip install torch==2.13.0 openvino-genai "optimum-intel[openvino]" nncf; pip uninstall -y torchvision

It runs models that were exported to a folder OUT, with optimum-cli of the same environment:

    optimum-cli export openvino --model MODEL --task text-generation-with-past --weight-format fp16 OUT
    optimum-cli export openvino --model MODEL --task text-generation-with-past --weight-format int8 OUT

--hint bf16 suits fp16 exports where the processor has bfloat16 instructions, --hint f32 int8 exports.
"""

from __future__ import annotations

import time
from argparse import Namespace
from functools import partial
from typing import Any

from workloads import BORN, Limits, Run, Work, arguments, measure


def main() -> None:
    """Measure; workloads with a shared prefix on a separate pipeline, because a prefix cache slows the others down."""
    parser = arguments(__doc__)
    parser.add_argument("--hint", default="bf16", choices=("bf16", "f32"), help="precision of its arithmetic")
    parser.add_argument("--cache-gib", type=int, metavar="N", default=4, help="size of its K/V cache (default: 4 GiB)")
    args = parser.parse_args()
    begin = BORN
    for sharing in (False, True):
        group = [workload for workload in args.workloads if bool(workload.shared) == sharing]
        if group:
            load = partial(load_pipe, args.model, args.hint, args.cache_gib, sharing)
            measure(load, Namespace(**{**vars(args), "workloads": group}), begin)
            begin = time.perf_counter()


def load_pipe(model: str, hint: str, cache_gib: int, sharing: bool, limits: Limits) -> Run:
    """A continuous-batching pipeline on the CPU, with or without a prefix cache."""
    import openvino_genai

    config = openvino_genai.SchedulerConfig()
    config.cache_size = cache_gib
    config.max_num_batched_tokens = 2048
    config.max_num_seqs = max(64, limits.requests)
    config.dynamic_split_fuse = True
    config.enable_prefix_caching = sharing
    pipe = openvino_genai.ContinuousBatchingPipeline(model, config, "CPU", {"INFERENCE_PRECISION_HINT": hint})
    return partial(generate, pipe)


def generate(pipe: Any, work: Work) -> list[list[int]]:
    """Run all requests concurrently."""
    import numpy
    import openvino

    prompts = [openvino.Tensor(numpy.array([ids], dtype=numpy.int64)) for ids, _ in work]
    results = pipe.generate(prompts, [greedy(count) for _, count in work])
    return [list(result.m_generation_ids[0]) for result in results]


def greedy(count: int) -> Any:
    """Exactly `count` tokens, greedy."""
    import openvino_genai

    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = count
    config.ignore_eos = True
    config.do_sample = False
    return config


if __name__ == "__main__":
    main()
