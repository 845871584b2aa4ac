"""The snippets of a widely read vLLM lesson run as they are written there, but for the import line and the model name.

Numbers like 003-57 in the docstrings are the rows of the requirements checklist. Comments and blank lines of the
snippets are left out. Some of these snippets fail on today's vLLM; here all of them must work.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from penstock import (
    LLM,
    AsyncEngineArgs,
    AsyncLLMEngine,
    ConfigurationError,
    OutOfMemory,
    OutputKind,
    RequestOutput,
    SamplingParams,
    ScriptedModel,
)
from penstock.demo import MODEL_DIR
from tests.tiny_models import build
from tests.tokenizers_for_tests import byte_level

HELLO = "Hello, my name is"
ATTEMPTS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random two-layer Llama with a tokenizer of 400 entries, as `save_pretrained` writes it."""
    path = str(tmp_path_factory.mktemp("tiny"))
    tokenizer = byte_level()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    build("llama", vocab_size=len(tokenizer), **ids).save_pretrained(path)  # type: ignore[operator]
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def demo() -> Iterator[LLM]:
    """The trained model that comes with the package, for what needs text that means something."""
    llm = LLM(model=str(MODEL_DIR), dtype="float32", max_num_seqs=16, max_model_len=256)  # bfloat16 logits tie
    yield llm
    llm.stop()


Run = Callable[..., SimpleNamespace]


@pytest.fixture
def run(folder: str) -> Run:
    """Runs a snippet as a script; gives its variables, and what it printed as `printed`."""

    def run_snippet(source: str, **names: Any) -> SimpleNamespace:
        for name in ("facebook/opt-125m", "meta-llama/Llama-2-7b-hf"):
            source = source.replace(f'"{name}"', repr(folder))
        printed: list[str] = []
        names |= {"__name__": "__main__", "print": lambda *words, **_: printed.append(" ".join(map(str, words)))}
        exec(compile(source.replace("from vllm", "from penstock"), "<lesson>", "exec"), names)
        return SimpleNamespace(**{name: value for name, value in names.items() if name.isidentifier()}, printed=printed)

    return run_snippet


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = monotonic() + seconds
    wake = threading.Event()
    while not condition():
        assert monotonic() < deadline, "the condition did not come true in time"
        wake.wait(0.005)


def engine_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("penstock")]


def check_completions(output: RequestOutput, most_tokens: int) -> None:
    """What holds for every finished request."""
    assert output.finished
    assert output.prompt_token_ids
    for index, completion in enumerate(output.outputs):
        assert completion.index == index
        assert isinstance(completion.text, str)
        assert 1 <= len(completion.token_ids) <= most_tokens
        assert all(isinstance(token, int) for token in completion.token_ids)
        assert completion.cumulative_logprob == pytest.approx(sum(completion.token_logprobs))
        assert completion.cumulative_logprob <= 0
        assert completion.finish_reason in ("stop", "length")
        if completion.finish_reason == "length":
            assert len(completion.token_ids) == most_tokens


# The LLM class.

FULL_CONSTRUCTOR = """
from vllm import LLM, SamplingParams
llm = LLM(model="facebook/opt-125m")
llm = LLM(
    model="meta-llama/Llama-2-7b-hf",
    tokenizer=None,
    tokenizer_mode="auto",
    trust_remote_code=False,
    tensor_parallel_size=1,
    dtype="auto",
    quantization=None,
    revision=None,
    tokenizer_revision=None,
    seed=0,
    gpu_memory_utilization=0.9,
    swap_space=4,
    max_model_len=None,
    download_dir=None,
    load_format="auto",
    disable_custom_all_reduce=False,
    enforce_eager=False,
    max_num_batched_tokens=None,
    max_num_seqs=256,
    max_paddings=256,
    disable_log_stats=False,
)
"""


def test_the_constructor_takes_every_parameter_of_the_lesson(run: Run) -> None:
    """003-1 to 003-21; `swap_space` and `max_paddings` are refused or ignored with a warning by today's vLLM."""
    llm = run(FULL_CONSTRUCTOR).llm
    config = llm.get_stats()["config"]
    assert (config["max_batch_size"], config["seed"], config["enable_metrics"]) == (256, 0, True)
    [output] = llm.generate([HELLO], SamplingParams(temperature=0.0, max_tokens=3))
    check_completions(output, 3)


