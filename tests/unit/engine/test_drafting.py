"""The drafter that the settings select."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.cache.manager import CacheManager
from penstock.config import EngineConfig
from penstock.demo import DRAFT_DIR, MODEL_DIR
from penstock.engine.drafting import load_draft_model, make_drafter
from penstock.errors import ConfigurationError
from penstock.models.protocol import ModelSpec

LARGE = ModelSpec(name="large", vocab_size=4096, max_length=2048)
ON = {"enable_speculative_decoding": True}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "ngram"),
        ({"drafter": "ngram"}, "ngram"),
        ({"drafter": "suffix"}, "suffix"),
        ({"drafter": "ngram", "draft_model": "somewhere"}, "ngram"),
        ({"draft_model": "somewhere"}, "ngram"),
        ({"drafter": "draft_model"}, "ngram"),
    ],
    ids=str,
)
def test_a_drafter_is_made_as_it_is_named(settings: dict[str, Any], name: str) -> None:
    """Without a loaded draft model, speculation that is enabled later still has a drafter."""
    assert make_drafter(EngineConfig(**settings), None, CacheManager(4, 4)).name == name


@pytest.mark.parametrize(
    "settings",
    [{}, {"drafter": "draft_model"}, {"draft_model": "somewhere"}, {**ON}, {**ON, "drafter": "suffix"}],
    ids=str,
)
def test_no_model_is_loaded_unless_asked_for(settings: dict[str, Any]) -> None:
    assert load_draft_model(None, LARGE, EngineConfig(**settings)) is None


def test_the_demo_model_has_a_draft_of_its_own() -> None:
    draft = load_draft_model(None, LARGE, EngineConfig(**ON, drafter="draft_model"))
    assert draft is not None
    assert draft.spec.name == str(DRAFT_DIR)
    draft.allocate(4, 4)
    drafter = make_drafter(EngineConfig(**ON, drafter="draft_model"), draft, CacheManager(4, 4))
    assert (drafter.name, drafter.runs_model) == ("draft_model", True)
    draft.close()


def test_any_other_model_needs_one_that_is_named() -> None:
    with pytest.raises(ConfigurationError, match="needs draft_model='folder or hub id'"):
        load_draft_model(str(MODEL_DIR), LARGE, EngineConfig(**ON, drafter="draft_model"))


def test_a_draft_model_that_is_named_is_used() -> None:
    draft = load_draft_model(str(MODEL_DIR), LARGE, EngineConfig(**ON, draft_model=str(DRAFT_DIR)))
    assert draft is not None
    assert draft.spec.name == str(DRAFT_DIR)
    draft.close()
