"""`score`: the log probabilities of given tokens, as one request of an engine whose sampled token is discarded."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.api.protocols import Engine
from penstock.errors import RequestError
from penstock.sampling import SamplingParams
from penstock.values import token_ids


async def score(
    engine: Engine, prompt_ids: Sequence[int], completion_ids: Sequence[int], namespace: str
) -> list[float]:
    """`InferenceEngine.score`. Raises `RequestError`, and whatever awaiting a request raises."""
    prompt_ids, completion_ids = token_ids("prompt_ids", prompt_ids), token_ids("completion_ids", completion_ids)
    if not prompt_ids or not completion_ids:
        raise RequestError("score needs at least one prompt id and one completion id")
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    output = await engine.generate([*prompt_ids, *completion_ids], params, namespace=namespace)
    entries = (output.prompt_logprobs or [])[len(prompt_ids) :]
    return [entry[token].logprob for entry, token in zip(entries, completion_ids, strict=True) if entry]