def test_explicit_bytes_count_more_than_a_fraction_of_memory(folder: str) -> None:
    """003-11: 128 bytes a token, 16 tokens a block."""
    cache = LLM(folder, memory_pool_size=100 * 16 * 256).get_stats()["cache_info"]
    assert cache["num_blocks"] == 100


@pytest.mark.parametrize(
    ("setting", "remedy"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size must be 1"),
        ({"quantization": "fp8"}, "leave it out"),
        ({"load_format": "tar"}, "load_format"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
        ({"max_num_seq": 8}, "did you mean 'max_num_seqs'"),
    ],
)
def test_a_parameter_that_cannot_be_honoured_is_refused_with_the_remedy(
    folder: str, setting: dict[str, Any], remedy: str
) -> None:
    """003-5, 003-7, 003-11, 003-15."""
    with pytest.raises(ConfigurationError, match=remedy):
        LLM(folder, **setting)


@pytest.mark.parametrize("name", ["awq", "gptq", "squeezellm"])
def test_four_bit_formats_are_refused_with_what_to_load_instead(folder: str, name: str) -> None:
    """003-7."""
    with pytest.raises(ConfigurationError, match="original checkpoint, with quantization='int8'") as caught:
        LLM(folder, quantization=name)  # type: ignore[arg-type]
    assert f"(got '{name}')" in str(caught.value)


def test_the_remedy_for_four_bit_formats_works(folder: str) -> None:
    """003-7."""
    llm = LLM(folder, quantization="int8")
    check_completions(llm.generate(HELLO, SamplingParams(max_tokens=3))[0], 3)
    llm.stop()


def test_dtype_seed_and_length_take_effect(folder: str) -> None:
    """003-1 (a positional local path), 003-6, 003-10, 003-13, 003-19, 003-21."""
    settings: dict[str, Any] = {"dtype": "bfloat16", "max_model_len": 32, "max_num_seqs": 2, "disable_log_stats": True}
    first, second = (LLM(folder, seed=7, **settings) for _ in range(2))
    params = SamplingParams(temperature=1.0, max_tokens=8)
    one, two = ([out.generated_ids for out in llm.generate([HELLO] * 4, params)] for llm in (first, second))
    assert one == two
    assert len({tuple(tokens) for tokens in one}) > 1
    assert first.get_stats()["performance_metrics"] == {}
    [whole] = first.generate(HELLO, SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True))
    assert len(whole.prompt_token_ids) + len(whole.generated_ids) == 32


LOGGING = """
from vllm import LLM
import logging
logging.basicConfig(level=logging.INFO)
llm = LLM(model="facebook/opt-125m")
"""


