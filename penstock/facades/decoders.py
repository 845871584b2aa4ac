"""`SpeculativeDecoder` and `ParallelSampler`: two techniques of `PerformanceOptimizer`, each under a name of its own.

Thin facades that choose flags and sampling parameters. They never draft, verify, sample or rank, and the temperature is
always the caller's. Called by programs that use one technique.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any, Unpack

from penstock.config import EngineSettings
from penstock.engine.inference import InferenceEngine
from penstock.errors import ConfigurationError, text_of
from penstock.facades.optimizer import PerformanceOptimizer
from penstock.optimizers.levels import MEANINGLESS, OptimizationConfig, ranking_of, warn_of_no_effect
from penstock.sampling import RankFunction


class SpeculativeDecoder:
    """Generates with speculation: the same output as without, in fewer steps; the constructor loads the model.

    `main_model` is what `InferenceEngine` accepts. `draft_model` is a folder, a hub id or a live transformers module
    (saved to a temporary folder, from which the engine loads a copy); None drafts from the text itself. `settings` are
    keywords of `EngineConfig`. Raises `ConfigurationError`, `OutOfMemory`.
    """

    def __init__(self, main_model: object, draft_model: object = None, **settings: Any) -> None:
        with _saved(draft_model) as source:
            config = OptimizationConfig(enable_parallel_sampling=False, draft_model=source)
            self._optimizer = PerformanceOptimizer(main_model, config, **settings)

    @property
    def engine(self) -> InferenceEngine:
        """The engine, for everything else."""
        return self._optimizer.engine

    def speculative_generate(
        self,
        input_ids: object,
        max_length: int = 50,
        speculation_length: int = 4,
        acceptance_threshold: float = 0.8,
        temperature: float = 1.0,
        **sampling: Any,
    ) -> Any:
        """Generate up to `max_length` new tokens after each prompt: prompts and output in the type of `input_ids`.

        A step verifies at most `speculation_length` draft tokens of a prompt, fewer where more would not pay.
        `acceptance_threshold` has no effect: drafts are accepted by the model's probabilities. `sampling`, the output
        and the errors are those of `PerformanceOptimizer.optimized_generate`.
        """
        threshold, reason = MEANINGLESS["acceptance_threshold"]
        if acceptance_threshold != threshold:
            warn_of_no_effect("acceptance_threshold", reason)
        config = self._optimizer.config
        if speculation_length > config.speculation_length:
            config.speculation_length = speculation_length
        sampling = {"speculation_length": speculation_length, **sampling}
        return self._optimizer.optimized_generate(input_ids, max_length, temperature, **sampling)[0]

    def get_acceptance_rate(self) -> float:
        """The fraction of draft tokens that were accepted, over the last thousand generations; 0 without drafts."""
        return self._optimizer.get_optimization_stats()["acceptance_rate"] or 0.0

    def stop(self) -> None:
        """Free the models and their memory; also happens when the object is dropped."""
        self._optimizer.stop()


class ParallelSampler:
    """Generates several candidates for each prompt, in one batch, and chooses one; the constructor loads the model.

    `model` is what `InferenceEngine` accepts, `settings` are keywords of `EngineConfig`. Raises `ConfigurationError`,
    `OutOfMemory`.
    """

    def __init__(self, model: object, num_parallel: int = 4, **settings: Unpack[EngineSettings]) -> None:
        self.num_parallel = num_parallel
        config = OptimizationConfig(num_parallel_samples=num_parallel)
        self._optimizer = PerformanceOptimizer(model, config, **settings)

    @property
    def engine(self) -> InferenceEngine:
        """The engine, for everything else."""
        return self._optimizer.engine

    def parallel_generate(
        self,
        input_ids: object,
        max_length: int = 50,
        temperature: float = 1.0,
        aggregation: str | RankFunction = "best",
        **sampling: Any,
    ) -> tuple[Any, list[Any]]:
        """Generate `num_parallel` candidates for each prompt: (the chosen ones, all), in the type of `input_ids`.

        The second value is a list of `num_parallel` batches, the chosen candidates first. `aggregation` is what
        `OptimizationConfig.sample_aggregation` may be. `max_length`, `sampling`, the output and the errors are those of
        `PerformanceOptimizer.optimized_generate`; all candidates are sampled at the same temperature.
        """
        sampling = {"n": self.num_parallel, "rank_by": ranking_of(aggregation), **sampling}
        rows, _ = self._optimizer.optimized_generate(input_ids, max_length, temperature, **sampling)
        candidates = [rows[i :: self.num_parallel] for i in range(self.num_parallel)]
        return candidates[0], candidates

    def stop(self) -> None:
        """Free the model and its memory; also happens when the object is dropped."""
        self._optimizer.stop()


@contextlib.contextmanager
def _saved(draft_model: object) -> Iterator[str | None]:
    """Where an engine can load the draft model from: a live module lies in a folder that is removed afterwards."""
    if draft_model is None or isinstance(draft_model, str):
        yield draft_model
        return
    save = getattr(draft_model, "save_pretrained", None)
    if save is None:
        raise ConfigurationError(
            f"a draft model cannot be a {type(draft_model).__name__}: pass a folder, a hub id, a module with "
            "save_pretrained, or nothing to draft from the text itself"
        )
    with tempfile.TemporaryDirectory(prefix="penstock-draft-") as folder:
        try:
            save(folder)
        except Exception as error:
            raise ConfigurationError(f"the draft model cannot be saved: {text_of(error)}") from error
        yield folder
