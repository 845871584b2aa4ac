"""A request's parameters in vLLM's vocabulary.

Pure functions that import nothing of vLLM. What vLLM lacks, or would change silently, is refused by name before
anything runs. Called by `VLLMEngine`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from penstock.config import EngineConfig
from penstock.errors import RequestError, RequestTooLarge
from penstock.generation import GenerationConfig, Params, default_params
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
# Without effect on what is generated: the form of a stream, a limit on drafts, and what concerns beams and ranks only.
IGNORED = ("output_kind", "speculation_length", "early_stopping", "length_penalty", "renormalize_logits")
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 2.0  # vLLM raises a lower one to the first, and refuses a higher one
# New tokens of a request without parameters, unless the model's generation config limits them: as in the native engine.
NEW_TOKENS: int = EngineConfig.model_fields["default_max_tokens"].default
_DEFAULTS = SamplingParams()

Arguments = dict[str, Any]  # of `vllm.SamplingParams`, whose values are of many types


def is_expressible(name: str) -> bool:
    """Whether vLLM has a parameter of this name, or one that means the same."""
    return name in SAME or name in TRANSLATED or name in IGNORED


def check_params(params: Params) -> None:
    """Raise `RequestError` for what vLLM cannot do in one request."""
    if params is None:
        return
    plain = params.sampling_params() if isinstance(params, GenerationConfig) else params
    for field in fields(plain):
        if field.init and not is_expressible(field.name) and not _is_default(plain, field.name):
            raise RequestError(f"vLLM has no {field.name} in a request: leave it out, or use the native engine")
    if plain.temperature and not LOWEST_TEMPERATURE <= plain.temperature <= HIGHEST_TEMPERATURE:
        rule = f"0, or from {LOWEST_TEMPERATURE} to {HIGHEST_TEMPERATURE} with vLLM"
        raise refused("temperature", plain.temperature, rule)
    if plain.structured_outputs is not None and plain.structured_outputs.whitespace_pattern is not None:
        pattern = plain.structured_outputs.whitespace_pattern
        raise refused("whitespace_pattern", pattern, "None with vLLM, which has one setting for all requests")
    for word in plain.bad_words:
        if not isinstance(word, str):
            raise refused("bad_words", word, "strings with vLLM, which takes no token ids there")


def _is_default(params: SamplingParams, name: str) -> bool:
    value = getattr(params, name)
    return bool(value == getattr(_DEFAULTS, name)) or (name == "best_of" and value == params.n)


def resolve(params: Params, prompt_len: int, max_len: int, defaults: Mapping[str, Any]) -> SamplingParams:
    """The parameters with those that depend on prompt and model: `max_tokens`, and the model's own for None.

    `max_len` limits prompt and output together, in tokens. Raises `RequestError`, and `RequestTooLarge`.
    """
    room = max_len - prompt_len
    if room < 1:
        raise RequestTooLarge(f"the prompt has {prompt_len} tokens and max_model_len is {max_len}: shorten the prompt")
    if params is None:
        params = default_params(defaults, NEW_TOKENS, prompt_len)
        max_tokens = min(room, params.max_tokens or room)
    else:
        if isinstance(params, GenerationConfig):
            params = params.sampling_params(prompt_len, room)
        max_tokens = room if params.max_tokens is None else params.max_tokens
    if max_tokens > room:
        raise RequestTooLarge(
            f"{prompt_len} prompt tokens and max_tokens={max_tokens} exceed max_model_len={max_len}: "
            f"ask for at most {room}, or max_tokens=None for what fits"
        )
    if params.min_tokens > max_tokens:
        raise refused("min_tokens", params.min_tokens, f"at most max_tokens ({max_tokens})")
    return params if params.max_tokens == max_tokens else _with_max_tokens(params, max_tokens)


def _with_max_tokens(params: SamplingParams, max_tokens: int) -> SamplingParams:
    values = {field.name: getattr(params, field.name) for field in fields(params) if field.init}
    return SamplingParams(**(values | {"max_tokens": max_tokens}))


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
