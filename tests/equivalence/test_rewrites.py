"""Rewritten models in bfloat16 and int8 are as exact as they should be; deterministic ones give the same bits whatever
other requests run."""

from __future__ import annotations

import atexit
import random
import shutil
import tempfile
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.errors import ConfigurationError
from penstock.kernels.native import available
from penstock.sampling import RequestPriority, SamplingParams
from tests.drive import Driver, logprobs_by_transformers, prompts, sequence
from tests.tiny_models import ARCHITECTURES, VOCAB, build

pytestmark = pytest.mark.skipif(not available(), reason="no compiler")

# Where experts are chosen, one rounding may choose another one: no bound holds for a random model.
DENSE = [name for name in ARCHITECTURES if name not in ("mixtral", "gpt_oss")]
PROMPTS = [prompt for prompt in prompts(8, 200, VOCAB) if len(prompt) > 1]


@cache
def checkpoint(name: str, dtype: torch.dtype) -> str:
    folder = tempfile.mkdtemp(prefix=f"penstock-{name}-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    build(name).to(dtype).save_pretrained(folder)
    return folder


@cache
def by_transformers(name: str, dtype: torch.dtype) -> Tensor:
    """Log probabilities of all prompt tokens but the first, of weights that are rounded to bfloat16."""
    model = build(name).to(torch.bfloat16).to(dtype)
    return torch.tensor([x for p in PROMPTS for x in logprobs_by_transformers(model, p[:1], p[1:])])


def by_engine(name: str, **settings: Any) -> Tensor:
    driver = Driver(checkpoint(name, torch.bfloat16), block_size=16, **settings)
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    driver.run([sequence(i, prompt, params) for i, prompt in enumerate(PROMPTS)])
    driver.runner.close()
    return torch.tensor([entry.logprob for i in range(len(PROMPTS)) for entry in driver.prompt_logprobs[i]])


def error(actual: Tensor, name: str) -> float:
    """How far off, relative to how far log probabilities lie apart."""
    exact = by_transformers(name, torch.float32)
    return ((actual - exact).norm() / (exact - exact.mean()).norm()).item()


@pytest.mark.parametrize("name", DENSE)
def test_bfloat16_is_about_as_exact_as_in_transformers(name: str) -> None:
    assert error(by_engine(name), name) <= 1.5 * error(by_transformers(name, torch.bfloat16), name)


@pytest.mark.parametrize("name", DENSE)
def test_int8_weights_are_off_by_a_few_percent(name: str) -> None:
    actual = error(by_engine(name, quantization="int8"), name)
    assert error(by_engine(name), name) < actual < 0.1


@pytest.mark.parametrize("name", DENSE)
def test_int8_keys_and_values_are_off_by_less(name: str) -> None:
    assert error(by_engine(name, kv_cache_dtype="int8"), name) < 0.02


def test_int8_keys_and_values_take_half_the_memory_and_a_scale() -> None:
    folder = checkpoint("llama", torch.bfloat16)
    plain, int8 = (Driver(folder, block_size=16, kv_cache_dtype=kind).runner.spec for kind in ("auto", "int8"))
    assert plain.kv_bytes_per_token == 2 * 2 * (8 + 8) * 2
    assert int8.kv_bytes_per_token == 2 * 2 * (8 + 8) + 2 * 2 * 2 * 4


# ---- deterministic=True ----

FORMATS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {"num_threads": 2}),
    "int8": (torch.bfloat16, {"quantization": "int8", "kv_cache_dtype": "int8"}),
}
NUM_MIXES = 17  # of each model and format: 102 together
PREFIX = prompts(2, 70, VOCAB, seed=5)[1]
ASKED = [
    *prompts(6, 90, VOCAB, seed=1),
    *(PREFIX + tail for tail in prompts(4, 30, VOCAB, seed=2)),
    PREFIX,
]


def params_of(index: int) -> SamplingParams:
    """Every third request draws, the others are greedy; all have logprobs."""
    sampling = {"temperature": 0.8, "top_p": 0.9, "seed": index} if index % 3 == 0 else {"temperature": 0.0}
    return SamplingParams(max_tokens=8 + 10 * (index % 4), logprobs=2, **sampling)


def outcome(driver: Driver, numbers: list[int]) -> list[Any]:
    """Tokens and all logprobs of some of the requests, run together; some arrive later and preempt others."""
    half = len(numbers) // 2
    sequences = [
        sequence(
            i, ASKED[number], params_of(number), priority=RequestPriority.LOW if i < half else RequestPriority.HIGH
        )
        for i, number in enumerate(numbers)
    ]
    outputs = driver.run(sequences[:half], sequences[half:])
    for seq in sequences:
        driver.runner.forget(seq.id)
    return [(output, driver.logprobs[seq.id]) for output, seq in zip(outputs, sequences, strict=True)]


