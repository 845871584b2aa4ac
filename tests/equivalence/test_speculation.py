"""Speculation changes no token and no log probability, whoever guesses, and whatever else runs.

A draw has the random number of its position, drafts or not, so that sampled tokens are compared as exactly as greedy
ones. Greedy ones are also compared with plain transformers, by one forward pass over what was said.
"""

from __future__ import annotations

import asyncio
import atexit
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor, nn

from penstock import InferenceEngine, RequestOutput, SamplingParams
from penstock.config import EngineConfig
from penstock.demo import MODEL_DIR
from penstock.models.loading import load, load_draft
from penstock.models.sampler import Sampler
from penstock.optimizers.beam_search import BeamSearch
from penstock.optimizers.speculation.draft_model import ModelDrafter
from penstock.optimizers.speculation.drafter import NUM_CONFIDENCE_LEVELS, Drafter, DraftRequest
from penstock.optimizers.speculation.ngram import NgramDrafter
from penstock.optimizers.speculation.suffix import SuffixDrafter
from penstock.optimizers.speculation.verification import positions, verified
from penstock.scheduling.searches import Beams
from penstock.sequence import Sequence
from penstock.step import Row
from tests.drive import Driver, Guess, prompts, sequence
from tests.tiny_models import VOCAB, build

NEW_TOKENS = 32
PROMPTS = prompts(16, 120, VOCAB, seed=5)
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)
NAMES = ("llama", "gemma3_text", "gpt2", "qwen3")
SETTINGS: dict[str, dict[str, Any]] = {
    "big cache": {},
    "preempting, chunks of 24": {"num_blocks": 64, "enable_kv_cache": False, "max_num_batched_tokens": 24},
    "plain torch, small tier": {"disabled_rewrites": ("kernels",), "num_blocks": 64, "num_host_blocks": 100},
}


@cache
def folder_of(name: str, noise: float = 0.0) -> str:
    """A checkpoint; with noise on its weights it agrees with the one without now and then."""
    folder, model = tempfile.mkdtemp(prefix=f"penstock-{name}-"), build(name)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * parameter.std() * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@cache
def runner_of(name: str, plain: bool = False) -> Any:
    config = EngineConfig(skip_tokenizer_init=True, disabled_rewrites=("kernels",) if plain else ())
    return load(folder_of(name), None, config).runner


def crowd_of(params: SamplingParams) -> list[Sequence]:
    return [sequence(i, prompt, params) for i, prompt in enumerate(PROMPTS)]


@cache
def greedy_of(name: str) -> list[list[int]]:
    """Without speculation; each token is the one that transformers finds likeliest after those before it."""
    found = Driver(runner_of(name)).run(crowd_of(GREEDY))
    model: nn.Module = build(name)
    for prompt, output in zip(PROMPTS, found, strict=True):
        with torch.inference_mode():
            logits: Tensor = model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == output
    return found


def by(drafter: Drafter) -> Guess:
    """Up to five tokens for everybody, whether it pays or not."""

    def guess(seqs: list[Sequence]) -> list[tuple[int, ...]]:
        requests = [DraftRequest(seq, min(5, seq.max_len - seq.length), (0.9,) * NUM_CONFIDENCE_LEVELS) for seq in seqs]
        return [draft.tokens for draft in drafter.propose(requests)]

    return guess


def small_model(name: str) -> Drafter:
    """A model that is nearly the large one, in too small a cache."""
    runner = load_draft(folder_of(name, 0.02), runner_of(name).spec, EngineConfig(device="cpu"))
    runner.allocate(128, 4)
    return ModelDrafter(runner.guess, max_length=512, num_blocks=128, block_size=4, max_tokens=64)