def test_loading_logs_its_three_lines_in_order(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """003-22, 003-23."""
    caplog.set_level(logging.INFO)
    run(LOGGING)
    lines = [record.getMessage() for record in caplog.records if record.name == "penstock"]
    wanted = ("Initializing an LLM engine (v", "Model weights loaded.", "# GPU blocks: ")
    assert [next(i for i, line in enumerate(lines) if text in line) for text in wanted] == [0, 1, 2]
    assert "with config:" in lines[0]
    assert "# CPU blocks: " in lines[2]
    assert {record.levelname for record in caplog.records if record.name == "penstock"} == {"INFO"}


# SamplingParams.

PARAMETERS = """
from vllm import SamplingParams
sampling_params = SamplingParams(
    temperature=0.0,
    max_tokens=100,
)
sampling_params = SamplingParams(
    temperature=0.8,
    top_p=0.95,
    top_k=50,
    max_tokens=200,
    stop=["</s>", "\\n\\n"],
    presence_penalty=0.0,
    frequency_penalty=0.0,
    repetition_penalty=1.0,
    length_penalty=1.0,
    n=1,
    best_of=None,
    use_beam_search=False,
    logprobs=None,
    prompt_logprobs=None,
    skip_special_tokens=True,
    spaces_between_special_tokens=True,
    min_tokens=0,
)
"""


def test_every_sampling_parameter_of_the_lesson_is_accepted(run: Run, demo: LLM) -> None:
    """003-36 to 003-52."""
    [output] = demo.generate(["def f():\n"], run(PARAMETERS).sampling_params)
    check_completions(output, 200)
    assert "\n\n" not in output.text


STRATEGIES = """
from vllm import SamplingParams
greedy = SamplingParams(temperature=0.0, max_tokens=100)
nucleus = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=200)
topk = SamplingParams(temperature=1.0, top_k=50, max_tokens=200)
multi = SamplingParams(
    n=5,
    temperature=0.8,
    max_tokens=100
)
constrained = SamplingParams(
    temperature=0.0,
    max_tokens=50,
    stop=[".", "!", "?"],
    min_tokens=10,
)
"""


def test_the_strategies_run_side_by_side(run: Run, demo: LLM) -> None:
    """003-54 to 003-56, 003-58, 003-59."""
    found = run(STRATEGIES)
    strategies = [found.greedy, found.nucleus, found.topk, found.multi, found.constrained]
    outputs = demo.generate(["class Reader:\n"] * 5, strategies)
    for output, params in zip(outputs, strategies, strict=True):
        check_completions(output, params.max_tokens)
    assert [len(output.outputs) for output in outputs] == [1, 1, 1, 5, 1]
    assert len({tuple(completion.token_ids) for completion in outputs[3].outputs}) > 1
    assert len(outputs[4].generated_ids) >= 10
    if outputs[4].outputs[0].finish_reason == "stop":
        assert outputs[4].outputs[0].stop_reason in (".", "!", "?", None)


BEAM = """
from vllm import SamplingParams
beam = SamplingParams(
    use_beam_search=True,
    best_of=5,
    temperature=0.0,
    max_tokens=100
)
"""


def test_beam_search_finds_a_likelier_text_than_greedy_decoding(run: Run, demo: LLM) -> None:
    """003-57: the width is `best_of`, and one text comes back."""
    params = run(BEAM).beam
    greedy = SamplingParams(temperature=0.0, max_tokens=100)
    [found], [plain] = demo.generate("class Reader:\n", params), demo.generate("class Reader:\n", greedy)
    check_completions(found, 100)
    [best] = found.outputs
    assert best.score == pytest.approx(best.cumulative_logprob / len(best.token_ids))
    assert best.score > plain.outputs[0].cumulative_logprob / len(plain.generated_ids)


def test_best_of_returns_the_likeliest_candidates(demo: LLM) -> None:
    """003-46 and 003-44: `best_of` and `length_penalty` are keyword arguments that today's vLLM refuses."""
    best = SamplingParams(n=2, best_of=4, length_penalty=1.0, temperature=1.0, max_tokens=6, seed=3)
    four = SamplingParams(n=4, temperature=1.0, max_tokens=6, seed=3)
    [chosen], [candidates] = demo.generate("import", best), demo.generate("import", four)
    check_completions(chosen, 6)
    scores = sorted((out.cumulative_logprob for out in candidates.outputs), reverse=True)
    assert [out.cumulative_logprob for out in chosen.outputs] == pytest.approx(scores[:2], abs=1e-3)


@pytest.mark.parametrize("temperature", [0.0, 0.3, 0.7, 1.0, 2.0])
def test_every_temperature_of_the_table_works(demo: LLM, temperature: float) -> None:
    """003-36, 003-64."""
    prompt = "The capital of France is"
    [output] = demo.generate(prompt, SamplingParams(temperature=temperature, max_tokens=8, seed=1))
    check_completions(output, 8)


def test_top_k_of_one_and_a_tiny_top_p_are_greedy(demo: LLM) -> None:
    """003-37, 003-38, 003-64."""
    tables = {"top_p": (0.1, 0.5, 0.9, 1.0), "top_k": (1, 10, 50, 100)}
    settings: list[dict[str, Any]] = [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}]
    settings += [{name: value} for name, values in tables.items() for value in values]
    outputs = demo.generate(["import os"] * len(settings), [SamplingParams(**s, max_tokens=8) for s in settings])
    for output in outputs:
        check_completions(output, 8)
    assert outputs[0].generated_ids == outputs[1].generated_ids == outputs[2].generated_ids
    assert outputs[0].generated_ids == outputs[7].generated_ids


def test_penalties_change_what_is_drawn(demo: LLM) -> None:
    """003-41 to 003-43: the greedy text of a small model repeats itself, with a penalty it does not."""
    greedy = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    penalties: list[dict[str, Any]] = [
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"repetition_penalty": 1.8},
    ]
    params = [greedy, *(dataclasses.replace(greedy, **penalty) for penalty in penalties)]
    plain, *penalised = demo.generate(["The name of"] * 4, params)
    for output in penalised:
        assert len(set(output.generated_ids)) > len(set(plain.generated_ids))


