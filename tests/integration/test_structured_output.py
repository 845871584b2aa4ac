"""Structured output of a real, tiny model through the whole engine: whatever runs beside it, a "stop" is valid."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from functools import cache
from typing import Any

import jsonschema
import pytest

from penstock import (
    GenerationConfig,
    GrammarError,
    InferenceEngine,
    RequestError,
    RequestOutput,
    SamplingParams,
    ScriptedModel,
    StructuredOutputs,
)
from tests.held_passes import Served, read
from tests.letters import LetterTokenizer
from tests.mutated_grammars import mutated_regexes, mutated_schemas
from tests.tiny_models import build
from tests.tokenizers_for_tests import byte_level

EOS = 2
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", 7, None]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
CONSTRAINTS: tuple[StructuredOutputs, ...] = (
    StructuredOutputs(json=PERSON),
    StructuredOutputs(regex="[0-9]{3}-[a-f]{1,6}"),
    StructuredOutputs(choice=["the first", "the second", "neither"]),
    StructuredOutputs(json={"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 6}),
    StructuredOutputs(grammar='start: "(" /[a-z]{1,5}/ ("," /[a-z]{1,5}/){2} ")"'),
)
SETTINGS: dict[str, Any] = {"block_size": 4, "log_level": "ERROR", "batch_timeout_ms": 0}


def new_model() -> Any:
    return build("llama", vocab_size=len(byte_level()), eos_token_id=EOS)


@cache
def model() -> Any:
    return new_model()


@pytest.fixture
async def engine() -> AsyncIterator[InferenceEngine]:
    async with InferenceEngine(model(), byte_level(), **SETTINGS) as engine:
        yield engine


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with Served(new_model(), byte_level(), **SETTINGS) as served:
        yield served


def greedy(structured: StructuredOutputs, **params: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 120, "structured_outputs": structured, **params})


def sampled(structured: StructuredOutputs, seed: int, **params: Any) -> SamplingParams:
    return greedy(structured, **{"temperature": 1.0, "seed": seed, **params})


def check(structured: StructuredOutputs, text: str) -> None:
    """Fail unless the text is what the constraint demands."""
    if structured.kind == "json":
        jsonschema.validate(json.loads(text), json.loads(structured.source))
    elif structured.kind == "regex":
        assert re.fullmatch(structured.source, text)
    elif structured.kind == "choice":
        assert text in json.loads(structured.source)
    else:
        assert re.fullmatch(r"\([a-z]{1,5}(,[a-z]{1,5}){2}\)", text)


def check_all(structured: StructuredOutputs, output: RequestOutput) -> int:
    """Check every completion that ended by itself; returns how many did."""
    complete = [completion for completion in output.outputs if completion.finish_reason == "stop"]
    for completion in complete:
        check(structured, completion.text)
    assert {completion.finish_reason for completion in output.outputs} <= {"stop", "length"}
    return len(complete)


async def test_every_output_that_stops_is_valid(engine: InferenceEngine) -> None:
    params = [sampled(structured, seed) for seed in range(8) for structured in CONSTRAINTS]
    outputs = await asyncio.gather(*(engine.generate(f"number {p.seed}", p) for p in params))
    assert sum(check_all(p.structured_outputs, output) for p, output in zip(params, outputs, strict=True)) > 30


async def test_greedy_tokens_are_the_same_alone_in_a_crowd_and_with_speculation(steps_cost_the_same: None) -> None:
    """Forced tokens are offered as drafts, so that speculation accepts some of them."""
    results: dict[str, list[list[int]]] = {}
    for speculates in (False, True):
        settings = {**SETTINGS, "enable_speculative_decoding": speculates}
        async with InferenceEngine(model(), byte_level(), **settings) as engine:
            alone = [await engine.generate("a prompt", greedy(structured)) for structured in CONSTRAINTS]
            crowd = [engine.generate(f"other {i}", SamplingParams(seed=i, max_tokens=40)) for i in range(6)]
            crowd += [engine.generate("a crowd", sampled(CONSTRAINTS[i % 5], i)) for i in range(6)]
            together = await asyncio.gather(*(engine.generate("a prompt", greedy(c)) for c in CONSTRAINTS))
            await asyncio.gather(*crowd)
            totals = engine.get_stats()["totals"]
        results[f"alone {speculates}"] = [output.generated_ids for output in alone]
        results[f"crowd {speculates}"] = [output.generated_ids for output in together]
        assert (totals["accepted_tokens"] > 0) == speculates
    first, *others = results.values()
    assert all(result == first for result in others)


async def test_forced_tokens_are_verified_drafts(steps_cost_the_same: None) -> None:
    names = ("alphabetical_order", "temperature_of_the_lake", "number_of_turbines")
    schema = {"type": "object", "properties": {name: {"enum": [0, 1]} for name in names}, "required": list(names)}
    structured = StructuredOutputs(json={**schema, "additionalProperties": False}, whitespace_pattern=" ")
    settings = {**SETTINGS, "enable_speculative_decoding": True, "speculation_length": 8}
    async with InferenceEngine(model(), byte_level(), **settings) as engine:
        [completion] = (await engine.generate("a prompt", greedy(structured, max_tokens=200))).outputs
        totals = engine.get_stats()["totals"]
    check(structured, completion.text)
    assert totals["accepted_tokens"] > len(completion.token_ids) / 3


@pytest.mark.parametrize("speculates", [False, True])
async def test_samples_forks_and_preemption_keep_every_output_valid(speculates: bool) -> None:
    """The cache is too small for all, so sequences are preempted and resume in the middle of their outputs."""
    settings = {**SETTINGS, "enable_speculative_decoding": speculates, "kv_cache_tokens": 240, "max_batch_size": 8}
    async with InferenceEngine(model(), byte_level(), **settings) as engine:
        requests = [(c, engine.generate("p", sampled(c, i, n=3))) for i, c in enumerate(CONSTRAINTS)]
        requests += [(c, engine.generate("q", sampled(c, 9, n=1, best_of=3))) for c in CONSTRAINTS]
        outputs = await asyncio.gather(*(handle for _, handle in requests))
        stats = engine.get_stats()
    assert [len(output.outputs) for output in outputs] == [3] * 5 + [1] * 5
    assert sum(check_all(c, output) for (c, _), output in zip(requests, outputs, strict=True)) > 10
    assert stats["queue"]["num_preemptions"] > 0


async def test_a_fork_goes_on_with_the_grammar_of_its_origin(served: Served) -> None:
    structured = CONSTRAINTS[0]
    handle = await served.begin("a prompt", greedy(structured, max_tokens=150), 6)
    forks = [*handle.fork(1), *handle.fork(3, sampled(structured, 3, max_tokens=120), at=4)]
    served.passes.arm(4)
    await read(forks[0], 3)
    forks += forks[0].fork(2, sampled(structured, 5, max_tokens=100))
    served.passes.release()
    origin, *branches = await asyncio.gather(handle, *forks)
    prompt_len = len(origin.prompt_token_ids)
    assert branches[0].output_ids[0] == origin.output_ids[0], "a greedy fork goes the same way"
    stopped = 0
    for branch in branches:
        if branch.outputs[0].finish_reason == "stop":
            text = byte_level().decode(branch.output_ids[0][prompt_len:], skip_special_tokens=True)
            check(structured, text)
            stopped += 1
    assert stopped >= 2


async def test_a_fork_whose_appended_tokens_break_the_grammar_is_refused(served: Served) -> None:
    handle = await served.begin("a prompt", greedy(StructuredOutputs(regex="[0-9]{100}"), max_tokens=120), 3)
    [fork] = handle.fork(1, append=byte_level().encode("x", add_special_tokens=False))
    served.passes.release()
    with pytest.raises(GrammarError, match="could not be continued"):
        await fork
    assert (await handle).outputs[0].finish_reason == "stop"


async def test_a_fork_with_another_constraint_begins_it_anew(served: Served) -> None:
    handle = await served.begin("a prompt", greedy(StructuredOutputs(regex="[0-9]{100}"), max_tokens=120), 5)
    letters = StructuredOutputs(regex="[a-z]{4}")
    [fork] = handle.fork(1, greedy(letters), at=5)
    served.passes.release()
    check(letters, (await fork).outputs[0].text)
    await handle


async def test_an_output_is_cut_at_its_length_and_complete_where_it_fits(engine: InferenceEngine) -> None:
    digits = StructuredOutputs(regex="[0-9]{3}")
    cut = await engine.generate("p", greedy(StructuredOutputs(regex="[0-9]{90}"), max_tokens=2))
    assert cut.outputs[0].finish_reason == "length"
    full = await engine.generate("p", greedy(digits))
    tokens = full.generated_ids
    assert byte_level().decode(tokens[:-1]) == full.outputs[0].text
    exact = await engine.generate("p", greedy(digits, max_tokens=len(tokens) - 1))
    assert (exact.outputs[0].finish_reason, exact.outputs[0].text) == ("stop", full.outputs[0].text)


async def test_with_ignore_eos_the_output_ends_where_nothing_may_follow(engine: InferenceEngine) -> None:
    output = await engine.generate("p", greedy(StructuredOutputs(regex="[0-9]{2,5}"), ignore_eos=True))
    assert output.outputs[0].finish_reason == "stop"
    assert re.fullmatch("[0-9]{5}", output.outputs[0].text)
    assert byte_level().decode(output.generated_ids) == output.outputs[0].text


async def test_rules_that_leave_no_token_end_their_request_alone(engine: InferenceEngine) -> None:
    neighbour = engine.generate("n", SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    digits = StructuredOutputs(regex="[0-9]{2}")
    for rules in ({"allowed_token_ids": [60]}, {"min_tokens": 20}):
        with pytest.raises(RequestError, match="no token is left to choose"):
            await engine.generate("p", greedy(digits, **rules))
    assert len((await neighbour).generated_ids) == 30


async def test_logprobs_stay_the_models_own(engine: InferenceEngine) -> None:
    output = await engine.generate("p", greedy(StructuredOutputs(choice=["zebra"]), logprobs=1))
    [completion] = output.outputs
    assert completion.logprobs is not None
    for token, entries in zip(completion.token_ids, completion.logprobs, strict=True):
        assert entries[token].logprob <= 0
    assert any(
        entries[token].rank != 1 for token, entries in zip(completion.token_ids, completion.logprobs, strict=True)
    )


async def test_grammar_and_stop_strings_sleep_until_the_reasoning_ends() -> None:
    tokenizer = byte_level()
    thought = tokenizer.encode("a stop, 12</think>", add_special_tokens=False)
    script = ScriptedModel([*thought, *[5] * 50], vocab_size=len(tokenizer), eos_token_ids=frozenset({EOS}))
    async with InferenceEngine(script, tokenizer, **SETTINGS) as engine:
        params = greedy(StructuredOutputs(regex="[0-9]{2}stop[0-9]"), reasoning_end="</think>", stop=["stop"])
        [completion] = (await engine.generate("p", params)).outputs
    assert re.fullmatch("a stop, 12</think>[0-9]{2}", completion.text)
    assert (completion.finish_reason, completion.stop_reason) == ("stop", "stop")


@pytest.mark.parametrize("speculates", [False, True])
async def test_a_model_that_reasons_cannot_end_before_its_output(speculates: bool) -> None:
    settings = {**SETTINGS, "enable_speculative_decoding": speculates}
    async with InferenceEngine(model(), byte_level(), **settings) as engine:
        for seed in range(6):
            params = sampled(CONSTRAINTS[1], seed, reasoning_end="e", max_tokens=300)
            [completion] = (await engine.generate("p", params)).outputs
            if completion.finish_reason == "stop":
                _, _, text = completion.text.partition("e")
                check(CONSTRAINTS[1], text)


async def test_a_scripted_model_follows_the_grammar() -> None:
    tokenizer = byte_level()
    wished = tokenizer.encode("yes or no", add_special_tokens=False)
    script = ScriptedModel([*wished, EOS], vocab_size=len(tokenizer), eos_token_ids=frozenset({EOS}))
    async with InferenceEngine(script, tokenizer, **SETTINGS) as engine:
        output = await engine.generate("p", greedy(StructuredOutputs(choice=["yes or no"])))
        assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("yes or no", "stop")
        output = await engine.generate("p", greedy(StructuredOutputs(regex="[0-9]{4}")))
        check(StructuredOutputs(regex="[0-9]{4}"), output.outputs[0].text)
        assert len((await engine.generate("p", greedy(StructuredOutputs(regex="y.{8}"), n=3))).outputs) == 3


@pytest.mark.parametrize("tokenizer", [LetterTokenizer(), None])
async def test_without_a_fast_tokenizer_the_request_says_so(tokenizer: Any) -> None:
    async with InferenceEngine(ScriptedModel([5]), tokenizer, skip_tokenizer_init=True, **SETTINGS) as engine:
        with pytest.raises(GrammarError, match="need a tokenizer of the Rust library"):
            await engine.generate([1, 2], greedy(CONSTRAINTS[1]))
        assert len((await engine.generate([1, 2], SamplingParams(max_tokens=3, detokenize=False))).generated_ids) == 3


async def test_a_generation_config_runs_beside_a_constraint(engine: InferenceEngine) -> None:
    plain = engine.generate("p", GenerationConfig(max_length=20, do_sample=False))
    assert check_all(CONSTRAINTS[2], await engine.generate("p", greedy(CONSTRAINTS[2]))) == 1
    assert (await plain).outputs


@pytest.mark.slow
async def test_mutated_schemas_and_expressions_are_refused_or_followed_and_delay_nobody() -> None:
    """The script asks for EOS every other token, so that outputs end; a plain stream runs beside them."""
    tokenizer = byte_level()

    def script(tokens: Any, sample_index: int) -> int:
        length = len(tokens)
        return EOS if length % 2 else (length * 7919 + sum(tokens[-3:])) % (len(tokenizer) - 10) + 5

    cases = [StructuredOutputs(json=schema) for schema in mutated_schemas(250, seed=13) if schema is not False]
    cases += [StructuredOutputs(regex=regex) for regex in mutated_regexes(250, seed=13)]
    fake = ScriptedModel(script, vocab_size=len(tokenizer), eos_token_ids=frozenset({EOS}), step_s=0.001)
    for _ in range(3):  # a busy machine may stop everything for a while
        gaps: list[float] = []
        async with InferenceEngine(fake, tokenizer, max_queue_size=1000, **SETTINGS) as engine:
            await engine.generate("warm", greedy(CONSTRAINTS[1]))
            watching = asyncio.create_task(watch(engine, gaps))
            outcomes = []
            for begin in range(0, len(cases), 10):
                handles = [engine.generate("p", greedy(case, max_tokens=60)) for case in cases[begin : begin + 10]]
                outcomes += await asyncio.gather(*handles, return_exceptions=True)
            watching.cancel()
        gaps.sort()
        if len(gaps) > 200 and gaps[-1 - len(gaps) // 200] < 0.1 and gaps[-1] < 1.0:
            break
    num_valid = num_refused = 0
    for case, outcome in zip(cases, outcomes, strict=True):
        if isinstance(outcome, BaseException):
            assert isinstance(outcome, GrammarError), outcome
            num_refused += 1
        elif outcome.outputs[0].finish_reason == "stop":
            check_mutated(case, outcome.outputs[0].text)
            num_valid += 1
    assert min(num_valid, num_refused) > 50
    assert len(gaps) > 200
    assert gaps[-1 - len(gaps) // 200] < 0.1
    assert gaps[-1] < 1.0


async def watch(engine: InferenceEngine, gaps: list[float]) -> None:
    """Note the gaps between the tokens of a plain stream."""
    last = None
    async for _ in engine.generate("plain", SamplingParams(max_tokens=None, ignore_eos=True)):
        now = time.perf_counter()
        if last is not None:
            gaps.append(now - last)
        last = now


def check_mutated(case: StructuredOutputs, text: str) -> None:
    if case.kind == "json":
        jsonschema.Draft202012Validator(json.loads(case.source)).validate(json.loads(text))
        return
    try:
        expression = re.compile(case.source)
    except (re.error, FutureWarning):  # means another thing in Rust's dialect
        return
    assert expression.fullmatch(text)
