"""Figures of generations, computed by hand."""

from __future__ import annotations

import pytest

from penstock.facades.optimizations import Generation, describe, features, rates, totals
from penstock.optimizers.levels import OptimizationConfig
from penstock.outputs import CompletionOutput, RequestMetrics, RequestOutput
from penstock.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0.0)
STATS = {
    "config": {
        "enable_speculative_decoding": True,
        "speculation_length": 4,
        "draft_model": None,
        "drafter": "auto",
        "enable_memory_pooling": False,
        "logits_chunk_bytes": 2**20,
        "weight_mode": "packed",
        "target": "latency",
    },
    "kernels": "compiled",
    "rewrites": ("fused_layers 2/2", "packed_linears 1"),
    "packed_bytes": 7 * 2**20,
}


def output(tokens: int, drafted: int = 0, accepted: int = 0, first_s: float = 0.1) -> RequestOutput:
    one = CompletionOutput(token_ids=[7] * tokens, num_drafted_tokens=drafted, num_accepted_tokens=accepted)
    metrics = RequestMetrics(first_token_s=first_s)
    return RequestOutput("r", None, [1, 2], [one], num_cached_tokens=2, metrics=metrics)


def test_a_generation_adds_up_its_prompts() -> None:
    made = Generation.of([output(3, 4, 2, 0.1), output(5, 4, 4, 0.3)], GREEDY, seconds=2.0)
    assert (made.tokens_generated, made.drafted_tokens, made.accepted_tokens) == (8, 8, 6)
    assert (made.first_token_time, made.generation_time, made.cached_prompt_tokens) == (0.3, 2.0, 4)
    assert made.rates() == {"tokens_per_second": 4.0, "acceptance_rate": 0.75}


def test_the_strategy_names_what_was_done() -> None:
    def strategy(params: SamplingParams, drafted: int = 0) -> tuple[str, int]:
        made = Generation.of([output(3, drafted)], params, 1.0)
        return made.strategy, made.num_candidates

    assert strategy(GREEDY) == ("standard", 1)
    assert strategy(GREEDY, drafted=2) == ("speculative", 1)
    assert strategy(SamplingParams(best_of=4), drafted=2) == ("parallel", 4)
    assert strategy(SamplingParams(best_of=4, temperature=0)) == ("standard", 1)


def test_totals_are_sums_over_sums() -> None:
    made = [Generation.of([output(n, n, 1, n / 10)], GREEDY, seconds) for n, seconds in ((2, 1.0), (6, 3.0))]
    found = totals(made)
    assert (found["generations"], found["tokens_generated"], found["tokens_per_second"]) == (2, 8, 2.0)
    assert (found["acceptance_rate"], found["first_token_time"]["max"]) == (0.25, 0.6)
    assert totals([])["tokens_per_second"] == 0.0
    assert rates(0, 0.0, 0, 0)["acceptance_rate"] is None


def test_features_say_what_is_on_and_what_was_compiled() -> None:
    config = OptimizationConfig(enable_gradient_checkpointing=True, num_parallel_samples=3)
    found = features(config, STATS)
    assert found["enable_speculative_decoding"] == (
        "on: drafts of up to 4 tokens, made from the text itself; same output"
    )
    assert found["enable_parallel_sampling"] == "on: best of 3 by best; greedy: one"
    assert found["enable_memory_pooling"] == "off"
    assert found["compile_model"] == ("on: fused_layers 2/2, packed_linears 1; 7 MiB of packed weights (compiled)")
    assert found["enable_adaptive_batching"] == "on: toward latency"
    assert found["enable_gradient_checkpointing"].startswith("no effect: ")


@pytest.mark.parametrize(
    ("drafter", "who"),
    [("auto", "by small"), ("draft_model", "by small"), ("ngram", "from the text itself"), ("suffix", "by suffix")],
)
def test_a_draft_model_is_named_where_it_drafts(drafter: str, who: str) -> None:
    named = {**STATS, "config": {**STATS["config"], "draft_model": "small", "drafter": drafter}}  # type: ignore[dict-item]
    assert f"made {who}; same" in features(OptimizationConfig(), named)["enable_speculative_decoding"]


def test_what_could_not_be_compiled_is_said() -> None:
    plain = {**STATS, "rewrites": (), "kernels": "plain torch: no compiler"}
    assert features(OptimizationConfig(), plain)["compile_model"] == "nothing was compiled: plain torch: no compiler"
    off = {**plain, "config": {**STATS["config"], "weight_mode": "shared"}}  # type: ignore[dict-item]
    assert features(OptimizationConfig(), off)["compile_model"].startswith(
        "off: layers run unchanged, with shared weights"
    )


def test_the_description_has_level_features_settings_and_figures() -> None:
    made = [Generation.of([output(8, 4, 2)], GREEDY, 2.0)]
    found = {"level": "basic", "purpose": "nothing", "features": {"a": "on"}, "settings": {"b": 1}, "memory_usage": 0.5}
    lines = describe({**found, **totals(made)}).splitlines()
    assert lines[0] == "level basic: nothing"
    assert [line.split() for line in lines[1:4]] == [["a", "on"], ["settings", "of", "the", "engine"], ["b", "1"]]
    assert lines[4] == (
        "measured: 1 generations, 8 tokens, 4.0 tokens/s, first token after 100.0 ms (median), "
        "50% of 4 draft tokens accepted, memory 50% used"
    )
    assert describe({**found, **totals([])}).endswith("measured: nothing yet")
