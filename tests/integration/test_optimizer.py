"""The performance optimizer of the inference handbook: its snippets run as they are written there, and every flag acts
on a live engine or says why it cannot.

Numbers like 004-89 in the docstrings are the rows of the requirements checklist, those like B4-16 bugs of an earlier
engine that must not come back. Comments and blank lines of the snippets are left out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from penstock import (
    CompletionOutput,
    ConfigurationError,
    OptimizationConfig,
    OptimizationLevel,
    ParallelSampler,
    PerformanceOptimizer,
    RequestError,
    RequestTooLarge,
    SamplingParams,
    ScriptedModel,
    SpeculativeDecoder,
)
from penstock.demo import DRAFT_DIR
from penstock.models.draft_runner import DraftRunner
from tests.drive import greedy_by_transformers
from tests.tiny_models import build

PROMPT = [9, 8, 7, 6, 5]


def run(source: str, **names: Any) -> SimpleNamespace:
    """Run a snippet as a script; its variables."""
    source = source.replace("from inference.performance_optimizer import", "from penstock import")
    exec(compile(source, "<handbook>", "exec"), names)
    return SimpleNamespace(**{name: value for name, value in names.items() if name.isidentifier()})


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A live random Llama that ends no text by itself."""
    return build("llama", eos_token_id=None)


@pytest.fixture(scope="module")
def optimizer(model: nn.Module) -> Iterator[PerformanceOptimizer]:
    made = PerformanceOptimizer(model)
    yield made
    made.stop()


# Snippets.

OPTIMIZER = """
from inference.performance_optimizer import PerformanceOptimizer, OptimizationConfig
config = OptimizationConfig(
    enable_speculative_decoding=True,
    enable_parallel_sampling=True,
    enable_memory_pooling=True,
    speculation_length=4
)
optimizer = PerformanceOptimizer(model, config)
output, stats = optimizer.optimized_generate(input_ids, max_length=50)
"""


def test_the_optimizer_of_the_handbook_generates(model: nn.Module) -> None:
    """004-88 to 004-95: it died in the making of a draft model; here max_length counts new tokens."""
    found = run(OPTIMIZER, model=model, input_ids=torch.tensor([PROMPT]))
    assert found.output.shape == (1, len(PROMPT) + 50)
    assert found.output[0, : len(PROMPT)].tolist() == PROMPT
    assert found.output.dtype == torch.int64
    stats = found.stats
    assert (stats["strategy"], stats["num_candidates"], stats["tokens_generated"]) == ("parallel", 4, 50)
    assert stats["tokens_per_second"] == pytest.approx(50 / stats["generation_time"])
    assert 0 < stats["first_token_time"] <= stats["generation_time"]
    assert {"adaptive_params", "acceptance_rate"} <= stats.keys()
    found.optimizer.stop()


LEVELS = """
from inference.performance_optimizer import OptimizationLevel, OptimizationConfig
aggressive_config = OptimizationConfig(
    level=OptimizationLevel.AGGRESSIVE,
    enable_speculative_decoding=True,
    enable_parallel_sampling=True,
    enable_memory_pooling=True,
    compile_model=True,
    speculation_length=6,
    num_parallel_samples=8
)
memory_config = OptimizationConfig(
    level=OptimizationLevel.MEMORY_OPTIMIZED,
    enable_gradient_checkpointing=True,
    memory_efficient_attention=True,
    enable_memory_pooling=True
)
"""


