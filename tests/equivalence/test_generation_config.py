"""A request without parameters gives the tokens of `model.generate()` under the model's own generation config."""

from __future__ import annotations

import asyncio
from functools import cache
from typing import Any

import pytest
import torch
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from penstock import InferenceEngine, SamplingParams
from penstock.generation import default_params
from penstock.models.generation_defaults import generation_defaults
from penstock.outputs import RequestOutput
from tests.drive import prompts
from tests.tiny_models import build
from tests.tokenizers_for_tests import byte_level

TOKENIZER = byte_level()
SIZE = 480
ENDS = [2, TOKENIZER.convert_tokens_to_ids("<end>")]  # EOS, and what the chat template ends a turn with
NEW_TOKENS = 24
PROMPTS = [[7], *prompts(4, 40, 400, seed=5)[1:], [30, 31, 32, 33] * 4]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # transformers has something to say of most fields
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "speculating": {"enable_speculative_decoding": True, "drafter": "ngram", "speculation_length": 4},
    "preempting": {"kv_cache_tokens": 128, "block_size": 4, "max_sequence_length": 64},
}


@cache
def model_of(name: str) -> Any:
    return build(name, vocab_size=SIZE)


@cache
def favourites(name: str = "llama") -> tuple[int, ...]:
    """The tokens of the model's own greedy answers."""
    outputs = [by_transformers(model_of(name), prompt, {"max_new_tokens": NEW_TOKENS}) for prompt in PROMPTS]
    return tuple(dict.fromkeys(token for output in outputs for token in output))


def config_of(model: Any, fields: dict[str, Any]) -> GenerationConfig:
    return GenerationConfig(**{"eos_token_id": ENDS, "pad_token_id": 0} | fields)


def by_transformers(model: Any, prompt: list[int], fields: dict[str, Any]) -> list[int]:
    """New tokens up to the end, which transformers pads in a search with beams."""
    ids = torch.tensor([prompt])
    model.generation_config = config_of(model, fields)
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), tokenizer=TOKENIZER)[0, len(prompt) :].tolist()
    ends = [place for place, token in enumerate(out) if token in ENDS and place >= fields.get("min_new_tokens", 0)]
    return out[: ends[0] + 1] if ends else out


def params_of(model: Any, prompt: list[int], fields: dict[str, Any]) -> SamplingParams:
    """The parameters of a request without parameters, where the model has this generation config."""
    model.generation_config = config_of(model, fields)
    defaults, ignored = generation_defaults(model, SIZE, frozenset(ENDS), has_text=True)
    assert ignored == []
    return default_params(defaults, NEW_TOKENS, len(prompt))


def fields_of(name: str) -> dict[str, Any]:
    a, b, c, d, e, *_ = favourites()
    texts = [text for text in map(TOKENIZER.decode, favourites()) if text.isascii() and text.strip()]
    fields: dict[str, dict[str, Any]] = {
        "nothing": {},
        "max_new_tokens": {"max_new_tokens": 7},
        "max_length": {"max_length": 45},
        "min_new_tokens": {"min_new_tokens": 9, "sequence_bias": [[[2], 30.0]]},
        "min_length": {"min_length": 40, "sequence_bias": [[[2], 30.0]]},
        "repetition_penalty": {"repetition_penalty": 1.7},
        "suppress_tokens": {"suppress_tokens": [a, b, c, -1]},
        "begin_suppress_tokens": {"begin_suppress_tokens": list(favourites())},
        "bad_words_ids": {"bad_words_ids": [[a], [b, c], [c, d, e], [2]]},
        "no_repeat_ngram_size 1": {"no_repeat_ngram_size": 1},
        "no_repeat_ngram_size 2": {"no_repeat_ngram_size": 2},
        "no_repeat_ngram_size 3": {"no_repeat_ngram_size": 3},
        "forced_bos_token_id": {"forced_bos_token_id": 77, "begin_suppress_tokens": list(favourites())},
        "forced_eos_token_id": {"forced_eos_token_id": 2},
        "forced_eos_token_ids": {"forced_eos_token_id": [99, 98], "max_new_tokens": 6},
        "sequence_bias": {"sequence_bias": [[[a], -9.0], [[b, c], 20.0], [[d, c], 5.0], [[c], 2.5], [[9], 3.0]]},
        "stop_strings": {"stop_strings": [text for text in texts if text not in texts[:4]][:3]},
        "a stop in the first tokens": {"stop_strings": texts, "min_new_tokens": 20},
        "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (3, 1.4)},
        "shrinking decay": {"exponential_decay_length_penalty": (2, 0.5), "sequence_bias": [[[2], 8.0]]},
        "beams": {"num_beams": 3, "length_penalty": 0.5, "early_stopping": True},
    }
    mixed = ("repetition_penalty", "suppress_tokens", "bad_words_ids", "no_repeat_ngram_size 3", "sequence_bias")
    ends = ("max_new_tokens", "forced_eos_token_id", "begin_suppress_tokens", "exponential_decay_length_penalty")
    fields["several"] = {key: value for name in mixed for key, value in fields[name].items()}
    fields["all"] = fields["several"] | {key: value for name in ends for key, value in fields[name].items()}
    fields["beams and several"] = fields["beams"] | fields["several"]
    fields["beams and all"] = fields["beams"] | fields["all"] | {"renormalize_logits": True}
    return fields[name]