def test_prompt_logprobs_have_one_entry_per_prompt_token(demo: LLM) -> None:
    """003-48, 003-49, 003-75."""
    [output] = demo.generate("def f(x):", SamplingParams(temperature=0.0, max_tokens=2, logprobs=0, prompt_logprobs=2))
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    for token, entries in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
        assert entries is not None
        assert token in entries
        assert 2 <= len(entries) <= 3
    assert [len(entries) for entries in output.outputs[0].logprobs or ()] == [1] * len(output.generated_ids)


def test_special_tokens_are_skipped_unless_asked_for() -> None:
    """003-50, 003-51."""
    tokenizer = byte_level()
    end = tokenizer.convert_tokens_to_ids("<end>")
    ok = tokenizer.encode("ok", add_special_tokens=False)
    llm = LLM(ScriptedModel([end, *ok], max_length=64), tokenizer)  # type: ignore[list-item]
    kept = SamplingParams(max_tokens=3, skip_special_tokens=False, spaces_between_special_tokens=False)
    [hidden], [shown] = llm.generate("a", SamplingParams(max_tokens=3)), llm.generate("a", kept)
    assert (hidden.text, shown.text) == ("ok", "<end>ok")
    llm.stop()


def test_the_newer_parameters_work_too(demo: LLM) -> None:
    """003-53."""
    [free] = demo.generate("x =", SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
    first, third = free.generated_ids[0], free.generated_ids[2]
    bounds = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
    wanted: list[dict[str, Any]] = [
        {"logit_bias": {first: -100.0}},
        {"allowed_token_ids": [first]},
        {"bad_words": [[first]]},
        {"stop_token_ids": [third]},
        {"min_p": 1.0, "temperature": 1.0},
    ]
    biased, allowed, bad, stopped, likeliest = demo.generate(
        ["x ="] * 5, [SamplingParams(**bounds | w) for w in wanted]
    )
    assert first not in biased.generated_ids
    assert set(allowed.generated_ids) == {first}
    assert first not in bad.generated_ids
    assert stopped.outputs[0].finish_reason == "stop"
    assert stopped.outputs[0].stop_reason == third
    assert stopped.generated_ids[-1] == third
    assert likeliest.generated_ids == free.generated_ids


# Basic inference.

EXAMPLE_1 = """
from vllm import LLM, SamplingParams
llm = LLM(model="facebook/opt-125m")
prompts = [
    "The future of AI is",
    "Once upon a time",
    "The meaning of life is",
]
sampling_params = SamplingParams(
    temperature=0.8,
    top_p=0.95,
    max_tokens=100
)
outputs = llm.generate(prompts, sampling_params)
for output in outputs:
    prompt = output.prompt
    generated_text = output.outputs[0].text
    print(f"Prompt: {prompt!r}")
    print(f"Generated: {generated_text!r}")
    print("-" * 80)
"""


def test_example_1_simple_generation(run: Run) -> None:
    """003-24, 003-32, 003-33, 003-65 (three prompts)."""
    found = run(EXAMPLE_1)
    assert [output.prompt for output in found.outputs] == found.prompts
    assert found.printed[::3] == [f"Prompt: {prompt!r}" for prompt in found.prompts]
    for output in found.outputs:
        check_completions(output, 100)


EXAMPLE_2 = """
from vllm import LLM, SamplingParams
llm = LLM(model="facebook/opt-125m")
prompts = ["Hello, my name is"]
sampling_params = SamplingParams(
    temperature=0.0,
    max_tokens=20,
    logprobs=5,
)
outputs = llm.generate(prompts, sampling_params)
for output in outputs:
    print(f"Prompt: {output.prompt}")
    print(f"Generated text: {output.outputs[0].text}")
    print(f"\\nGenerated tokens: {output.outputs[0].token_ids}")
    print(f"Cumulative logprob: {output.outputs[0].cumulative_logprob}")
    print(f"Finish reason: {output.outputs[0].finish_reason}")
    if output.outputs[0].logprobs:
        print("\\nPer-token log probabilities:")
        for token_id, logprobs_dict in zip(
            output.outputs[0].token_ids,
            output.outputs[0].logprobs
        ):
            print(f"  Token {token_id}: {logprobs_dict}")
"""


def test_example_2_detailed_output(run: Run) -> None:
    """003-48, 003-60, 003-70."""
    [output] = run(EXAMPLE_2).outputs
    check_completions(output, 20)
    completion = output.outputs[0]
    assert completion.logprobs is not None
    for token, chosen, entries in zip(
        completion.token_ids, completion.token_logprobs, completion.logprobs, strict=True
    ):
        assert len(entries) == 5  # greedy: the chosen token is one of the five
        assert entries[token].rank == 1
        assert entries[token].logprob == pytest.approx(chosen)
        assert entries[token].logprob == max(entry.logprob for entry in entries.values())
        assert isinstance(entries[token].decoded_token, str)


EXAMPLE_3 = """
from vllm import LLM, SamplingParams
llm = LLM(model="facebook/opt-125m")
prompts = ["The best way to learn programming is"]
sampling_params = SamplingParams(
    temperature=0.8,
    max_tokens=50,
    n=5,
)
outputs = llm.generate(prompts, sampling_params)
for output in outputs:
    print(f"Prompt: {output.prompt}\\n")
    for i, completion in enumerate(output.outputs, 1):
        print(f"Completion {i}:")
        print(f"  {completion.text}")
        print(f"  Logprob: {completion.cumulative_logprob:.2f}")
        print()
"""


def test_example_3_multiple_completions(run: Run) -> None:
    """003-61, 003-65 (the best by logprob), 003-69: a cumulative logprob without asking for logprobs."""
    [output] = run(EXAMPLE_3).outputs
    check_completions(output, 50)
    assert len(output.outputs) == 5
    assert all(completion.logprobs is None for completion in output.outputs)
    best = max(output.outputs, key=lambda completion: completion.cumulative_logprob)
    assert best.cumulative_logprob < 0


EXAMPLE_4 = """
from vllm import LLM, SamplingParams
llm = LLM(model="facebook/opt-125m")
sampling_params = SamplingParams(
    temperature=0.0,
    max_tokens=200,
    stop=["\\n\\n", "END", "</s>"],
    min_tokens=10,
)
prompts = ["Write a short paragraph about AI:\\n"]
outputs = llm.generate(prompts, sampling_params)
for output in outputs:
    print(output.outputs[0].text)
    print(f"\\nFinish reason: {output.outputs[0].finish_reason}")
"""


def test_example_4_stopping_criteria(run: Run, demo: LLM) -> None:
    """003-40, 003-52, 003-65, 003-71: 'stop' by a stop string that is not in the text, 'length' by max_tokens."""
    found = run(EXAMPLE_4)
    check_completions(found.outputs[0], 200)
    assert found.printed[1] == f"\nFinish reason: {found.outputs[0].outputs[0].finish_reason}"
    [whole] = demo.generate("def f():\n", SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True))
    stop = whole.text[10:14]
    [cut] = demo.generate("def f():\n", SamplingParams(temperature=0.0, max_tokens=12, stop=[stop]))
    assert (cut.outputs[0].finish_reason, cut.outputs[0].stop_reason) == ("stop", stop)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert whole.outputs[0].finish_reason == "length"