DRAFTERS: dict[str, Callable[[str], Drafter]] = {
    "ngram": lambda _: NgramDrafter(),
    "suffix": lambda _: SuffixDrafter(),
    "draft_model": small_model,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_greedy_tokens_are_the_same_with_every_drafter(name: str, drafter: str) -> None:
    """4 models, 3 drafters, 3 settings, 16 requests, 32 tokens: 18,432 tokens."""
    for setting, options in SETTINGS.items():
        driver = Driver(runner_of(name, "disabled_rewrites" in options), **options)
        driver.guess = by(DRAFTERS[drafter](name))
        assert driver.run(crowd_of(GREEDY)) == greedy_of(name), setting
        assert 0 < driver.num_accepted <= driver.num_drafted
        assert setting == "big cache" or driver.scheduler.stats()["num_preemptions"] > 0


def knowing(outputs: dict[int, list[int]], seed: int) -> Guess:
    """Guesses what will be said, but for a token here and there."""
    rng = random.Random(seed)

    def one(seq: Sequence) -> list[int]:
        rest = outputs[seq.id][seq.num_generated :][: rng.randrange(7)]
        return [token if rng.random() < 0.8 else rng.randrange(VOCAB) for token in rest]

    return lambda seqs: [one(seq) for seq in seqs]


def backwards(output: list[int], logits: Tensor) -> Tensor:
    """Some processor that looks at what was said."""
    logits[output[-3:]] -= 3.0
    return logits


SAMPLED: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.8},
    "top-p": {"temperature": 1.0, "top_p": 0.8},
    "top-k and min-p": {"temperature": 1.2, "top_k": 20, "min_p": 0.02},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.4},
    "greedy with penalties": {"temperature": 0.0, "repetition_penalty": 1.3},
    "bias and bad words": {"logit_bias": {5: 2.0, 9: -3.0}, "bad_words": [[7], [11, 12], [3, 4, 5]]},
    "allowed tokens": {"allowed_token_ids": list(range(20, 90))},
    "a processor": {"logits_processors": [backwards]},
    "logprobs": {"logprobs": 3, "top_p": 0.9},
    "stop ids": {"stop_token_ids": list(range(12)), "min_tokens": 6},
}


@pytest.mark.parametrize("rules", SAMPLED)
@pytest.mark.parametrize("plain", [False, True], ids=["kernels", "plain torch"])
def test_sampled_tokens_are_the_same_and_so_are_their_logprobs(rules: str, plain: bool) -> None:
    params = SamplingParams(**{"max_tokens": NEW_TOKENS, "seed": 11, **SAMPLED[rules]})
    runner, stops = runner_of("llama", plain), frozenset(params.stop_token_ids or ())
    alone = Driver(runner)
    seqs = [sequence(i, prompt, params, stop_ids=stops) for i, prompt in enumerate(PROMPTS)]
    wanted = alone.run(seqs)
    driver = Driver(runner, num_blocks=64, max_num_batched_tokens=48)
    driver.guess = knowing(dict(enumerate(wanted)), seed=3)
    assert driver.run([sequence(i, prompt, params, stop_ids=stops) for i, prompt in enumerate(PROMPTS)]) == wanted
    assert driver.num_accepted > len(PROMPTS)
    assert driver.num_accepted < driver.num_drafted
    for i in range(len(PROMPTS)):
        for entry, before in zip(driver.logprobs[i], alone.logprobs[i], strict=True):
            assert (entry.token, entry.rank) == (before.token, before.rank)
            assert (entry.logprob, entry.sampled) == pytest.approx((before.logprob, before.sampled), abs=1e-5)
            assert [top[0] for top in entry.top] == [top[0] for top in before.top]


def mixed_crowd() -> tuple[list[Sequence], Beams]:
    """Single requests, three samples of one prompt, and a beam search."""
    params = SamplingParams(temperature=0.9, seed=4, max_tokens=NEW_TOKENS)
    seqs = [sequence(i, prompt, params) for i, prompt in enumerate(PROMPTS[:6])]
    three = replace(params, n=3)
    parent = sequence(20, PROMPTS[7], three, request_id="n")
    seqs += [parent] + [
        sequence(20 + k, PROMPTS[7], three, request_id="n", sample_index=k, parent=parent) for k in (1, 2)
    ]
    search = SamplingParams(use_beam_search=True, best_of=3, temperature=0.0, max_tokens=NEW_TOKENS)
    members = [sequence(30 + k, PROMPTS[8], search, request_id="b") for k in range(3)]
    return seqs, Beams(BeamSearch(search, NEW_TOKENS, frozenset()), members)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_samples_and_beams_in_the_same_steps_are_no_matter(name: str) -> None:
    found = []
    for speculates in (False, True):
        driver, (seqs, beams) = Driver(runner_of(name), num_blocks=160), mixed_crowd()
        driver.scheduler.search(beams, 0.0)
        if speculates:
            driver.guess = knowing(dict(zip([seq.id for seq in seqs], found[0], strict=False)), seed=1)
        found.append([*driver.run(seqs), *(seq.tokens[seq.prompt_len :] for seq in beams.members)])
        assert bool(driver.num_accepted) == speculates
    assert found[0] == found[1]


CODE = "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n\n\ndef mul(a, b):\n"
ENGINE: dict[str, Any] = {"dtype": "float32", "log_level": "ERROR", "enable_speculative_decoding": True}


