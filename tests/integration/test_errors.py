"""Every mistake gets its typed error, which says what to change; one request's fault is its own.

What needs no model to be refused is refused within milliseconds. The tree of errors is drawn in `penstock.errors`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import re
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

import pytest
import torch
from torch import nn

from penstock import (
    LLM,
    AsyncEngineArgs,
    ConfigurationError,
    DeadlineExceeded,
    EngineClosed,
    EngineConfig,
    EngineOverloaded,
    ExecutionError,
    GenerationConfig,
    InferenceEngine,
    OutOfMemory,
    OutputKind,
    PenstockError,
    RequestAborted,
    RequestError,
    RequestOutput,
    RequestTooLarge,
    SamplingParams,
    ScriptedModel,
)
from penstock.outputs import Delta
from tests.tiny_models import VOCAB, build
from tests.tokenizers_for_tests import byte_level

PATIENCE_S = 30.0
AT_ONCE_S = 0.05
ATTEMPTS = 10
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    """Imports, and what the first call of all does once, belong to no single call."""
    with pytest.raises(RequestError):
        InferenceEngine(ScriptedModel([5], max_length=64), skip_tokenizer_init=True).generate([])
    with pytest.raises(ConfigurationError):
        EngineConfig(max_bach_size=1)


@pytest.fixture
def scripted() -> Iterator[Callable[..., tuple[InferenceEngine, ScriptedModel]]]:
    made: list[InferenceEngine] = []

    def make(tokenizer: Any = None, **settings: Any) -> tuple[InferenceEngine, ScriptedModel]:
        model = ScriptedModel([5, 6, 7], vocab_size=100, max_length=64)
        settings.setdefault("skip_tokenizer_init", tokenizer is None)
        made.append(InferenceEngine(model, tokenizer, EngineConfig(**settings)))
        made[-1].start()
        return made[-1], model

    yield make
    for engine in made:
        engine.stop(0.0)


Make = Callable[..., tuple[InferenceEngine, ScriptedModel]]


class Fault(nn.Module):
    """An activation that makes one forward pass raise when the class is armed."""

    armed = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if Fault.armed:
            Fault.armed = False
            raise RuntimeError("a kernel failed")
        return nn.functional.silu(x)


@pytest.fixture(scope="module")
def tiny() -> Iterator[InferenceEngine]:
    """A real model, token ids only, whose forward pass can be made to fail."""
    model: Any = build("llama")
    model.model.layers[0].mlp.act_fn = Fault()
    engine = InferenceEngine(model, skip_tokenizer_init=True, max_batch_size=8)
    engine.start()
    yield engine
    engine.stop(0.0)


def refusal(kind: type[Exception], standard: type[Exception], says: str, call: Callable[[], object]) -> Exception:
    """Check that `call` is refused at once, with words that match `says`."""
    best = float("inf")
    for _ in range(ATTEMPTS):  # a busy machine may stall any single one
        begin = perf_counter()
        with pytest.raises(standard, match=says) as caught:
            call()
        best = min(best, perf_counter() - begin)
        assert type(caught.value) is kind
        if best < AT_ONCE_S:
            break
    assert best < AT_ONCE_S, f"took {best:.3f} s"
    return caught.value


def failure(kind: type[Exception], standard: type[Exception], says: str, call: Callable[[], object]) -> Exception:
    """Check that `call` fails in the end, with words that match `says`."""
    with pytest.raises(standard, match=says) as caught:
        call()
    assert type(caught.value) is kind
    assert isinstance(caught.value, PenstockError)
    return caught.value


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = monotonic() + PATIENCE_S
    pulse = threading.Event()
    while not condition():
        assert monotonic() < deadline, "the condition did not come true in time"
        pulse.wait(0.002)


def nothing_leaks(engine: InferenceEngine) -> None:
    """All blocks become free, or hold cached prefixes that may be evicted, and nobody is counted as waiting."""
    names = ("num_waiting", "num_running", "num_requests", "num_queued_requests", "num_queued_tokens")

    def is_clean() -> bool:
        stats = engine.get_stats()
        cache, queue = stats["cache_info"], stats["queue"]
        return cache["num_free_blocks"] == cache["num_blocks"] and not any(queue[name] for name in names)

    wait_until(is_clean)
    assert engine.get_stats()["cache_info"]["usage"] == 0.0


# Requests.


def test_a_prompt_that_can_never_fit_is_told_the_three_numbers(scripted: Make) -> None:
    engine, _ = scripted()
    error = failure(
        RequestTooLarge,
        ValueError,
        "ask for at most 14",
        lambda: engine.generate([1] * 50, SamplingParams(max_tokens=20)).result(PATIENCE_S),
    )
    assert {"50", "20", "64"} <= set(re.findall(r"\d+", str(error)))
    assert isinstance(error, RequestError)
    error = failure(
        RequestTooLarge, ValueError, "shorten the prompt", lambda: engine.generate([1] * 64).result(PATIENCE_S)
    )
    assert str(error).count("64") == 2
    nothing_leaks(engine)


def test_a_prompt_larger_than_the_cache_is_refused_and_not_waited_for(scripted: Make) -> None:
    """An earlier engine looped for ever on an entry larger than its cache, holding its lock."""
    engine, _ = scripted(kv_cache_tokens=32)
    says = "raise memory_pool_size or kv_cache_tokens"
    failure(RequestTooLarge, ValueError, says, lambda: engine.generate([1] * 40).result(PATIENCE_S))
    assert engine.generate([1] * 20, SamplingParams(max_tokens=3)).result(PATIENCE_S).generated_ids == [5, 6, 7]


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("", "prompt is empty: pass at least one"),
        ([], "prompt is empty: pass at least one"),
        ({"prompt_token_ids": []}, "prompt is empty"),
        ([1, -2], "at least 0"),
        ([1, 2.5], "must be integers"),
        ([True, False], "not a mask"),
        (None, "pass a string"),
        (b"bytes", "pass a string"),
    ],
)
def test_what_is_no_prompt_is_refused_at_once(scripted: Make, prompt: Any, says: str) -> None:
    engine, model = scripted()
    refusal(RequestError, ValueError, says, lambda: engine.generate(prompt))
    refusal(RequestError, ValueError, says, lambda: asyncio.run(engine.submit_request_async(prompt)))
    assert model.plans == 0
    nothing_leaks(engine)


def test_an_empty_prompt_among_others_stops_the_batch_with_its_error() -> None:
    llm = LLM(ScriptedModel([5], max_length=64), skip_tokenizer_init=True)
    failure(RequestError, ValueError, "empty", lambda: llm.generate([[1], [], [2]]))
    failure(RequestError, ValueError, "2 sampling_params for 1 prompts", lambda: llm.generate([[1]], [GREEDY, GREEDY]))
    assert llm.generate([]) == []
    assert len(llm.generate([[1], [2]])) == 2
    nothing_leaks(llm.engine)
    llm.stop()


def test_the_first_error_of_a_batch_cancels_the_rest() -> None:
    """Also when the exception, and with it the frame of `generate`, is kept."""
    model = ScriptedModel([5], vocab_size=100, max_length=64)
    llm = LLM(model, skip_tokenizer_init=True)
    model.hold()
    error = failure(RequestError, ValueError, "vocabulary", lambda: llm.generate([[100], [1], [2]], GREEDY))
    wait_until(lambda: llm.get_stats()["queue"]["num_queued_requests"] == 0)
    model.release()
    nothing_leaks(llm.engine)
    assert error.__traceback__ is not None
    llm.stop()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"max_tokens": -1}, "max_tokens must be an integer >= 1.*-1"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"temperature": float("nan")}, "temperature must be a finite number >= 0, got nan"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"n": 0}, "n must be"),
        ({"n": 3, "best_of": 2}, "best_of must be an integer >= n"),
        ({"min_tokens": 20}, "at most max_tokens"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": 3.0}, "presence_penalty"),
        ({"stop": [""]}, "stop must be non-empty strings"),
        ({"stop": ["x"], "detokenize": False}, "stop strings need text"),
        ({"logprobs": -2}, "logprobs"),
        ({"seed": 1.5}, "seed"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"logits_processors": ["x"]}, "callables"),
        ({"use_beam_search": True, "temperature": 0}, "best_of must be the width of the beam search"),
        ({"use_beam_search": True, "best_of": 4}, "temperature must be 0 with use_beam_search"),
        ({"use_beam_search": True, "best_of": 4, "temperature": 0, "rank_by": len}, "rank_by must be None"),
        ({"early_stopping": "always"}, 'early_stopping must be True, False or "never"'),
        ({"rank_by": "length"}, "rank_by must be a function of a completion"),
    ],
)
def test_sampling_parameters_out_of_range_are_refused_where_they_are_written(values: dict[str, Any], says: str) -> None:
    refusal(RequestError, ValueError, says, lambda: SamplingParams(**values))


@pytest.mark.parametrize("values", [{"max_length": -5}, {"temperature": float("nan")}, {"length_mode": "words"}])
def test_generation_parameters_out_of_range_are_refused_where_they_are_written(values: dict[str, Any]) -> None:
    refusal(RequestError, ValueError, "must be", lambda: GenerationConfig(**values))


def test_what_are_no_parameters_is_refused(scripted: Make) -> None:
    engine, _ = scripted()
    wrong: Any = {"max_tokens": 5}
    refusal(
        RequestError,
        ValueError,
        "must be SamplingParams or GenerationConfig, got dict",
        lambda: engine.generate([1], wrong),
    )
    refusal(RequestError, ValueError, "deadline must be seconds", lambda: engine.generate([1], deadline=math.nan))


def test_a_token_id_outside_the_vocabulary_is_refused(scripted: Make) -> None:
    engine, model = scripted()
    says = "token id 100 in the prompt is outside the model's vocabulary of 100"
    failure(RequestError, ValueError, says, lambda: engine.generate([1, 100]).result(PATIENCE_S))
    assert model.plans == 0
    nothing_leaks(engine)


def test_parameters_that_name_unknown_tokens_hurt_nobody(tiny: InferenceEngine) -> None:
    """Stops and bans of tokens that cannot come change nothing; to wish for them is an error."""
    wanted = tokens_of(tiny)
    harmless: list[dict[str, Any]] = [
        {"stop_token_ids": [VOCAB]},
        {"bad_words": [[VOCAB]]},
    ]
    neighbours = [tiny.generate([3, 4, 5], dataclasses.replace(GREEDY, **values)) for values in harmless]
    for name, wish in (("allowed_token_ids", [VOCAB]), ("logit_bias", {VOCAB: 9.0})):
        bad = tiny.generate([3, 4, 5], SamplingParams(max_tokens=4, **{name: wish}))
        failure(
            RequestError, ValueError, f"token id {VOCAB} in {name} is outside", lambda bad=bad: bad.result(PATIENCE_S)
        )
    assert [handle.result(PATIENCE_S).generated_ids for handle in neighbours] == [wanted[0]] * 2
    nothing_leaks(tiny)


def test_a_request_id_in_use_is_refused_and_free_again_afterwards(scripted: Make) -> None:
    engine, model = scripted()
    model.hold()
    handle = engine.generate([1], GREEDY, request_id="mine")
    refusal(
        RequestError,
        ValueError,
        "'mine' is already running: use another",
        lambda: engine.generate([1], request_id="mine"),
    )
    model.release()
    handle.result(PATIENCE_S)
    assert engine.generate([1], GREEDY, request_id="mine").result(PATIENCE_S).request_id == "mine"


def test_text_needs_a_tokenizer(scripted: Make) -> None:
    engine, _ = scripted()
    for prompt in ("text", [{"role": "user", "content": "text"}], {"prompt": "text"}):
        says = 'serves token ids only: pass {"prompt_token_ids"'
        failure(RequestError, ValueError, says, lambda p=prompt: engine.generate(p).result(PATIENCE_S))  # type: ignore[misc]
    nothing_leaks(engine)


def test_a_full_queue_says_so_at_once(scripted: Make) -> None:
    engine, model = scripted(max_batch_size=1, max_queue_size=2)
    model.hold()
    running = engine.generate([1], GREEDY)
    wait_until(lambda: model.plans == 1)
    waiting = [engine.generate([1], GREEDY) for _ in range(2)]
    error = refusal(
        EngineOverloaded, RuntimeError, r"Request queue is full.*\n.*max_queue_size", lambda: engine.generate([1])
    )
    assert isinstance(error, EngineOverloaded)
    assert error.retry_after_s > 0
    model.release()
    for handle in (running, *waiting):
        assert handle.result(PATIENCE_S).finished
    nothing_leaks(engine)


# Configuration and models.


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"max_bach_size": 4}, "unknown setting 'max_bach_size': did you mean 'max_batch_size'"),
        ({"gpu_memory_utilisation": 0.9}, "did you mean 'gpu_memory_utilization'"),
        ({"something_else_entirely": 1}, "unknown setting 'something_else_entirely'"),
        ({"max_batch_size": 0}, "max_batch_size.*greater than or equal to 1.*got 0"),
        ({"max_batch_size": "many"}, "max_batch_size.*valid integer"),
        ({"log_level": "LOUD"}, "log_level"),
        ({"batch_timeout_ms": -1}, "batch_timeout_ms"),
    ],
)
def test_bad_settings_are_refused_however_they_come(values: dict[str, Any], says: str, tmp_path: Path) -> None:
    [(name, value)] = values.items()
    yaml = tmp_path / "engine.yaml"
    yaml.write_text(f"{name}: {value}\n")
    config = EngineConfig()
    refusal(ConfigurationError, ValueError, says, lambda: EngineConfig(**values))
    refusal(ConfigurationError, ValueError, says, lambda: InferenceEngine(ScriptedModel([5]), **values))
    refusal(ConfigurationError, ValueError, says, lambda: AsyncEngineArgs("model", **values))
    refusal(ConfigurationError, ValueError, says, lambda: EngineConfig.from_yaml(yaml))
    refusal(ConfigurationError, ValueError, says, lambda: setattr(config, name, value))
    assert config == EngineConfig()


def saved(path: Path, name: str = "llama") -> Path:
    build(name).save_pretrained(path)  # type: ignore[operator]
    return path


def test_a_missing_folder_is_refused_at_once(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    says = "there is no model folder.*check the path"
    for source in (missing, "./missing/folder", "~/missing"):
        refusal(ConfigurationError, ValueError, says, partial(InferenceEngine, source))
    refusal(ConfigurationError, ValueError, "there is no model folder", lambda: LLM(missing))
    file = tmp_path / "model.gguf"
    file.touch()
    refusal(ConfigurationError, ValueError, "is a file: pass the folder", lambda: InferenceEngine(str(file)))


def test_an_unknown_hub_id_is_refused_when_loading() -> None:
    engine = InferenceEngine("nobody-we-know/no-such-model")
    failure(ConfigurationError, ValueError, "cannot load the model 'nobody-we-know/no-such-model'", engine.start)
    assert engine.get_stats()["engine_status"] == "failed"
    failure(EngineClosed, RuntimeError, "the engine failed: cannot load", lambda: engine.generate([1]))


def test_an_incomplete_folder_is_refused_at_once(tmp_path: Path) -> None:
    refusal(
        ConfigurationError, ValueError, r"holds no config.json: pass a folder", lambda: InferenceEngine(str(tmp_path))
    )
    (tmp_path / "config.json").write_text("{}")
    refusal(ConfigurationError, ValueError, "no weights.*incomplete", lambda: InferenceEngine(str(tmp_path)))


def test_a_folder_of_an_adapter_says_how_to_load_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    says = r"holds an adapter: .* engine.load_adapter"
    refusal(ConfigurationError, ValueError, says, lambda: InferenceEngine(str(tmp_path)))


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-100], lambda data: b"\xff" * 64, lambda data: b"", lambda data: data + b"\0"]
)
def test_a_corrupt_weight_file_is_refused_at_once(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    weights = saved(tmp_path) / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    refusal(
        ConfigurationError, ValueError, "is corrupt.*download or save it again", lambda: InferenceEngine(str(tmp_path))
    )


def test_a_folder_without_tokenizer_names_both_remedies(tmp_path: Path) -> None:
    engine = InferenceEngine(str(saved(tmp_path)))
    failure(ConfigurationError, ValueError, r"with tokenizer='.*skip_tokenizer_init=True", engine.start)
    failure(ConfigurationError, ValueError, "skip_tokenizer_init=True", InferenceEngine(build("llama")).start)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_missing_folder_of_a_tokenizer_is_refused_before_weights_are_read(
    kind: Callable[[str], str | Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.models.loading.read_module", lambda *_: pytest.fail("weights were read"))
    engine = InferenceEngine(None, kind("/no/such/folder"))
    failure(ConfigurationError, ValueError, "there is no tokenizer folder /no/such/folder", engine.start)


def test_what_does_not_exist_on_this_machine_is_refused() -> None:
    failure(ConfigurationError, ValueError, 'use "cpu"', InferenceEngine(device="cuda:99").start)
    failure(ConfigurationError, ValueError, "use auto, float32", InferenceEngine(dtype="int3").start)


SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1}
FOREIGN: dict[str, dict[str, Any]] = {
    "mamba": {**SMALL, "state_size": 4},
    "bloom": {"vocab_size": 64, "hidden_size": 16, "n_layer": 1, "n_head": 2},
    "t5": {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2},
}


@pytest.mark.parametrize("name", sorted(FOREIGN))
def test_an_architecture_that_cannot_be_paged_is_refused_with_the_remedy(name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind: Any = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
    model = kind.from_config(AutoConfig.for_model(name, **FOREIGN[name]))
    engine = InferenceEngine(model, skip_tokenizer_init=True)
    error = failure(ConfigurationError, ValueError, "cannot run in the paged engine", engine.start)
    assert "Remedy: serve it with another backend" in str(error)
    failure(EngineClosed, RuntimeError, "the engine failed: .* cannot run", lambda: engine.generate([1]))


def test_a_module_that_is_no_language_model_is_refused() -> None:
    engine = InferenceEngine(nn.Linear(2, 2), skip_tokenizer_init=True)
    failure(ConfigurationError, ValueError, "it is not a transformers model", engine.start)


@pytest.mark.parametrize("verify_model", [True, False])
def test_a_model_without_an_output_head_says_how_to_load_it(verify_model: bool) -> None:
    module: Any = build("llama")
    engine = InferenceEngine(module.model, skip_tokenizer_init=True, verify_model=verify_model)
    failure(ConfigurationError, ValueError, "returns no logits: load it with AutoModelForCausalLM", engine.start)


def test_a_load_failure_reaches_every_waiter(tmp_path: Path) -> None:
    engine = InferenceEngine(str(saved(tmp_path)))

    async def several() -> list[Any]:
        return await asyncio.gather(*(engine.submit_request_async("a") for _ in range(3)), return_exceptions=True)

    assert [type(error) for error in asyncio.run(several())] == [ConfigurationError] * 3


# One request's fault is its own.


def tokens_of(engine: InferenceEngine, count: int = 3) -> list[list[int]]:
    return [engine.generate([3, 4, 5 + i], GREEDY).result(PATIENCE_S).generated_ids for i in range(count)]


def test_a_raising_logits_processor_fails_its_request_alone(tiny: InferenceEngine) -> None:
    wanted = tokens_of(tiny)

    def processor(output: Any, logits: Any) -> Any:
        if len(output) == 2:
            raise ZeroDivisionError("in my own code")
        return logits

    neighbours = [tiny.generate([3, 4, 5 + i], GREEDY) for i in range(3)]
    bad = tiny.generate([9, 9], SamplingParams(temperature=0.0, max_tokens=6, logits_processors=[processor]))
    error = failure(RequestError, ValueError, "in my own code", lambda: bad.result(PATIENCE_S))
    assert "logits processor" in str(error)
    assert [handle.result(PATIENCE_S).generated_ids for handle in neighbours] == wanted
    assert tokens_of(tiny) == wanted
    nothing_leaks(tiny)


def test_logits_of_no_use_fail_their_request_alone(tiny: InferenceEngine) -> None:
    wanted = tokens_of(tiny)
    neighbours = [tiny.generate([3, 4, 5 + i], GREEDY) for i in range(3)]
    processors: list[Any] = [
        lambda out, logits: logits * float("nan"),
        lambda out, logits: None,
        lambda out, logits: logits[:3],
    ]
    for processor in processors:
        bad = tiny.generate([9, 9], SamplingParams(max_tokens=6, logits_processors=[processor]))
        failure(RequestError, ValueError, "logits", lambda handle=bad: handle.result(PATIENCE_S))  # type: ignore[misc]
    assert [handle.result(PATIENCE_S).generated_ids for handle in neighbours] == wanted
    nothing_leaks(tiny)


def test_a_raising_callback_fails_its_request_alone(tiny: InferenceEngine) -> None:
    wanted = tokens_of(tiny)

    has_ended = threading.Event()

    def callback(delta: Delta) -> None:
        raise KeyError("in my own code")

    def processor(output: Any, logits: Any) -> Any:
        if len(output) == 2:
            has_ended.wait(PATIENCE_S)
        return logits

    long = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True, logits_processors=[processor])
    neighbours = [tiny.generate([3, 4, 5 + i], GREEDY) for i in range(3)]
    bad = tiny.generate([9, 9], long, callback=callback)
    failure(RequestError, ValueError, "the callback raised KeyError.*in my own code", lambda: bad.result(PATIENCE_S))
    has_ended.set()
    assert [handle.result(PATIENCE_S).generated_ids for handle in neighbours] == wanted
    nothing_leaks(tiny)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_raising_final_callback_hurts_nobody(tiny: InferenceEngine, caplog: pytest.LogCaptureFixture) -> None:
    def callback(output: RequestOutput) -> None:
        raise KeyError("in my own code")

    request_id = tiny.submit_request([3, 4], GREEDY, callback=callback)
    handle = tiny.get_request(request_id)
    assert handle is not None
    assert len(handle.result(PATIENCE_S).generated_ids) == 6
    wait_until(lambda: any("raised" in record.getMessage() for record in caplog.records))
    assert len(tokens_of(tiny)) == 3


def test_a_failing_tokenizer_fails_its_request_alone(scripted: Make) -> None:
    engine, _ = scripted(byte_level(), skip_tokenizer_init=False)
    failure(RequestError, ValueError, "an unpaired surrogate", lambda: engine.generate("\ud800").result(PATIENCE_S))
    failure(
        RequestError, ValueError, "no key 'prompt_ids'", lambda: engine.generate({"prompt_ids": [1]}).result(PATIENCE_S)
    )
    robots = [{"role": "robot", "content": "x"}]
    failure(RequestError, ValueError, "template refused.*no robots", lambda: engine.generate(robots).result(PATIENCE_S))
    assert engine.generate("ok", GREEDY).result(PATIENCE_S).finished
    nothing_leaks(engine)


def test_a_failed_forward_pass_fails_its_batch_and_the_engine_serves_on(tiny: InferenceEngine) -> None:
    wanted = tokens_of(tiny)
    Fault.armed = True
    failure(
        ExecutionError,
        RuntimeError,
        "RuntimeError: a kernel failed",
        lambda: tiny.generate([3, 4, 5]).result(PATIENCE_S),
    )
    assert not Fault.armed
    assert tokens_of(tiny) == wanted
    nothing_leaks(tiny)


def test_only_the_batch_that_failed_is_lost(scripted: Make) -> None:
    engine, model = scripted(max_batch_size=2)
    model.hold()
    handles = [engine.generate([1 + i], GREEDY) for i in range(4)]
    wait_until(lambda: engine.get_stats()["queue"]["num_requests"] == 4 and model.plans == 1)
    rows = engine.get_stats()["queue"]["num_running"]
    model.fail_next(OutOfMemory("CUDA out of memory in a step: lower max_batch_size"))
    model.release()
    outcomes: list[Any] = []
    for handle in handles:
        try:
            outcomes.append(handle.result(PATIENCE_S).generated_ids)
        except OutOfMemory as error:
            outcomes.append(str(error))
    assert outcomes == ["CUDA out of memory in a step: lower max_batch_size"] * rows + [[5, 6, 7] * 2] * (4 - rows)
    nothing_leaks(engine)


def test_an_aborted_request_carries_what_it_had(scripted: Make) -> None:
    engine, model = scripted()

    async def abort_after_two() -> RequestAborted:
        handle = engine.generate([1], SamplingParams(max_tokens=60))
        await anext(handle)
        handle.cancel()
        with pytest.raises(RequestAborted, match="aborted") as caught:
            await handle
        return caught.value

    model.step_s = 0.02
    error = asyncio.run(abort_after_two())
    assert isinstance(error.output, RequestOutput)
    assert error.output.generated_ids[0] == 5
    assert error.output.outputs[0].finish_reason == "abort"
    nothing_leaks(engine)


def test_using_a_stopped_engine_says_so_at_once(scripted: Make) -> None:
    engine, _ = scripted()
    engine.stop()
    refusal(EngineClosed, RuntimeError, "the engine was stopped", lambda: engine.generate([1]))
    refusal(EngineClosed, RuntimeError, "the engine was stopped", engine.start)
    never_started = InferenceEngine(ScriptedModel([5]), skip_tokenizer_init=True)
    never_started.stop()
    refusal(EngineClosed, RuntimeError, "the engine was stopped", lambda: never_started.generate([1]))
    refusal(EngineClosed, RuntimeError, "the engine was stopped", never_started.start)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"stop": 5}, "stop must be a list"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list"),
        ({"allowed_token_ids": 5}, "allowed_token_ids must be a list"),
        ({"logit_bias": [1]}, "logit_bias must be a mapping"),
        ({"output_kind": "nope"}, "output_kind must be an OutputKind or one of 'cumulative'"),
    ],
)
def test_values_of_the_wrong_type_are_named(values: dict[str, Any], says: str) -> None:
    refusal(RequestError, ValueError, says, lambda: SamplingParams(**values))


def test_an_output_kind_may_be_given_by_its_name() -> None:
    """The name used to be accepted and to stream cumulative text."""
    assert SamplingParams(output_kind="delta").output_kind is OutputKind.DELTA  # type: ignore[arg-type]


def test_a_config_or_model_of_the_wrong_type_says_what_to_pass() -> None:
    wrong: Any = {"max_batch_size": 3}
    refusal(ConfigurationError, ValueError, "EngineConfig.from_yaml", lambda: InferenceEngine(config=wrong))
    refusal(ConfigurationError, ValueError, "a model cannot be of type dict", lambda: InferenceEngine(wrong))
    refusal(ConfigurationError, ValueError, "name is empty", lambda: InferenceEngine(""))


def test_a_tokenizer_of_the_wrong_type_is_refused_at_once() -> None:
    """Settings in its place failed while the model loaded, as an unhashable type."""
    config = EngineConfig()
    refusal(ConfigurationError, ValueError, "write .*config=config", lambda: InferenceEngine(None, config))
    refusal(ConfigurationError, ValueError, "a tokenizer cannot be of type int", lambda: InferenceEngine(None, 5))


def test_keywords_beside_a_config_leave_the_callers_object_alone() -> None:
    config = EngineConfig(max_batch_size=8)
    engine = InferenceEngine(ScriptedModel([5], max_length=64), None, config, max_num_seqs=3)
    assert (config.max_batch_size, engine.config.max_batch_size) == (8, 3)


def test_a_deadline_in_the_past_is_missed_rather_than_wrong(scripted: Make) -> None:
    engine, _ = scripted()
    failure(DeadlineExceeded, TimeoutError, "passed its deadline", lambda: engine.generate([1], deadline=-1.0).result())


def test_more_completions_than_may_wait_are_refused(scripted: Make) -> None:
    engine, _ = scripted(max_queue_size=4)
    many = SamplingParams(n=5, max_tokens=1)
    failure(RequestTooLarge, ValueError, "5 completions", lambda: engine.generate([1], many).result(PATIENCE_S))


def test_what_only_settings_can_change_is_a_note_and_no_part_of_the_message(scripted: Make) -> None:
    """Web services answer with `str(error)`, and told their clients to raise `max_sequence_length`."""
    engine, model = scripted(max_batch_size=1, max_queue_size=2, max_logprobs=3)
    beams = SamplingParams(use_beam_search=True, best_of=2, temperature=0.0)
    many = (SamplingParams(n=3), SamplingParams(logprobs=5), SamplingParams(max_tokens=64), beams)
    calls = [lambda params=params: engine.generate([1], params).result(PATIENCE_S) for params in many]  # type: ignore[misc]
    hints: list[str] = []
    for call in calls:
        with pytest.raises(RequestError) as caught:
            call()
        hints += caught.value.__notes__
        assert not re.search("_size|_length|max_logprobs", str(caught.value))
    model.hold()
    handles = [engine.generate([1], GREEDY)]
    wait_until(lambda: model.plans == 1)
    handles += [engine.generate([1], GREEDY) for _ in range(2)]
    with pytest.raises(EngineOverloaded) as full:
        engine.generate([1])
    assert "max_" not in str(full.value)
    hints += full.value.__notes__
    settings = ("max_queue_size", "max_logprobs", "max_sequence_length", "max_batch_size", "max_queue_size")
    assert [hint for hint, name in zip(hints, settings, strict=True) if name not in hint] == []
    model.release()


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        *((RequestError, 400), (RequestTooLarge, 400), (EngineOverloaded, 429), (EngineClosed, 503)),
        *((DeadlineExceeded, 504), (RequestAborted, 500), (ExecutionError, 500), (ConfigurationError, 500)),
    ],
)
def test_an_error_names_the_status_that_a_web_service_answers_with(kind: type[PenstockError], status: int) -> None:
    assert kind("no").http_status == status