# Batches.

BATCH = """
from vllm import LLM, SamplingParams
import time
llm = LLM(model="facebook/opt-125m")
prompts = [
    f"Question {i}: What is the meaning of life?"
    for i in range(100)
]
sampling_params = SamplingParams(
    temperature=0.0,
    max_tokens=50
)
start = time.time()
outputs = llm.generate(prompts, sampling_params)
end = time.time()
print(f"Processed {len(prompts)} prompts in {end - start:.2f} seconds")
print(f"Throughput: {len(prompts) / (end - start):.2f} requests/second")
"""


def test_a_hundred_prompts_are_batched_by_themselves(run: Run) -> None:
    """003-25, 003-33, 003-65 (fifty and more prompts equal one by one)."""
    for _ in range(ATTEMPTS):  # a sender that has to wait for its turn sends no batch
        found = run(BATCH)
        if found.llm.get_stats()["performance_metrics"]["batch_size"]["max"] > 50:
            break
    assert [output.prompt for output in found.outputs] == found.prompts
    for output in found.outputs:
        check_completions(output, 50)
    assert found.llm.get_stats()["performance_metrics"]["batch_size"]["max"] > 50
    alone = [found.llm.generate(prompt, found.sampling_params, use_tqdm=False)[0] for prompt in found.prompts[::33]]
    assert [output.generated_ids for output in alone] == [output.generated_ids for output in found.outputs[::33]]


