"""Whatever a caller passes, it is refused or its request ends typed, and neighbours notice nothing.

A property by enumeration: every field of every way in, times a table of values that no argument should have.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from penstock import LLM, GenerationConfig, InferenceEngine, PenstockError, RequestHandle, RequestOutput, SamplingParams
from tests.tiny_models import build

PATIENCE_S = 60.0
NEIGHBOUR = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
SETTINGS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "max_sequence_length": 48,
    "default_max_tokens": 2,
    "log_level": "CRITICAL",
}
SHORT: dict[str, Any] = {"max_tokens": 2, "ignore_eos": True, "seed": 1}


class Spite(Exception):
    """An error that cannot even be printed."""

    def __str__(self) -> str:
        raise RuntimeError("not even this")

    __repr__ = __str__


def spite(*args: Any, **options: Any) -> Any:
    """Whatever is called raises."""
    raise Spite


def spiteful(base: type, *names: str) -> type:
    """A class whose methods of these names raise."""
    return type("Spiteful", (base,), {f"__{name}__": spite for name in names})


CALLS = ("call", "index", "int", "float", "deepcopy", "array")
LOOKS = ("bool", "eq", "hash", "repr", "str", "lt", "gt", "le", "ge")
LISTS = ("len", "iter", "getitem", "contains", "next")
Spiteful, SpitefulList = spiteful(object, *CALLS, *LOOKS, *LISTS), spiteful(list, *LOOKS, *LISTS)
SpitefulInt, SpitefulText = spiteful(int, *CALLS, *LOOKS), spiteful(str, *CALLS, *LOOKS, *LISTS)


def panics(*args: Any) -> Any:
    """User code that raises what is no `Exception`."""
    raise SystemExit(3)


HOSTILE: list[Any] = [
    *(None, True, False, 0, -1, 3, 1.5, -0.5, 5e-324, 1e308, math.nan, math.inf, -math.inf),
    *(sys.maxsize, 2**31, 2**64, -(2**63), 10**400, -(10**400), 10**5000, 400.0, -400),
    *(Decimal(1), Fraction(1, 2), 1j, np.int64(2), np.float32(0.5), np.bool_(True), np.float64(math.nan)),
    *(np.array([1, 2]), np.array([1.5]), np.zeros((2, 2)), torch.tensor(2), torch.tensor([3.5])),
    *("", "x", "\ud800", b"x", [], [1.5], [-1], [10**30], [None], ["x", 1], [[]], [[1.5]], [Spite()], [panics]),
    *({}, {1: math.nan}, {1.5: 1.0}, {"1": 1.0}, {-1: 1.0}, {10**30: 1.0}, {1: 10**400}, {1: Decimal(1)}),
    *(object(), int, panics, spite, itertools.count(), iter([1.5]), Spiteful(), SpitefulList([1]), SpitefulInt(2)),
    SpitefulText("x"),
]


@pytest.fixture(scope="module")
def engine() -> Iterator[InferenceEngine]:
    """A real model, token ids only."""
    found = InferenceEngine(build("llama"), max_batch_size=64, **SETTINGS)
    found.start()
    yield found
    found.stop(0)


@pytest.fixture(scope="module")
def wanted(engine: InferenceEngine) -> list[int]:
    """What the neighbour says when it is alone."""
    return engine.generate([3, 4, 5], NEIGHBOUR).result(PATIENCE_S).generated_ids


def survives(engine: InferenceEngine, wanted: list[int], call: Callable[[Any], Any]) -> None:
    """Call with every hostile value while a neighbour runs; every handle that comes of it ends typed."""
    neighbour = engine.generate([3, 4, 5], NEIGHBOUR)
    handles: list[RequestHandle] = []
    untyped: list[tuple[int, str]] = []
    for number, value in enumerate(HOSTILE):
        try:
            found = call(value)
        except PenstockError:
            continue
        except Exception as error:
            untyped.append((number, type(error).__name__))
            continue
        handles += [handle for handle in (found if isinstance(found, list) else [found]) if handle is not None]
    assert untyped == []
    for handle in handles:
        try:
            assert isinstance(handle.result(PATIENCE_S), RequestOutput)
        except PenstockError:
            continue
    assert neighbour.result(PATIENCE_S).generated_ids == wanted
    stats = engine.get_stats()
    assert stats["engine_status"] == "running"
    assert stats["queue"]["num_queued_requests"] == stats["queue"]["num_queued_tokens"] == 0


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(SamplingParams) if field.init])
def test_any_value_of_a_sampling_parameter_hurts_its_own_request_at_most(
    engine: InferenceEngine, wanted: list[int], name: str
) -> None:
    """Among others: top_k=sys.maxsize, allowed_token_ids=[1.5] and a processor's SystemExit failed everybody's step."""
    ranked = {**SHORT, "best_of": 2, "rank_by": "normalized_logprob"}
    survives(engine, wanted, lambda value: engine.generate([1, 2], SamplingParams(**{**ranked, name: value})))


@pytest.mark.parametrize(
    "name",
    ["n", "best_of", "temperature", "length_penalty", "early_stopping", "logits_processors", "logit_bias", "stop"],
)
def test_any_value_of_a_parameter_of_a_beam_search_hurts_its_own_request_at_most(
    engine: InferenceEngine, wanted: list[int], name: str
) -> None:
    beams = {**SHORT, "use_beam_search": True, "best_of": 2, "temperature": 0.0}
    survives(engine, wanted, lambda value: engine.generate([1, 2], SamplingParams(**{**beams, name: value})))


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(GenerationConfig)])
def test_any_value_of_a_generation_config_hurts_its_own_request_at_most(
    engine: InferenceEngine, wanted: list[int], name: str
) -> None:
    def assigned(value: Any) -> RequestHandle:
        config = GenerationConfig(max_length=2, seed=1)
        setattr(config, name, value)  # after the check that its constructor makes
        return engine.generate([1, 2], config)

    survives(engine, wanted, lambda value: engine.generate([1, 2], GenerationConfig(**{"max_length": 2, name: value})))
    survives(engine, wanted, assigned)


@pytest.mark.parametrize(
    "name", ["prompt", "params", "request_id", "priority", "deadline", "ttft_deadline", "namespace", "callback"]
)
def test_any_argument_of_generate_hurts_its_own_request_at_most(
    engine: InferenceEngine, wanted: list[int], name: str
) -> None:
    base: dict[str, Any] = {"prompt": [1, 2], "params": SamplingParams(**SHORT)}
    survives(engine, wanted, lambda value: engine.generate(**{**base, name: value}))


@pytest.mark.parametrize("key", ["prompt", "prompt_token_ids", "content"])
def test_any_value_inside_a_prompt_hurts_its_own_request_at_most(
    engine: InferenceEngine, wanted: list[int], key: str
) -> None:
    def call(value: Any) -> RequestHandle:
        prompt: Any = [{"role": "user", key: value}] if key == "content" else {key: value}
        return engine.generate(prompt, SamplingParams(**SHORT))

    survives(engine, wanted, call)


@pytest.mark.parametrize("name", ["text", "generation_config", "priority", "callback"])
def test_any_argument_of_submit_request_hurts_its_own_request_at_most(
    engine: InferenceEngine, wanted: list[int], name: str
) -> None:
    base: dict[str, Any] = {"text": [1, 2], "generation_config": SamplingParams(**SHORT)}
    survives(engine, wanted, lambda value: engine.get_request(engine.submit_request(**{**base, name: value})))


@pytest.mark.parametrize("name", ["request_id", "n", "params", "append", "at", "index"])
def test_any_argument_of_a_fork_hurts_that_fork_at_most(engine: InferenceEngine, wanted: list[int], name: str) -> None:
    """`at=1.5` and `index=None` never ended and kept their places in the queue."""
    origin = engine.generate([7, 8], SamplingParams(temperature=0.0, max_tokens=44, ignore_eos=True))
    while not origin.status.ended and origin.status.value == "queued":
        engine.generate([1], SamplingParams(max_tokens=1)).result(PATIENCE_S)
    base = {"request_id": origin.request_id, "n": 1, "params": SamplingParams(**SHORT)}
    survives(engine, wanted, lambda value: engine.fork(**{**base, name: value}))
    origin.cancel()


@pytest.mark.parametrize("method", ["abort", "get_request", "get_request_status"])
def test_any_value_for_an_id_is_refused_or_ignored(engine: InferenceEngine, wanted: list[int], method: str) -> None:
    """`abort([])` printed a traceback of the engine's thread."""
    survives(engine, wanted, lambda value: getattr(engine, method)(value) and None)


@pytest.mark.parametrize("name", ["prompts", "sampling_params"])
def test_any_argument_of_llm_generate_is_answered_or_refused(name: str) -> None:
    llm = LLM(build("llama"), max_batch_size=8, **SETTINGS)
    base: dict[str, Any] = {"prompts": [[1, 2]], "sampling_params": SamplingParams(**SHORT)}
    untyped: list[tuple[int, str]] = []
    for number, value in enumerate(HOSTILE):
        try:
            assert all(isinstance(output, RequestOutput) for output in llm.generate(**{**base, name: value}))
        except PenstockError:
            continue
        except Exception as error:
            untyped.append((number, type(error).__name__))
    assert untyped == []
    assert llm.get_stats()["engine_status"] == "running"
    llm.stop()
