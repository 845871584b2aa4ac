"""`PerformanceOptimizer`: one call that generates, optimized by level and flags, and reports the result.

A thin synchronous facade of `InferenceEngine`: it never schedules, samples or caches, and never changes how tokens are
sampled. Its `engine` offers everything else: streaming, asyncio, priorities.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, Unpack

from penstock.api.log import engine_logger
from penstock.api.stats import EngineStats
from penstock.config import EngineConfig, EngineSettings, canonical, uses_draft_model
from penstock.engine.inference import InferenceEngine
from penstock.errors import ConfigurationError, RequestError
from penstock.facades.optimizations import Generation, describe, features, totals
from penstock.held_settings import LIVE_SETTINGS
from penstock.optimizers.levels import NO_CHECKPOINTS, OptimizationConfig
from penstock.outputs import RequestOutput
from penstock.sampling import SamplingParams

KEPT_GENERATIONS = 1024
# A caller who passes one of these replaces all of the level's values for them.
COUNTS = frozenset({"n", "best_of", "rank_by", "use_beam_search"})


class PerformanceOptimizer:
    """Generates with one model as `config` says; the constructor loads it.

    `model` is what `InferenceEngine` accepts: a live module, a folder, a hub id, or None for the demo model. `settings`
    are keywords of `EngineConfig` and override the level. Raises `ConfigurationError`, `OutOfMemory`.
    """

    def __init__(
        self, model: object = None, config: OptimizationConfig | None = None, **settings: Unpack[EngineSettings]
    ) -> None:
        self.config = config or OptimizationConfig()
        if not isinstance(self.config, OptimizationConfig):
            raise ConfigurationError(f"config must be an OptimizationConfig, got {type(config).__name__}")
        self._explicit: dict[str, Any] = {"skip_tokenizer_init": True, **canonical(settings)}
        self._applied = self.config.engine_settings()
        self._generations: deque[Generation] = deque(maxlen=KEPT_GENERATIONS)
        engine_config = EngineConfig(**{**self._applied, **self._explicit})
        lacks_draft_model = uses_draft_model(engine_config) and engine_config.enable_speculative_decoding is not True
        self._live = LIVE_SETTINGS - {"enable_speculative_decoding"} if lacks_draft_model else LIVE_SETTINGS
        self.engine = InferenceEngine(model, None, engine_config)
        self.engine.start()
        self._log_setup()

    def optimized_generate(
        self,
        input_ids: Any,
        max_length: int = 50,
        temperature: float = 1.0,
        *,
        attention_mask: Any = None,
        pad_token_id: int = 0,
        **sampling: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Generate up to `max_length` new tokens after each prompt: (output, statistics).

        `input_ids` is a tensor or array [prompts, tokens], or lists of token ids, with an `attention_mask` of the same
        shape if rows are padded. The output holds prompt and new tokens, without padding before or between them, in the
        type of `input_ids`: an integer tensor [prompts, longest] in which shorter rows end with `pad_token_id`, or
        lists. `sampling` takes further keywords of `SamplingParams`; with `n`, the output has n rows for each prompt.

        The statistics of this call are strategy ("parallel" if the best of several candidates was chosen, otherwise
        "speculative" or "standard"), generation_time and first_token_time in seconds, tokens_generated (returned
        tokens) and tokens_per_second, num_candidates, drafted_tokens, accepted_tokens and acceptance_rate (None without
        drafts), cached_prompt_tokens, adaptive_params (the limits derived from measured step times), level. Raises
        `RequestError` and whatever awaiting a request raises; `ConfigurationError` for a changed setting that is only
        read at load.
        """
        self._apply()
        prompts = _rows(input_ids, attention_mask)
        params = self._params(max_length, temperature, sampling)
        begin = time.perf_counter()
        outputs = self._run(prompts, params)
        generation = Generation.of(outputs, params, time.perf_counter() - begin)
        self._generations.append(generation)
        rows = [row for output in outputs for row in output.output_ids]
        return _in_type_of(input_ids, rows, pad_token_id), self._stats(generation)

    def get_optimization_stats(self) -> dict[str, Any]:
        """The features with reasons, the settings in force, and figures over the last thousand generations."""
        stats = self.engine.get_stats()
        return {
            "level": self.config.level.value,
            "purpose": self.config.preset.purpose,
            "settings": {name: stats["config"][name] for name in (*self._applied, *self._explicit)},
            "features": features(self.config, stats),
            **totals(list(self._generations)),
            "memory_usage": stats["memory_usage"],
            "adaptive_params": _tuned_limits(stats),
        }

    def describe(self) -> str:
        """`get_optimization_stats()` as readable text."""
        return describe(self.get_optimization_stats())

    def optimize_memory(self) -> dict[str, float]:
        """Release all memory that no running request needs; see `InferenceEngine.optimize_memory`."""
        return self.engine.optimize_memory()

    def stop(self) -> None:
        """Free the model and its memory; also happens when the object is dropped."""
        self.engine.stop(0.0)

    def _apply(self) -> None:
        """Apply flags assigned since the last generation to the engine. Raises `ConfigurationError`."""
        settings = self.config.engine_settings()
        changes = {name: value for name, value in settings.items() if value != self._applied.get(name)}
        changes |= {name: None for name in self._applied if name not in settings}
        fixed_names = sorted(changes.keys() - self._live)
        if fixed_names:
            raise ConfigurationError(
                f"the assigned flags change {', '.join(fixed_names)}, which the engine reads when it loads its model: "
                "create a new PerformanceOptimizer"
            )
        for name, value in changes.items():
            if name not in self._explicit:
                setattr(self.engine.config, name, value)
        self._applied = settings

    def _params(self, max_length: int, temperature: float, sampling: Mapping[str, Any]) -> SamplingParams:
        defaults = self.config.sampling()
        if COUNTS & sampling.keys():
            defaults = {name: value for name, value in defaults.items() if name not in COUNTS}
        explicit = {"max_tokens": max_length, "temperature": temperature, "detokenize": False, **sampling}
        try:
            return SamplingParams(**{**defaults, **explicit})
        except TypeError as error:
            raise RequestError(f"{error}: sampling takes the keywords of SamplingParams") from None

    def _run(self, prompts: list[list[int]], params: SamplingParams) -> list[RequestOutput]:
        handles = [self.engine.generate(prompt, params) for prompt in prompts]
        try:
            return [handle.result() for handle in handles]
        finally:
            for handle in handles:  # the remaining ones, if one failed
                handle.cancel()

    def _stats(self, generation: Generation) -> dict[str, Any]:
        figures = {**dataclasses.asdict(generation), **generation.rates(), "level": self.config.level.value}
        if not (self.config.enable_adaptive_batching or self.config.profile_performance):
            return figures | {"adaptive_params": {}}
        stats = self.engine.get_stats()
        profile = {"profile": stats["performance_metrics"]} if self.config.profile_performance else {}
        return figures | {"adaptive_params": _tuned_limits(stats), **profile}

    def _log_setup(self) -> None:
        log = engine_logger(self.engine.config)
        if self.config.enable_gradient_checkpointing:
            log.warning(f"enable_gradient_checkpointing has {NO_CHECKPOINTS}")
        if self.config.log_optimizations:
            log.info(self.describe())