STREAMING_VS_BATCH = """
from vllm import LLM, SamplingParams
import time
llm = LLM(model="facebook/opt-125m")
prompts = ["Explain quantum computing in simple terms"] * 10
sampling_params = SamplingParams(temperature=0.0, max_tokens=100)
start = time.time()
outputs = llm.generate(prompts, sampling_params)
batch_time = time.time() - start
print(f"Batch mode: {batch_time:.2f}s")
print(f"Throughput: {len(prompts) / batch_time:.2f} req/s")
"""


def test_equal_prompts_in_one_batch_get_equal_greedy_texts(run: Run) -> None:
    """003-24."""
    outputs = run(STREAMING_VS_BATCH).outputs
    assert len(outputs) == 10
    assert len({tuple(output.generated_ids) for output in outputs}) == 1


# Async.

ASYNC = """
import asyncio
from vllm import AsyncLLMEngine, AsyncEngineArgs, SamplingParams
async def main():
    engine_args = AsyncEngineArgs(
        model="facebook/opt-125m",
        max_model_len=512
    )
    engine = AsyncLLMEngine.from_engine_args(engine_args)
    sampling_params = SamplingParams(temperature=0.0, max_tokens=50)
    prompts = ["Hello world", "How are you?", "What is AI?"]
    tasks = []
    for i, prompt in enumerate(prompts):
        request_id = f"request-{i}"
        task = engine.generate(prompt, sampling_params, request_id)
        tasks.append(task)
    results = await asyncio.gather(*tasks)
    for result in results:
        print(f"Prompt: {result.prompt}")
        print(f"Output: {result.outputs[0].text}")
        print("-" * 80)
    seen.extend(results)
if __name__ == "__main__":
    asyncio.run(main())
"""


def test_gather_over_generate_works(run: Run) -> None:
    """003-26 to 003-30, 003-72: fails on vLLM with "an awaitable is required"."""
    seen: list[RequestOutput] = []
    found = run(ASYNC, seen=seen)
    assert found.printed[::3] == ["Prompt: Hello world", "Prompt: How are you?", "Prompt: What is AI?"]
    assert [result.request_id for result in seen] == ["request-0", "request-1", "request-2"]
    for result in seen:
        check_completions(result, 50)


ASYNC_STREAMING = """
import asyncio
from vllm import AsyncLLMEngine, AsyncEngineArgs, SamplingParams
async def stream_generate(engine, prompt, sampling_params, request_id):
    results_generator = engine.generate(prompt, sampling_params, request_id)
    print(f"Prompt: {prompt}")
    print("Streaming output: ", end="", flush=True)
    async for request_output in results_generator:
        text = request_output.outputs[0].text
        print(text, end="", flush=True)
        shown[request_id].append(request_output)
    print("\\n" + "-" * 80)
async def main():
    engine_args = AsyncEngineArgs(model="facebook/opt-125m")
    engine = AsyncLLMEngine.from_engine_args(engine_args)
    sampling_params = SamplingParams(temperature=0.8, max_tokens=100)
    prompts = [
        "The future of AI",
        "Once upon a time",
    ]
    tasks = [
        stream_generate(engine, prompt, sampling_params, f"req-{i}")
        for i, prompt in enumerate(prompts)
    ]
    await asyncio.gather(*tasks)
if __name__ == "__main__":
    asyncio.run(main())
"""


def test_streaming_shows_all_text_so_far(run: Run) -> None:
    """003-31: every item holds the text from the beginning; only the last one is finished."""
    shown: dict[str, list[RequestOutput]] = {"req-0": [], "req-1": []}
    run(ASYNC_STREAMING, shown=shown)
    for outputs in shown.values():
        texts, lengths = [output.text for output in outputs], [len(output.generated_ids) for output in outputs]
        assert all(after.startswith(before) for before, after in pairwise(texts))
        assert lengths == sorted(set(lengths))
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        check_completions(outputs[-1], 100)