@pytest.mark.usefixtures("steps_cost_the_same")
@pytest.mark.parametrize("drafter", DRAFTERS)
async def test_the_engine_says_the_same_and_tells_how_often_it_guessed_right(drafter: str) -> None:
    async with InferenceEngine(drafter=drafter, **ENGINE) as engine:

        async def run(**more: Any) -> list[RequestOutput]:
            params = [
                SamplingParams(max_tokens=96, ignore_eos=True, **{"temperature": 0.0, **more}),
                SamplingParams(max_tokens=96, ignore_eos=True, **{"temperature": 0.7, "seed": 5, **more}),
            ]
            return list(await asyncio.gather(*(engine.generate(CODE, one) for one in params)))

        guessed, plain = await run(), await run(speculation_length=0)
        engine.config.enable_speculative_decoding = False
        off = await run()
        totals = engine.get_stats()["totals"]
    for one, two, three in zip(guessed, plain, off, strict=True):
        assert one.generated_ids == two.generated_ids == three.generated_ids
        assert one.text == two.text == three.text
        assert one.outputs[0].token_logprobs == pytest.approx(two.outputs[0].token_logprobs, abs=1e-5)
        assert two.outputs[0].num_drafted_tokens == three.outputs[0].num_drafted_tokens == 0
    drafted = sum(one.outputs[0].num_drafted_tokens for one in guessed)
    accepted = sum(one.outputs[0].num_accepted_tokens for one in guessed)
    assert 0 < accepted <= drafted
    assert (totals["drafted_tokens"], totals["accepted_tokens"]) == (drafted, accepted)


async def test_stop_strings_inside_an_accepted_run_end_it_where_they_would_anyway() -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    async with InferenceEngine(drafter="suffix", **ENGINE) as engine:
        whole = (await engine.generate(CODE, greedy)).text
        for begin in range(5, len(whole) - 8, 7):
            params = replace(greedy, stop=[whole[begin : begin + 3]])
            fast = await engine.generate(CODE, params)
            plain = await engine.generate(CODE, replace(params, speculation_length=0))
            assert (fast.text, fast.generated_ids) == (plain.text, plain.generated_ids)
            assert fast.outputs[0].stop_reason == plain.outputs[0].stop_reason == params.stop[0]  # type: ignore[index]


async def test_forks_in_the_middle_of_a_draft_go_on_as_they_would_anyway() -> None:
    params = SamplingParams(temperature=0.8, seed=9, max_tokens=60, ignore_eos=True)
    async with InferenceEngine(drafter="ngram", **ENGINE) as engine:
        found = []
        for speculates in (False, True, True):
            engine.config.enable_speculative_decoding = speculates
            handle, read = engine.generate(CODE * 3, params), 0
            while read < 12:
                read += len((await anext(handle)).token_ids)
            outputs = await asyncio.gather(handle, *handle.fork(3, at=12))
            found.append([output.output_ids[0] for output in outputs])
    assert found[0] == found[1] == found[2]


@cache
def demo_logits() -> Tensor:
    """After a prompt, and after each of the two likeliest tokens that may follow it: float32 [3, V]."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(MODEL_DIR)(CODE)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    with torch.inference_mode():
        first = model(torch.tensor([ids])).logits[0, -1]
        rest = model(torch.tensor([[*ids, token] for token in first.topk(2).indices.tolist()])).logits[:, -1]
    return torch.cat([first[None], rest])


def test_tokens_that_were_guessed_follow_the_demo_models_distribution() -> None:
    """Chi-square over the second token, of those whose guessed first one was right."""
    logits, count = demo_logits() / 1.5, 6000
    guesses = demo_logits()[0].topk(2).indices.tolist()
    params, sampler = SamplingParams(max_tokens=None), Sampler(logits.shape[1], frozenset())
    counts = torch.zeros(2, logits.shape[1])
    for first in range(0, count, 200):
        rows = [
            Row(seed, [5, 6], 1, 3, None, True, params, 1, seed=seed, draft=(guesses[seed % 2],))  # type: ignore[arg-type]
            for seed in range(first, first + 200)
        ]
        places = [place for row in rows for place in positions(row)]
        seen = torch.stack([logits[0 if not place.draft else 1 + guesses.index(place.draft[0])] for place in places])
        for row, result in zip(rows, verified(rows, sampler.sample(seen, places)), strict=True):
            if result.num_accepted:
                counts[row.seed % 2, result.tokens[1]] += 1
    for i in range(2):
        expected = logits[1 + i].double().softmax(-1) * counts[i].sum()
        often = expected >= 5
        bins = torch.cat([counts[i][often].double(), counts[i][~often].sum()[None]])
        wanted = torch.cat([expected[often], expected[~often].sum()[None]])
        assert counts[i].sum() > 100
        assert chisquare(bins.numpy(), wanted.numpy()).pvalue > 0.001