def mixed(runner: Any, rng: random.Random, numbers: list[int], block_sizes: tuple[int, ...] = (4, 16, 32)) -> Driver:
    """A driver whose every setting that could disturb a request is drawn at random.

    Its cache holds little more than the longest request, or all prompts but not their outputs, or everything.
    """
    longest = max(len(ASKED[number]) for number in numbers) + 38
    prompts_of_all = sum(len(ASKED[number]) for number in set(numbers))
    block_size = rng.choice(block_sizes)
    return Driver(
        runner,
        block_size=block_size,
        num_blocks=-(-max(longest, rng.choice([1, prompts_of_all // 2, 2000])) // block_size) + 1,
        max_batch_size=rng.choice([3, 32]),
        max_num_batched_tokens=rng.choice([5, 16, 33, 50, 200, 4096]),
        enable_kv_cache=rng.random() < 0.7,
    )


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_deterministic_requests_get_the_same_bits_in_every_mix(name: str, format: str) -> None:
    dtype, settings = FORMATS[format]
    runner = Driver(checkpoint(name, dtype), block_size=16, deterministic=True, **settings).runner
    alone = [outcome(Driver(runner, block_size=16, enable_kv_cache=False), [n])[0] for n in range(len(ASKED))]
    preempted, reused = 0, 0
    for seed in range(NUM_MIXES):
        rng = random.Random(seed)
        numbers = rng.choices(range(len(ASKED)), k=rng.randint(3, 10))
        driver = mixed(runner, rng, numbers, (16, 32) if format == "int8" else (4, 16))
        assert outcome(driver, numbers) == [alone[number] for number in numbers]
        preempted += driver.scheduler.stats()["num_preemptions"]
        reused += driver.cache.stats()["hit_tokens"]
    assert preempted >= 5
    assert reused > 100
    runner.close()


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "olmo2"])
def test_deterministic_requests_of_other_families_get_the_same_bits(name: str) -> None:
    runner = Driver(checkpoint(name, torch.float32), deterministic=True, block_size=16).runner
    alone = [outcome(Driver(runner, block_size=16, enable_kv_cache=False), [n])[0] for n in range(len(ASKED))]
    for seed in range(4):
        rng = random.Random(seed)
        numbers = rng.choices(range(len(ASKED)), k=6)
        assert outcome(mixed(runner, rng, numbers), numbers) == [alone[number] for number in numbers]
    runner.close()


@pytest.mark.parametrize("name", ["gpt_neox", "mixtral", "gpt_oss"])
def test_deterministic_is_refused_where_part_of_the_model_runs_outside_the_kernels(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"deterministic=True is not possible .* outside the kernels"):
        Driver(checkpoint(name, torch.float32), deterministic=True)


@pytest.mark.parametrize("left_out", ["fused_layers", "packed_linears", "packed_norms"])
def test_deterministic_is_refused_without_a_rewrite(left_out: str) -> None:
    with pytest.raises(ConfigurationError, match=r"outside the kernels.*disabled_rewrites"):
        Driver(checkpoint("llama", torch.float32), deterministic=True, disabled_rewrites=(left_out,))


@pytest.mark.parametrize("settings", [{"deterministic": True}, {"quantization": "int8"}], ids=str)
def test_a_borrowed_module_is_not_rewritten(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"the engine shares them: set weight_mode='packed'"):
        Driver(build("llama"), **settings)


@pytest.mark.parametrize(
    "settings", [{"deterministic": True}, {"quantization": "int8"}, {"kv_cache_dtype": "int8"}], ids=str
)
def test_what_needs_the_kernels_is_refused_without_them(settings: dict[str, Any]) -> None:
    (setting,) = settings
    with pytest.raises(ConfigurationError, match=rf"^{setting}=.* needs the compiled CPU kernels"):
        Driver(checkpoint("llama", torch.float32), disabled_rewrites=("kernels",), block_size=16, **settings)


@pytest.mark.parametrize("block_size", [4, 24])
def test_int8_keys_and_values_need_blocks_of_whole_panels(block_size: int) -> None:
    with pytest.raises(ConfigurationError, match="block_size that is a multiple of 16"):
        Driver(checkpoint("llama", torch.float32), kv_cache_dtype="int8", block_size=block_size)
