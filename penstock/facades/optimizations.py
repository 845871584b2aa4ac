"""The effects of optimizations: figures of one generation, their totals, and a sentence per feature.

Pure functions of outputs, settings and the engine's statistics. Called by `PerformanceOptimizer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from penstock.api.statistics import statistics
from penstock.api.stats import EngineStats
from penstock.config import Value
from penstock.optimizers.levels import ALWAYS, MIB, NO_CHECKPOINTS, OptimizationConfig
from penstock.outputs import RequestOutput
from penstock.sampling import SamplingParams

LABEL_WIDTH = 30  # in characters


@dataclass(frozen=True, slots=True)
class Generation:
    """One call of `optimized_generate`; times in seconds."""

    strategy: str
    generation_time: float
    first_token_time: float
    tokens_generated: int
    num_candidates: int
    drafted_tokens: int
    accepted_tokens: int
    cached_prompt_tokens: int

    @classmethod
    def of(cls, outputs: Sequence[RequestOutput], params: SamplingParams, seconds: float) -> Generation:
        """The figures of a call that returned these outputs."""
        completions = [completion for output in outputs for completion in output.outputs]
        drafted = sum(completion.num_drafted_tokens for completion in completions)
        candidates = params.num_sequences
        return cls(
            strategy="parallel" if candidates > 1 else "speculative" if drafted else "standard",
            generation_time=seconds,
            first_token_time=max(output.metrics.first_token_s or 0.0 for output in outputs),
            tokens_generated=sum(len(completion.token_ids) for completion in completions),
            num_candidates=candidates,
            drafted_tokens=drafted,
            accepted_tokens=sum(completion.num_accepted_tokens for completion in completions),
            cached_prompt_tokens=sum(output.num_cached_tokens for output in outputs),
        )

    def rates(self) -> dict[str, float | None]:
        """The rates derived from the figures."""
        return rates(self.tokens_generated, self.generation_time, self.drafted_tokens, self.accepted_tokens)


def rates(tokens: int, seconds: float, drafted: int, accepted: int) -> dict[str, float | None]:
    """Returned tokens per second, and the fraction of draft tokens accepted (None if there were none)."""
    return {
        "tokens_per_second": tokens / seconds if seconds > 0 else 0.0,
        "acceptance_rate": accepted / drafted if drafted else None,
    }


def totals(generations: Sequence[Generation]) -> dict[str, Any]:
    """Figures over several generations."""
    drafted = sum(generation.drafted_tokens for generation in generations)
    accepted = sum(generation.accepted_tokens for generation in generations)
    tokens = sum(generation.tokens_generated for generation in generations)
    seconds = sum(generation.generation_time for generation in generations)
    first_token_times = [generation.first_token_time for generation in generations]
    return {
        "generations": len(generations),
        "tokens_generated": tokens,
        "generation_time": seconds,
        "first_token_time": statistics(first_token_times, len(generations)),
        "drafted_tokens": drafted,
        "accepted_tokens": accepted,
        **rates(tokens, seconds, drafted, accepted),
    }


def features(config: OptimizationConfig, stats: EngineStats) -> dict[str, str]:
    """For each flag, whether its feature is on, and what that means for the loaded model."""
    settings, aggregation = stats["config"], config.sample_aggregation
    rank = aggregation if isinstance(aggregation, str) else "your function"
    candidates = f"best of {config.num_parallel_samples} by {rank}; greedy: one"
    if rank == "random":
        candidates = "one sample, which is what a random one of several is"
    chunk_bytes = settings["logits_chunk_bytes"]
    assert isinstance(chunk_bytes, int)
    adaptive = f"on: toward {settings['target']}" if settings["target"] else "off: limits stay as they are set"
    return {
        "enable_speculative_decoding": _switch(
            settings["enable_speculative_decoding"],
            f"drafts of up to {settings['speculation_length']} tokens, made {_draft_source(settings)}; same output",
        ),
        "enable_parallel_sampling": _switch(config.enable_parallel_sampling, candidates),
        "enable_memory_pooling": _switch(
            settings["enable_memory_pooling"], f"keeps at most {chunk_bytes / MIB:.0f} MiB of logits"
        ),
        "compile_model": compiled(settings, stats),
        "enable_adaptive_batching": adaptive,
        "enable_early_stopping": _switch(config.enable_early_stopping, "at the model's end-of-text tokens"),
        "memory_efficient_attention": f"on: {ALWAYS}",
        "enable_gradient_checkpointing": NO_CHECKPOINTS if config.enable_gradient_checkpointing else "off",
    }


def _draft_source(settings: Mapping[str, Value]) -> str:
    drafter, model = settings["drafter"], settings["draft_model"]
    if model is not None and drafter in ("auto", "draft_model"):
        return f"by {model}"
    return "from the text itself" if drafter in ("auto", "ngram") else f"by {drafter}"


def compiled(settings: Mapping[str, Value], stats: EngineStats) -> str:
    """Whether the model runs on compiled kernels, on which, and on whose weights."""
    passes = ", ".join(stats["rewrites"])
    if settings["weight_mode"] == "shared":
        return f"off: layers run unchanged, with shared weights; kernels: {stats['kernels']}"
    if not passes:
        return f"nothing was compiled: {stats['kernels']}"
    return f"on: {passes}; {stats['packed_bytes'] / MIB:.0f} MiB of packed weights ({stats['kernels']})"


def describe(stats: Mapping[str, Any]) -> str:
    """`get_optimization_stats()` as lines of text."""
    lines = [f"level {stats['level']}: {stats['purpose']}"]
    lines += [f"  {name:<{LABEL_WIDTH}} {text}" for name, text in stats["features"].items()]
    lines += ["settings of the engine"]
    lines += [f"  {name:<{LABEL_WIDTH}} {value}" for name, value in stats["settings"].items()]
    return "\n".join([*lines, f"measured: {_measurements(stats)}"])


def _measurements(stats: Mapping[str, Any]) -> str:
    if not stats["generations"]:
        return "nothing yet"
    accepted = stats["acceptance_rate"]
    drafts = "no drafts" if accepted is None else f"{accepted:.0%} of {stats['drafted_tokens']} draft tokens accepted"
    return (
        f"{stats['generations']} generations, {stats['tokens_generated']} tokens, "
        f"{stats['tokens_per_second']:.1f} tokens/s, first token after "
        f"{1000 * stats['first_token_time']['p50']:.1f} ms (median), {drafts}, memory {stats['memory_usage']:.0%} used"
    )


def _switch(on: Value, meaning: str) -> str:
    return f"on: {meaning}" if on else "off"