@pytest.mark.parametrize("name", ["aggressive_config", "memory_config"])
def test_the_levels_of_the_handbook_serve(model: nn.Module, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """004-97, 004-98, 004-100, 004-101: the level was never read."""
    config = getattr(run(LEVELS), name)
    with caplog.at_level("WARNING", logger="penstock"):
        optimizer = PerformanceOptimizer(model, config)
    assert ("enable_gradient_checkpointing has no effect" in caplog.text) == config.enable_gradient_checkpointing
    output, stats = optimizer.optimized_generate([PROMPT], max_length=8, temperature=0.0)
    assert output == [PROMPT + greedy_by_transformers(model, PROMPT, 8)]
    assert stats["level"] == config.level
    optimizer.stop()


HIGH_LATENCY = """
optimization_config.enable_speculative_decoding = True
optimization_config.speculation_length = 4
"""


def test_troubleshooting_of_the_handbook_acts_while_serving(model: nn.Module) -> None:
    """004-111: what is assigned counts from the next generation on."""
    config = OptimizationConfig(enable_speculative_decoding=False, speculation_length=2)
    optimizer = PerformanceOptimizer(model, config)
    assert optimizer.engine.config.enable_speculative_decoding is False
    run(HIGH_LATENCY, optimization_config=config)
    optimizer.optimized_generate([PROMPT], max_length=2)
    assert optimizer.engine.config.enable_speculative_decoding is True
    assert optimizer.engine.config.speculation_length == 4
    optimizer.stop()


# What is generated.


@pytest.mark.parametrize("level", OptimizationLevel)
def test_greedy_output_is_that_of_transformers_at_every_level(model: nn.Module, level: OptimizationLevel) -> None:
    """A padded batch, too: B4-1."""
    optimizer = PerformanceOptimizer(model, OptimizationConfig(level=level))
    ids = torch.tensor([[*PROMPT, 3], [0, 0, 0, 4, 3, 2]])
    mask = torch.tensor([[1] * 6, [0, 0, 0, 1, 1, 1]])
    output, _ = optimizer.optimized_generate(ids, max_length=12, temperature=0.0, attention_mask=mask, pad_token_id=159)
    first, second = ([*p, *greedy_by_transformers(model, p, 12)] for p in ([*PROMPT, 3], [4, 3, 2]))
    assert output.tolist() == [first, [*second, 159, 159, 159]]
    optimizer.stop()


def test_temperature_is_the_callers(optimizer: PerformanceOptimizer) -> None:
    """004-103, B4-16: a controller replaced it. The seed fixes the draws, so the engine itself says the same."""
    plain: dict[str, Any] = {"max_tokens": 20, "seed": 3, "detokenize": False}
    for temperature in (0.5, 1.7):
        params = SamplingParams(temperature=temperature, **plain)
        wanted = optimizer.engine.generate(PROMPT, params).result()
        output, _ = optimizer.optimized_generate([PROMPT], 20, temperature, n=1, seed=3)
        assert output == wanted.output_ids


def test_the_best_candidate_is_returned(optimizer: PerformanceOptimizer) -> None:
    """004-93: unreachable before. Candidates are those that n=4 would give."""
    every, _ = optimizer.optimized_generate([PROMPT], 10, n=4, seed=5)
    assert len(every) == 4
    seen: list[list[int]] = []

    def taste(completion: CompletionOutput) -> float:
        seen.append(completion.token_ids)
        return -sum(completion.token_ids)

    (best,), stats = optimizer.optimized_generate([PROMPT], 10, best_of=4, rank_by=taste, seed=5)
    assert sorted(seen) == sorted(row[len(PROMPT) :] for row in every)
    assert best == min(every, key=sum)
    assert (stats["strategy"], stats["num_candidates"]) == ("parallel", 4)


@pytest.mark.parametrize("aggregation", ["best", "ensemble", "random"])
def test_every_aggregation_of_the_original_returns_a_sample(model: nn.Module, aggregation: str) -> None:
    """004-102: an ensemble was a vote at every position, which no model had written."""
    optimizer = PerformanceOptimizer(model, OptimizationConfig(sample_aggregation=aggregation), seed=5)
    every, _ = optimizer.optimized_generate([PROMPT], 3, 2.0, n=4, seed=5)
    (chosen,), stats = optimizer.optimized_generate([PROMPT], 3, 2.0, seed=5)
    assert chosen in every
    assert stats["num_candidates"] == (1 if aggregation == "random" else 4)
    is_on = optimizer.get_optimization_stats()["features"]["enable_parallel_sampling"]
    assert is_on.startswith("on: one sample" if aggregation == "random" else f"on: best of 4 by {aggregation}")
    optimizer.stop()


def test_output_has_the_type_of_the_input(optimizer: PerformanceOptimizer) -> None:
    for given in (PROMPT, [PROMPT], np.array([PROMPT], dtype=np.int32), torch.tensor(PROMPT, dtype=torch.int32)):
        output, _ = optimizer.optimized_generate(given, 3, 0.0)
        assert isinstance(output, type(given))
        assert getattr(output, "dtype", None) == getattr(given, "dtype", None)
        assert np.asarray(output).shape == (1, len(PROMPT) + 3)


def test_lists_may_hold_integers_of_numpy(optimizer: PerformanceOptimizer) -> None:
    ids = list(np.array(PROMPT))
    plain, one, two = (optimizer.optimized_generate(given, 3, 0.0)[0] for given in (PROMPT, ids, [ids]))
    assert plain == one == two


def test_wrong_prompts_are_refused(optimizer: PerformanceOptimizer) -> None:
    for given in ([], [["a"]], "text", torch.zeros(1, 0, dtype=torch.int64)):
        with pytest.raises(RequestError):
            optimizer.optimized_generate(given)
    with pytest.raises(RequestError, match="attention_mask must have the shape"):
        optimizer.optimized_generate([PROMPT], attention_mask=[[1, 1]])
    with pytest.raises(RequestError, match="keywords of SamplingParams"):
        optimizer.optimized_generate([PROMPT], top_q=1)
    with pytest.raises(RequestTooLarge):
        optimizer.optimized_generate([PROMPT], max_length=10_000)


def test_texts_end_at_end_of_text_unless_told_otherwise() -> None:
    """`enable_early_stopping`; B4-16: the end was the fixed id 2."""
    model = ScriptedModel([5, 6, 1], max_length=64, eos_token_ids=frozenset({1}))
    config = OptimizationConfig()
    optimizer = PerformanceOptimizer(model, config)
    assert optimizer.optimized_generate([[9]], 7)[0] == [[9, 5, 6, 1]]
    config.enable_early_stopping = False
    assert optimizer.optimized_generate([[9]], 5)[0] == [[9, 5, 6, 1, 5, 6]]
    optimizer.stop()


# What is turned on.


def test_compiling_runs_the_layers_of_a_live_module_on_kernels(model: nn.Module) -> None:
    """004-96: what generated kept the uncompiled model. The module itself stays as it was."""
    before = [type(part) for part in model.modules()]
    compiled, plain = (PerformanceOptimizer(model, OptimizationConfig(compile_model=on)) for on in (True, False))
    assert "fused_layers 2/2" in compiled.get_optimization_stats()["features"]["compile_model"]
    assert plain.get_optimization_stats()["features"]["compile_model"].startswith("off: layers run unchanged")
    outputs = [one.optimized_generate([PROMPT], 12, 0.0)[0] for one in (compiled, plain)]
    assert outputs[0] == outputs[1]
    assert [type(part) for part in model.modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    for one in (compiled, plain):
        one.stop()


@pytest.mark.usefixtures("steps_cost_the_same")
def test_a_draft_model_guesses_and_changes_nothing() -> None:
    """004-91, B4-15: the draft was `type(model)()`."""
    plain, config = (
        OptimizationConfig(enable_speculative_decoding=False),
        OptimizationConfig(draft_model=str(DRAFT_DIR)),
    )
    prompt = list(range(300, 330))
    outputs = []
    for one in (plain, config):
        optimizer = PerformanceOptimizer(None, one, deterministic=True)
        output, stats = optimizer.optimized_generate([prompt], 60, 0.0)
        outputs.append(output)
        assert (stats["strategy"] == "speculative") == (one is config) == (stats["drafted_tokens"] > 0)
        optimizer.stop()
    assert outputs[0] == outputs[1]
    assert 0 <= stats["acceptance_rate"] <= 1


@pytest.mark.usefixtures("steps_cost_the_same")
def test_a_draft_model_gives_back_every_block_once_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(DraftRunner, "trim_memory", lambda self, blocks=(), places=(): given.append(len(blocks)) or 0)
    optimizer = PerformanceOptimizer(None, OptimizationConfig(draft_model=str(DRAFT_DIR)))
    _, stats = optimizer.optimized_generate([[5, 6, 7]] * 4, 40, 0.0)
    assert stats["drafted_tokens"]
    optimizer.optimize_memory()
    assert given == [optimizer.engine.get_stats()["cache_info"]["num_blocks"]]
    optimizer.stop()


@pytest.mark.parametrize("settings", [{"draft_model": str(DRAFT_DIR)}, {"drafter": "draft_model"}], ids=str)
def test_a_draft_model_that_was_not_loaded_cannot_be_turned_on(settings: dict[str, Any]) -> None:
    config = OptimizationConfig(enable_speculative_decoding=False)
    optimizer = PerformanceOptimizer(None, config, **settings)
    config.enable_speculative_decoding = True
    with pytest.raises(ConfigurationError, match="enable_speculative_decoding, which the engine reads"):
        optimizer.optimized_generate([[5]])
    optimizer.stop()


@pytest.mark.usefixtures("steps_cost_the_same")
@pytest.mark.parametrize("kind", ["text", "folder", "live module"])
def test_a_speculative_decoder_writes_what_the_model_alone_writes(kind: str) -> None:
    """004-104, B4-15: `SpeculativeDecoder(main_model, draft_model=None)` by name, also with a live draft model."""
    from transformers import AutoModelForCausalLM

    drafts = {"text": None, "folder": str(DRAFT_DIR)}
    draft = drafts[kind] if kind in drafts else AutoModelForCausalLM.from_pretrained(DRAFT_DIR)
    prompt = list(range(300, 330)) * 2
    plain = PerformanceOptimizer(None, OptimizationConfig(enable_speculative_decoding=False), deterministic=True)
    expected, _ = plain.optimized_generate([prompt], 40, 0.0, n=1)
    decoder = SpeculativeDecoder(None, draft_model=draft, deterministic=True)
    output = decoder.speculative_generate(torch.tensor([prompt]), max_length=40, temperature=0.0)
    assert output.tolist() == expected
    assert 0 < decoder.get_acceptance_rate() <= 1
    for each in (plain, decoder):
        each.stop()


def test_a_speculative_decoder_samples_at_the_callers_temperature(model: nn.Module) -> None:
    """004-104, B4-15, B4-16: seeded, it samples what the engine itself samples without drafts."""
    decoder = SpeculativeDecoder(model)
    params = SamplingParams(temperature=0.7, max_tokens=20, seed=3, speculation_length=0, detokenize=False)
    expected = decoder.engine.generate(PROMPT, params).result()
    for length in (0, 4):
        output = decoder.speculative_generate([PROMPT], 20, length, temperature=0.7, seed=3)
        assert output == expected.output_ids
    decoder.stop()


@pytest.mark.parametrize("aggregation", ["best", "ensemble", "random"])
def test_a_parallel_sampler_chooses_among_samples_of_one_temperature(model: nn.Module, aggregation: str) -> None:
    """004-104: the temperature rose from candidate to candidate, and an ensemble was a text that none of them was."""
    sampler = ParallelSampler(model, num_parallel=4)
    params = SamplingParams(n=4, temperature=0.8, max_tokens=6, seed=5, detokenize=False)
    every = sampler.engine.generate(PROMPT, params).result().output_ids
    best, candidates = sampler.parallel_generate(torch.tensor([PROMPT]), 6, 0.8, aggregation, seed=5)
    assert sorted(rows[0].tolist() for rows in candidates) == sorted(every)
    assert best.tolist() == candidates[0].tolist()
    sampler.stop()


def test_without_fusion_the_linear_modules_are_still_packed(model: nn.Module) -> None:
    optimizer = PerformanceOptimizer(model, OptimizationConfig(enable_kernel_fusion=False))
    found = optimizer.get_optimization_stats()["features"]["compile_model"]
    assert "fused_layers" not in found
    assert "packed_linears" in found
    optimizer.stop()


def test_compiled_copies_are_int8_where_that_is_asked_for(model: nn.Module) -> None:
    """Settings of the engine go before those of the level."""
    optimizer = PerformanceOptimizer(model, quantization="int8", kv_cache_dtype="int8", max_num_seqs=3)
    assert optimizer.get_optimization_stats()["settings"]["quantization"] == "int8"
    assert optimizer.engine.config.max_batch_size == 3
    assert len(optimizer.optimized_generate([PROMPT], 4)[0][0]) == len(PROMPT) + 4
    optimizer.stop()


def test_what_is_read_at_load_cannot_be_assigned_later(model: nn.Module) -> None:
    config = OptimizationConfig()
    optimizer = PerformanceOptimizer(model, config)
    config.compile_model = False
    with pytest.raises(ConfigurationError, match=r"weight_mode.* create a new PerformanceOptimizer"):
        optimizer.optimized_generate([PROMPT])
    config.compile_model = True
    assert optimizer.optimized_generate([PROMPT], 2)[1]["tokens_generated"] == 2
    optimizer.stop()


def test_the_statistics_say_what_is_on_and_what_was_measured(model: nn.Module) -> None:
    """004-102, 004-104."""
    optimizer = PerformanceOptimizer(model, OptimizationConfig(level="latency_optimized", profile_performance=True))
    assert optimizer.describe().endswith("measured: nothing yet")
    _, stats = optimizer.optimized_generate([PROMPT, PROMPT], 6)
    assert stats["profile"]["batch_processing_time"]["count"] >= 6
    found = optimizer.get_optimization_stats()
    assert (found["generations"], found["tokens_generated"]) == (1, 12)
    assert found["settings"]["batch_timeout_ms"] == 0
    assert found["settings"]["max_batch_size"] == 8
    assert 0 < found["memory_usage"] <= 1
    text = optimizer.describe()
    assert text.startswith("level latency_optimized: the lowest latency")
    assert "1 generations, 12 tokens" in text
    assert optimizer.optimize_memory()["freed_bytes"] >= 0
    optimizer.stop()


def test_what_is_on_can_be_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="penstock"):
        PerformanceOptimizer(ScriptedModel([5]), OptimizationConfig(log_optimizations=True)).stop()
    assert "level basic: the engine's defaults" in caplog.text


def test_a_config_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="must be an OptimizationConfig, got dict"):
        PerformanceOptimizer(None, {"level": "basic"})  # type: ignore[arg-type]