def _tuned_limits(stats: EngineStats) -> dict[str, float]:
    return dict(stats["tuner"].get("limits", {}))


def _rows(input_ids: Any, attention_mask: Any) -> list[list[int]]:
    """Token ids of each prompt, without padding. Raises `RequestError`."""
    ids, mask = _as_lists(input_ids), None if attention_mask is None else _as_lists(attention_mask)
    if not ids:
        raise RequestError("input_ids contains no prompt")
    if mask is None:
        return ids
    if [len(row) for row in mask] != [len(row) for row in ids]:
        raise RequestError("attention_mask must have the shape of input_ids")
    return [
        [token for token, is_prompt in zip(row, mask_row, strict=True) if is_prompt]
        for row, mask_row in zip(ids, mask, strict=True)
    ]


def _as_lists(values: Any) -> list[list[int]]:
    rows = values.tolist() if hasattr(values, "tolist") else list(values)
    if rows and isinstance(rows[0], Integral):  # numpy integers too
        return [rows]
    if not all(isinstance(row, list | tuple) for row in rows):
        raise RequestError("token ids must be a tensor or array [prompts, tokens], or lists of integers")
    return [list(row) for row in rows]


def _in_type_of(input_ids: Any, rows: list[list[int]], pad: int) -> Any:
    """`rows` in the type of `input_ids`."""
    if isinstance(input_ids, Sequence):
        return rows
    longest = max(map(len, rows))
    padded = [row + [pad] * (longest - len(row)) for row in rows]
    if hasattr(input_ids, "new_tensor"):
        return input_ids.new_tensor(padded)
    import numpy as np  # already loaded by a caller who passes an array

    return np.asarray(padded, dtype=input_ids.dtype)
