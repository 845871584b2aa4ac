"""Beam search finds the texts that `generate(num_beams=...)` of transformers finds, with the same scores."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from penstock import InferenceEngine
from penstock.demo import MODEL_DIR
from penstock.optimizers.beam_search import BeamSearch
from penstock.sampling import SamplingParams
from penstock.scheduling.searches import Beams
from penstock.sequence import Sequence
from tests.drive import Driver, prompts, sequence
from tests.tiny_models import VOCAB, build

NEW_TOKENS = 16
STOPS = frozenset(range(1, 12))  # so many that texts end at many lengths
PROMPTS = prompts(6, 60, VOCAB, seed=3)
ARCHITECTURES = ("llama", "gemma2", "gpt2", "qwen3", "opt", "mixtral")
Found = list[tuple[list[int], float]]


@cache
def model_of(name: str) -> Any:
    return build(name)


def params_of(width: int, **options: Any) -> SamplingParams:
    return SamplingParams(
        **{"use_beam_search": True, "best_of": width, "temperature": 0.0, "max_tokens": NEW_TOKENS} | options
    )


def by_transformers(name: str, prompt: list[int], params: SamplingParams) -> Found:
    """What transformers returns for one prompt: every text, best first, cut after its stop token, and its score."""
    ids, stops = torch.tensor([prompt]), sorted(STOPS)
    with torch.inference_mode():
        out = model_of(name).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=params.num_beams,
            num_return_sequences=params.num_beams,
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
            repetition_penalty=params.repetition_penalty,
            min_new_tokens=params.min_tokens or None,
            max_new_tokens=params.max_tokens,
            eos_token_id=stops,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    rows = [cut(row[len(prompt) :].tolist(), params.min_tokens) for row in out.sequences]
    return list(zip(rows, out.sequences_scores.tolist(), strict=True))


def cut(tokens: list[int], min_tokens: int) -> list[int]:
    ends = [i for i, token in enumerate(tokens) if token in STOPS and i >= min_tokens]
    return tokens[: ends[0] + 1] if ends else tokens


class Search:
    """One prompt's beams, ready to be scheduled."""

    def __init__(self, number: int, prompt: list[int], params: SamplingParams) -> None:
        fields: dict[str, Any] = {"stop_ids": STOPS, "request_id": f"r{number}"}
        self.members: list[Sequence] = []
        for i in range(params.num_beams):
            parent = self.members[0] if self.members else None
            self.members.append(sequence(100 * number + i, prompt, params, parent=parent, **fields))
        self.search = BeamSearch(params, NEW_TOKENS, STOPS)

    @property
    def found(self) -> Found:
        return [(seq.tokens[seq.prompt_len :], self.search.hypotheses[i].score) for i, seq in enumerate(self.members)]


def run(driver: Driver, given: list[list[int]], params: SamplingParams) -> list[Found]:
    searches = [Search(number, prompt, params) for number, prompt in enumerate(given)]
    for search in searches:
        driver.scheduler.search(Beams(search.search, search.members), 0.0)
    driver.run([])
    return [search.found for search in searches]


def check(found: Found, expected: Found) -> None:
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("width", [2, 4])
def test_texts_and_scores_are_those_of_transformers(name: str, width: int) -> None:
    params = params_of(width)
    for prompt, found in zip(PROMPTS, run(Driver(model_of(name)), PROMPTS, params), strict=True):
        check(found, by_transformers(name, prompt, params))


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [-0.5, 0.0, 1.0, 2.0])
def test_when_to_stop_and_what_length_is_worth_are_as_in_transformers(
    early_stopping: bool | str, length_penalty: float
) -> None:
    params = params_of(4, early_stopping=early_stopping, length_penalty=length_penalty)
    lengths = set()
    for prompt, found in zip(PROMPTS, run(Driver(model_of("llama")), PROMPTS, params), strict=True):
        check(found, by_transformers("llama", prompt, params))
        lengths |= {len(tokens) for tokens, _ in found}
    assert len(lengths) > 1 or length_penalty == 2.0


@pytest.mark.parametrize("rules", [{"min_tokens": 6}, {"repetition_penalty": 1.3}])
def test_rules_change_log_probabilities_as_in_transformers(rules: dict[str, Any]) -> None:
    params = params_of(3, **rules)
    for prompt, found in zip(PROMPTS, run(Driver(model_of("llama")), PROMPTS, params), strict=True):
        check(found, by_transformers("llama", prompt, params))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_blocks": 40, "enable_kv_cache": False},
        {"num_blocks": 40},
        {"max_num_batched_tokens": 7},
        {"max_batch_size": 3},
        {"block_size": 16, "num_blocks": 14},
    ],
    ids=str,
)
def test_preemption_chunks_and_neighbours_change_nothing(settings: dict[str, Any]) -> None:
    params = params_of(4)
    driver = Driver(model_of("llama"), **settings)
    for prompt, found in zip(PROMPTS, run(driver, PROMPTS, params), strict=True):
        check(found, by_transformers("llama", prompt, params))
    assert driver.cache.num_free_blocks == driver.cache.num_blocks


async def test_stop_strings_end_texts_as_in_transformers() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompt, width, stop = "def f", 4, "):\n"
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    module = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt")
    options: dict[str, Any] = {"num_beams": width, "num_return_sequences": width, "max_new_tokens": 8}
    with torch.inference_mode():
        out = module.generate(**ids, **options, do_sample=False, stop_strings=[stop], tokenizer=tokenizer)
    expected = tokenizer.batch_decode(out[:, ids.input_ids.shape[1] :], skip_special_tokens=True)
    beams = {"use_beam_search": True, "best_of": width, "n": width, "temperature": 0.0, "max_tokens": 8}
    params = SamplingParams(**beams, stop=[stop], include_stop_str_in_output=True)
    async with InferenceEngine(dtype="float32", log_level="ERROR") as engine:
        found = await engine.generate(prompt, params)
        deltas = [delta async for delta in engine.generate(prompt, params)]
    assert [out.text for out in found.outputs] == [cut_text(text, stop) for text in expected]
    assert stop in {out.stop_reason for out in found.outputs}
    assert [(delta.index, delta.text) for delta in deltas] == [(out.index, out.text) for out in found.outputs]


def cut_text(text: str, stop: str) -> str:
    """What comes with the stop string in one token is not shown here."""
    return text[: text.index(stop) + len(stop)] if stop in text else text