FIELDS = (
    "max_new_tokens", "max_length", "min_new_tokens", "min_length", "repetition_penalty",
    "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "no_repeat_ngram_size 1", "no_repeat_ngram_size 2",
    "no_repeat_ngram_size 3", "forced_bos_token_id", "forced_eos_token_id", "forced_eos_token_ids", "sequence_bias",
    "stop_strings", "a stop in the first tokens", "exponential_decay_length_penalty", "shrinking decay", "beams",
    "several", "all", "beams and several", "beams and all",
)  # fmt: skip


@cache
def expected(field: str) -> list[list[int]]:
    fields = fields_of(field)
    length = {} if {"max_new_tokens", "max_length"} & set(fields) else {"max_new_tokens": NEW_TOKENS}
    return [by_transformers(model_of("llama"), prompt, fields | length) for prompt in PROMPTS]


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_changes_the_tokens_of_transformers(field: str) -> None:
    assert expected(field) != expected("nothing")


@pytest.mark.usefixtures("steps_cost_the_same")
@pytest.mark.parametrize("setting", SETTINGS)
async def test_requests_run_as_transformers_would_under_each_generation_config(setting: str) -> None:
    """Five fields acted, the others were dropped without a word. All run at once, each row by its own rules."""
    model = model_of("llama")
    model.generation_config = config_of(model, {})
    async with InferenceEngine(model, TOKENIZER, **SETTINGS[setting]) as engine:
        handles = {
            field: [engine.generate(prompt, params_of(model, prompt, fields_of(field))) for prompt in PROMPTS]
            for field in FIELDS
        }
        for field, requests in handles.items():
            assert [(await handle).generated_ids for handle in requests] == expected(field), field
        stats = engine.get_stats()
    assert (stats["queue"]["num_preemptions"] > 0) == (setting == "preempting")
    assert (stats["totals"].get("drafted_tokens", 0) > 0) == (setting == "speculating")


async def test_a_request_without_parameters_follows_the_models_generation_config() -> None:
    fields = {"eos_token_id": [*ENDS, *favourites()[:2]], "max_length": 45, "suppress_tokens": list(favourites()[2:9])}
    model = model_of("llama")
    expected = [by_transformers(model, prompt, fields) for prompt in PROMPTS]
    async with InferenceEngine(model, TOKENIZER) as engine:
        outputs = await asyncio.gather(*(engine.generate(prompt) for prompt in PROMPTS))
        assert engine.default_params().suppress_tokens == favourites()[2:9]
    assert [output.generated_ids for output in outputs] == expected


WARPERS: dict[str, Any] = {
    "temperature": TemperatureLogitsWarper,
    "top_h": TopHLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
    "epsilon_cutoff": EpsilonLogitsWarper,
    "eta_cutoff": EtaLogitsWarper,
}
DRAWS: list[dict[str, float]] = [
    {},
    {"temperature": 0.6, "top_k": 0},
    {"top_p": 0.7},
    {"min_p": 0.2, "top_k": 0},
    {"top_h": 0.5, "top_k": 0},
    {"typical_p": 0.4, "top_k": 0},
    {"epsilon_cutoff": 0.05, "top_k": 0},
    {"eta_cutoff": 0.3, "top_k": 0},
    {"temperature": 1.5, "top_h": 0.8, "top_k": 20, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.8, "eta_cutoff": 0.02},
]


async def test_draws_are_made_from_the_distribution_that_transformers_draws_from() -> None:
    """A model that samples without setting top_k draws from the 50 likeliest, as transformers does."""
    model = build("llama", vocab_size=SIZE)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.3)
    rules = {"do_sample": True, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    params = [params_of(model, PROMPTS[2], rules | fields) for fields in DRAWS for _ in range(3)]
    model.generation_config = config_of(model, {})
    async with InferenceEngine(model, TOKENIZER, seed=1) as engine:
        outputs = await asyncio.gather(*(engine.generate(PROMPTS[2], request_params) for request_params in params))
    for fields, triple in zip(DRAWS, zip(*[iter(outputs)] * 3, strict=True), strict=True):
        for output in triple:
            assert output.outputs[0].sampled_logprobs == pytest.approx(sampled(model, output, fields), abs=2e-4), fields


def sampled(model: Any, output: RequestOutput, fields: dict[str, float]) -> list[float]:
    """The log probability of each token after transformers' processors."""
    chain: list[Any] = [RepetitionPenaltyLogitsProcessor(1.3), NoRepeatNGramLogitsProcessor(2)]
    values = {"top_k": 50} | fields
    chain += [WARPERS[name](values[name]) for name in WARPERS if values.get(name)]
    ids, found = torch.tensor(output.output_ids), []
    with torch.inference_mode():
        logits = model(ids).logits
    for place in range(len(output.prompt_token_ids), ids.shape[1]):
        scores = LogitsProcessorList(chain)(ids[:, :place], logits[:, place - 1].clone())
        found.append(float(scores.log_softmax(-1)[0, ids[0, place]]))
    return found