def test_a_stream_of_two_is_finished_when_both_are() -> None:
    """003-31, 003-77: the last item is the whole result, with what deltas do not carry."""
    model = ScriptedModel(lambda tokens, index: 2 if index == 0 else 5, max_length=64, eos_token_ids=frozenset({2}))
    engine = AsyncLLMEngine.from_engine_args(AsyncEngineArgs(model, skip_tokenizer_init=True))
    params = SamplingParams(n=2, max_tokens=4, prompt_logprobs=0)

    async def stream(output_kind: OutputKind) -> list[RequestOutput]:
        wanted = dataclasses.replace(params, output_kind=output_kind)
        return [output async for output in engine.generate([7, 8], wanted)]

    for kind in OutputKind:
        outputs = asyncio.run(stream(kind))
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    [final] = outputs
    *_, last = asyncio.run(stream(OutputKind.CUMULATIVE))
    assert last.outputs == final.outputs
    assert last.prompt_logprobs is not None
    deltas = asyncio.run(stream(OutputKind.DELTA))
    for index in range(2):
        tokens = [
            token for delta in deltas for part in delta.outputs if part.index == index for token in part.token_ids
        ]
        assert tokens == final.outputs[index].token_ids
    engine.shutdown()


WHEN_TO_USE_EACH = """
from vllm import LLM
llm = LLM(model="facebook/opt-125m")
outputs = llm.generate(prompts, sampling_params)
from vllm import AsyncLLMEngine
async def stream():
    engine = AsyncLLMEngine.from_engine_args(args)
    async for output in engine.generate(prompts[0], sampling_params, "one"):
        yield output
"""


def test_offline_and_online_mode_give_the_same_text(run: Run, folder: str) -> None:
    """003-24, 003-26."""
    params = SamplingParams(temperature=0.0, max_tokens=12)
    found = run(WHEN_TO_USE_EACH, prompts=[HELLO], sampling_params=params, args=AsyncEngineArgs(model=folder))

    async def last() -> RequestOutput:
        outputs: list[RequestOutput] = [output async for output in found.stream()]
        return outputs[-1]

    assert asyncio.run(last()).outputs == found.outputs[0].outputs


# Requests and responses.

ACCESS_OUTPUTS = """
from vllm import LLM, SamplingParams
llm = LLM(model="facebook/opt-125m")
sampling_params = SamplingParams(
    temperature=0.0,
    max_tokens=20,
    logprobs=1,
    n=2,
)
outputs = llm.generate(["Hello, my name is"], sampling_params)
for request_output in outputs:
    print("=" * 80)
    print(f"Request ID: {request_output.request_id}")
    print(f"Prompt: {request_output.prompt}")
    print(f"Prompt tokens: {request_output.prompt_token_ids}")
    print(f"Finished: {request_output.finished}")
    print()
    for i, completion in enumerate(request_output.outputs):
        print(f"Completion {i + 1}:")
        print(f"  Text: {completion.text}")
        print(f"  Token IDs: {completion.token_ids}")
        print(f"  Cumulative logprob: {completion.cumulative_logprob:.4f}")
        print(f"  Finish reason: {completion.finish_reason}")
        print()
"""


def test_all_fields_of_an_output_are_there(run: Run) -> None:
    """003-62 (two greedy completions, refused by vLLM, are equal here), 003-66 to 003-77."""
    found = run(ACCESS_OUTPUTS)
    [output] = found.outputs
    check_completions(output, 20)
    assert isinstance(output.request_id, str)
    assert (output.prompt, output.prompt_logprobs) == (HELLO, None)
    assert output.prompt_token_ids == found.llm.get_tokenizer().encode(HELLO)
    one, two = output.outputs
    assert (one.text, one.token_ids) == (two.text, two.token_ids)
    assert one.logprobs is not None
    assert all(token in entries for token, entries in zip(one.token_ids, one.logprobs, strict=True))


# Errors and memory.

ERROR_HANDLING = """
from vllm import LLM, SamplingParams
from vllm.utils import is_hip, is_cpu
def safe_initialize_llm(model_name, **kwargs):
    try:
        llm = LLM(model=model_name, **kwargs)
        print(f"✓ Successfully loaded {model_name}")
        return llm
    except ValueError as e:
        print(f"✗ Invalid configuration: {e}")
        return None
    except RuntimeError as e:
        if "CUDA out of memory" in str(e):
            print(f"✗ Out of GPU memory. Try:")
            print("  - Reduce gpu_memory_utilization")
            print("  - Use smaller model")
            print("  - Enable tensor parallelism")
        else:
            print(f"✗ Runtime error: {e}")
        return None
    except Exception as e:
        print(f"✗ Unexpected error: {e}")
        return None
def safe_generate(llm, prompts, sampling_params):
    try:
        outputs = llm.generate(prompts, sampling_params)
        return outputs
    except ValueError as e:
        print(f"✗ Invalid parameters: {e}")
        return None
    except RuntimeError as e:
        if "CUDA out of memory" in str(e):
            print(f"✗ OOM during generation. Try smaller batch or max_tokens")
        else:
            print(f"✗ Runtime error during generation: {e}")
        return None
llm = safe_initialize_llm(
    "facebook/opt-125m",
    gpu_memory_utilization=0.9
)
if llm:
    outputs = safe_generate(
        llm,
        prompts=["Hello"],
        sampling_params=SamplingParams(max_tokens=100)
    )
"""


