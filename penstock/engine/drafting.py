"""Chooses an engine's drafter: reads the settings, loads the draft model, constructs the drafter.

Called once by `assemble`, on the model's thread; imports torch only if a draft model must be loaded.
"""

from __future__ import annotations

from penstock.cache.manager import CacheManager
from penstock.config import EngineConfig, uses_draft_model
from penstock.demo import DRAFT_DIR
from penstock.errors import ConfigurationError
from penstock.models.protocol import GuessingRunner, ModelSpec
from penstock.optimizers.speculation.draft_model import ModelDrafter
from penstock.optimizers.speculation.drafter import Drafter
from penstock.optimizers.speculation.ngram import NgramDrafter
from penstock.optimizers.speculation.suffix import SuffixDrafter


def load_draft_model(model: object, target: ModelSpec, config: EngineConfig) -> GuessingRunner | None:
    """The draft model for `target`, which was loaded from `model`; None if the settings need none.

    Raises `ConfigurationError` if it is not named, cannot be loaded, or has another vocabulary.
    """
    if not (config.enable_speculative_decoding is True and uses_draft_model(config)):
        return None
    source = config.draft_model or (str(DRAFT_DIR) if model is None else None)
    if source is None:
        raise ConfigurationError("drafter='draft_model' needs draft_model='folder or hub id' of a smaller model")
    from penstock.models.loading import load_draft

    return load_draft(source, target, config)


def make_drafter(config: EngineConfig, draft: GuessingRunner | None, cache: CacheManager) -> Drafter:
    """The configured drafter; "ngram" if a draft model is configured but was not loaded."""
    if draft is not None:
        return ModelDrafter(
            draft.guess,
            max_length=draft.spec.max_length,
            num_blocks=cache.num_blocks,
            block_size=cache.block_size,
            max_tokens=config.max_num_batched_tokens,
        )
    return SuffixDrafter() if config.drafter == "suffix" else NgramDrafter()
