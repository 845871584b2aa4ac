"""`InferenceModule`: generate, score, cache, call tools and update, over one copy of the weights."""

from time import perf_counter

import torch
import torch.nn.functional as F

from penstock import InferenceModule, create_inference_module

PROMPTS = ["def close(self):\n", "import os\n"]
SEARCH = {"name": "search", "description": "Search the web", "parameters": {"query": "string"}}


def main() -> None:
    policy = create_inference_module(dtype="float32", tool_parser="json")
    reference = InferenceModule(dtype="float32")
    result = policy.generate(PROMPTS, max_new_tokens=16, seed=1, return_logits=True, return_logprobs=True)
    print("generated:", [logits.shape for logits in result.logits or ()], result.metadata["finish_reasons"])

    start = perf_counter()
    policy.generate(PROMPTS, max_new_tokens=16, temperature=0)
    first, start = perf_counter() - start, perf_counter()
    policy.generate(PROMPTS, max_new_tokens=16, temperature=0)
    print("cached:", perf_counter() - start < first, policy.generation_cache)

    _, calls = policy.batch_generate_with_tools("Search for AI news", [SEARCH], max_new_tokens=16)
    print("tool calls:", [len(row) for row in calls])

    optimizer = torch.optim.SGD(policy.backend.model.parameters(), lr=0.5, weight_decay=0.1)
    for parameter in policy.backend.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with policy.updating():
        optimizer.step()
    logits = [module.get_logits(PROMPTS, result.token_ids).log_softmax(-1) for module in (policy, reference)]
    print(f"divergence after an update: {F.kl_div(*logits, reduction='batchmean', log_target=True):.3f}")


if __name__ == "__main__":
    main()