def test_the_error_handlers_of_the_lesson_catch_our_errors(run: Run, tmp_path: Path) -> None:
    """003-35, 003-63."""
    found = run(ERROR_HANDLING)
    check_completions(found.outputs[0], 100)
    printed = found.printed
    printed.clear()
    assert found.safe_initialize_llm(str(tmp_path / "missing")) is None
    assert found.safe_generate(found.llm, [""], SamplingParams()) is None
    assert printed[0].startswith("✗ Invalid configuration: there is no model folder")
    assert printed[1].startswith("✗ Invalid parameters: the prompt is empty")


def test_is_hip_and_is_cpu_say_what_the_engine_runs_on(run: Run) -> None:
    """003-35: they are gone from vLLM, whose lesson imports them still."""
    found = run("from vllm.utils import is_hip, is_cpu")
    llm = LLM()
    assert found.is_cpu() == (llm.get_stats()["device"] == "cpu")
    assert found.is_hip() == (torch.version.hip is not None)
    llm.stop()


def test_out_of_memory_reaches_the_handler_by_its_words(run: Run) -> None:
    """003-63: a RuntimeError that says "CUDA out of memory"; any other fault is a RuntimeError too."""
    found = run(ERROR_HANDLING)
    found.printed.clear()
    model = ScriptedModel([5], max_length=64)
    llm = LLM(model, skip_tokenizer_init=True)
    model.fail_next(OutOfMemory("CUDA out of memory in a step: lower max_batch_size"))
    assert found.safe_generate(llm, [[1, 2]], SamplingParams()) is None
    model.fail_next(OSError("unplugged"))
    assert found.safe_generate(llm, [[1, 2]], SamplingParams()) is None
    assert found.printed[0] == "✗ OOM during generation. Try smaller batch or max_tokens"
    assert found.printed[1].startswith("✗ Runtime error during generation: ")
    assert "unplugged" in found.printed[1]
    assert len(found.safe_generate(llm, [[1, 2]], SamplingParams())) == 1
    llm.stop()


MEMORY = """
import torch
from vllm import LLM, SamplingParams
def print_gpu_memory():
    if torch.cuda.is_available():
        allocated = torch.cuda.memory_allocated() / 1e9
        reserved = torch.cuda.memory_reserved() / 1e9
        print(f"GPU Memory - Allocated: {allocated:.2f}GB, Reserved: {reserved:.2f}GB")
print("Before loading model:")
print_gpu_memory()
llm = LLM(model="facebook/opt-125m", gpu_memory_utilization=0.7)
print("\\nAfter loading model:")
print_gpu_memory()
outputs = llm.generate(["Hello"] * 10, SamplingParams(max_tokens=50))
print("\\nAfter inference:")
print_gpu_memory()
del llm
torch.cuda.empty_cache()
print("\\nAfter cleanup:")
print_gpu_memory()
"""


def test_deleting_the_llm_frees_it(run: Run) -> None:
    """003-34."""
    before = len(engine_threads())
    found = run(MEMORY)
    assert len(found.outputs) == 10
    wait_until(lambda: len(engine_threads()) <= before)


QUICK_REFERENCE = """
from vllm import LLM, SamplingParams
llm = LLM("facebook/opt-125m")
outputs = llm.generate(
    prompts=["Hello, world!"],
    sampling_params=SamplingParams(temperature=0.0, max_tokens=20)
)
print(outputs[0].outputs[0].text)
"""


def test_the_quick_reference_runs(run: Run) -> None:
    """003-1, 003-32, 003-33."""
    found = run(QUICK_REFERENCE)
    check_completions(found.outputs[0], 20)
    assert found.printed == [found.outputs[0].text]
