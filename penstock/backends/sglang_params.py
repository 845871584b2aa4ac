"""A request's parameters in SGLang's vocabulary.

Pure functions that import nothing of SGLang. What SGLang lacks, or would change silently, is refused by name before
anything runs. Called by `SGLangEngine`.
"""

from __future__ import annotations

from json import dumps
from typing import Any

from penstock.backends.request_params import IGNORED, plain_params, refuse_unknown, refuse_whitespace_pattern
from penstock.errors import RequestError
from penstock.generation import Params
from penstock.sampling import SamplingParams
from penstock.structured_outputs import Kind, StructuredOutputs
from penstock.values import refused

# Parameters with the same meaning, each with SGLang's name for it.
NAMES = {
    **{name: name for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty")},
    **{name: name for name in ("repetition_penalty", "ignore_eos", "skip_special_tokens")},
    "spaces_between_special_tokens": "spaces_between_special_tokens",
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "include_stop_str_in_output": "no_stop_trim",
}
# The same in another form, or of the request's streams and not of their sampling.
TRANSLATED = (
    *("top_k", "stop", "stop_token_ids", "logit_bias", "seed", "structured_outputs"),
    *("n", "logprobs", "prompt_logprobs", "detokenize"),
)
LOWEST_TEMPERATURE = 1e-6  # SGLang takes a lower one for 0
HIGHEST_PENALTY = 2.0  # of repetition
MAX_STOPS = 32
_STRUCTURES: dict[Kind, str] = {
    "json": "json_schema",
    "json_object": "json_schema",
    "regex": "regex",
    "choice": "ebnf",
    "grammar": "ebnf",
}
_SEEDS = 1 << 63
_SEED_STEP = 0x9E3779B97F4A7C15  # between the samples of one prompt; odd, so that no two of them are equal

Arguments = dict[str, Any]  # of SGLang's `SamplingParams`, whose values are of many types


def check_params(params: Params) -> None:
    """Raise `RequestError` for what SGLang cannot do in one request."""
    if params is None:
        return
    plain = plain_params(params)
    refuse_unknown("SGLang", plain, (*NAMES, *TRANSLATED, *IGNORED))
    refuse_whitespace_pattern("SGLang", plain)
    if plain.temperature and plain.temperature < LOWEST_TEMPERATURE:
        raise refused("temperature", plain.temperature, f"0, or at least {LOWEST_TEMPERATURE} with SGLang")
    if plain.repetition_penalty > HIGHEST_PENALTY:
        raise refused("repetition_penalty", plain.repetition_penalty, f"at most {HIGHEST_PENALTY} with SGLang")
    if len(plain.stop or ()) > MAX_STOPS:
        raise refused("stop", f"{len(plain.stop or ())} strings", f"at most {MAX_STOPS} strings with SGLang")
    if plain.logprobs is not None and changes_logits(plain):
        raise RequestError(
            "SGLang has the log probabilities after penalties, biases, grammars and min_tokens only, not the model's: "
            "leave out logprobs or those"
        )


def changes_logits(params: SamplingParams) -> bool:
    """Whether SGLang's log probabilities are not the model's own."""
    return params.is_ruled or params.min_tokens > 0 or params.structured_outputs is not None


def sglang_arguments(params: SamplingParams, index: int) -> Arguments:
    """The arguments of SGLang's `SamplingParams` for one of the samples of a prompt."""
    arguments: Arguments = {theirs: getattr(params, ours) for ours, theirs in NAMES.items()}
    arguments["top_k"] = params.top_k if params.top_k > 0 else -1
    if params.stop:
        arguments["stop"] = list(params.stop)
    if params.stop_token_ids:
        arguments["stop_token_ids"] = list(params.stop_token_ids)
    if params.logit_bias:
        arguments["logit_bias"] = {str(token): bias for token, bias in params.logit_bias.items()}
    if params.seed is not None:
        arguments["sampling_seed"] = (params.seed + index * _SEED_STEP) % _SEEDS
    if params.structured_outputs is not None:
        arguments |= _structure(params.structured_outputs)
    return arguments


def _structure(structured: StructuredOutputs) -> Arguments:
    source = structured.source
    if structured.kind == "choice":
        source = "start: " + " | ".join(map(dumps, structured.choice or ()))
    return {_STRUCTURES[structured.kind]: source}
