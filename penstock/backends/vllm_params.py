"""A request's parameters in vLLM's vocabulary.

Pure functions that import nothing of vLLM. What vLLM lacks, or would change silently, is refused by name before
anything runs. Called by `VLLMEngine`.
"""

from __future__ import annotations

from typing import Any

from penstock.backends.request_params import IGNORED, plain_params, refuse_unknown, refuse_whitespace_pattern
from penstock.generation import Params
from penstock.sampling import RequestPriority, SamplingParams
from penstock.structured_outputs import StructuredOutputs
from penstock.values import refused

# Parameters with the same name and meaning.
SAME = (
    *("n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("max_tokens", "min_tokens", "ignore_eos", "include_stop_str_in_output", "detokenize", "skip_special_tokens"),
    *("spaces_between_special_tokens", "logprobs", "prompt_logprobs"),
)
# The same in another form.
TRANSLATED = ("stop", "stop_token_ids", "allowed_token_ids", "bad_words", "logit_bias", "seed", "structured_outputs")
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 2.0  # vLLM raises a lower one to the first, and refuses a higher one

Arguments = dict[str, Any]  # of `vllm.SamplingParams`, whose values are of many types


def check_params(params: Params) -> None:
    """Raise `RequestError` for what vLLM cannot do in one request."""
    if params is None:
        return
    plain = plain_params(params)
    refuse_unknown("vLLM", plain, (*SAME, *TRANSLATED, *IGNORED))
    refuse_whitespace_pattern("vLLM", plain)
    if plain.temperature and not LOWEST_TEMPERATURE <= plain.temperature <= HIGHEST_TEMPERATURE:
        rule = f"0, or from {LOWEST_TEMPERATURE} to {HIGHEST_TEMPERATURE} with vLLM"
        raise refused("temperature", plain.temperature, rule)
    for word in plain.bad_words:
        if not isinstance(word, str):
            raise refused("bad_words", word, "strings with vLLM, which takes no token ids there")


def vllm_arguments(params: SamplingParams, *, with_logprobs: bool) -> Arguments:
    """The arguments of `vllm.SamplingParams`, but for its enum and `structured_outputs`, which are vLLM's own types.

    Completions that would all be alike run once: vLLM refuses several of them. The log probability of the chosen token
    is asked for even if the caller did not (`with_logprobs`), because every output holds it.
    """
    arguments: Arguments = {name: getattr(params, name) for name in SAME}
    arguments["n"] = params.num_sequences
    arguments["logprobs"] = (params.logprobs or 0) if with_logprobs else None
    arguments["stop"], arguments["stop_token_ids"] = list(params.stop or ()), list(params.stop_token_ids or ())
    arguments["bad_words"] = list(params.bad_words)
    arguments["logit_bias"] = None if params.logit_bias is None else dict(params.logit_bias)
    arguments["allowed_token_ids"] = None if params.allowed_token_ids is None else list(params.allowed_token_ids)
    arguments["seed"] = None if params.seed is None else params.seed % 2**64  # vLLM takes -1 for none
    return arguments


def structure_arguments(structured: StructuredOutputs) -> Arguments:
    """The arguments of `vllm.sampling_params.StructuredOutputsParams`."""
    value = getattr(structured, structured.kind)
    return {structured.kind: list(value) if structured.kind == "choice" else value}


def vllm_priority(priority: RequestPriority) -> int:
    """vLLM serves lower numbers first."""
    return -int(priority)
