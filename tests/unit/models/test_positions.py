"""How long texts of a model may be according to its config; texts of that length give the tokens of transformers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from penstock import InferenceEngine, RequestTooLarge, SamplingParams
from penstock.models.positions import NO_LIMIT, length_limit
from tests.drive import greedy_by_transformers
from tests.tiny_models import build

LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0],
    "long_factor": [4.0],
    "original_max_position_embeddings": 32,
}
PROMPT = [11 + 7 * i % 140 for i in range(80)]
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("rope", "table", "tokens"),
    [
        ({"rope_type": "default"}, 32, 32),
        ({"rope_type": "linear", "factor": 4.0}, 32, 128),
        ({"rope_type": "proportional", "factor": 2}, 32, 64),
        ({"rope_type": "proportional"}, 32, 32),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 32, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 200, 200),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}, 16, 128),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}, 160, 160),
        ({"rope_type": "dynamic", "factor": 4.0}, 32, 32),
        (LONGROPE, 128, 32),
        ({**LONGROPE, "short_factor": [4.0]}, 128, 128),
        ({"rope_type": "axial"}, 32, 32),
        ({"rope_type": "linear", "factor": "4"}, 32, 32),
        ({"rope_type": "linear", "factor": float("nan")}, 32, 32),
        ({"rope_type": "yarn", "factor": 1e300, "original_max_position_embeddings": 32}, 32, NO_LIMIT),
        (
            {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {"rope_type": "default"}},
            32,
            32,
        ),
        (
            {
                "full_attention": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
                "sliding_attention": {"rope_type": "default"},
            },
            32,
            128,
        ),
        ({"full_attention": LONGROPE, "sliding_attention": {"rope_type": "default"}}, 128, 32),
        ({"full_attention": None, "sliding_attention": {"rope_type": "default"}}, 32, 32),
        ({}, 32, 32),
        (None, 32, 32),
    ],
)
def test_length_by_kind_of_rotary_positions(rope: Any, table: int, tokens: int) -> None:
    config = SimpleNamespace(max_position_embeddings=table, rope_parameters=rope)
    assert length_limit(config).tokens == tokens


def saved(folder: Path, **changes: Any) -> Path:
    """A model of 32 positions, saved with these fields of its config changed by hand."""
    model = build("qwen2", max_position_embeddings=32)
    model.save_pretrained(folder)  # type: ignore[operator]
    edit(folder, **changes)
    return folder


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def generate(folder: Path, **settings: Any) -> list[int]:
    greedy = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    engine = InferenceEngine(str(folder), skip_tokenizer_init=True, num_threads=1, **settings)
    try:
        return engine.generate(PROMPT, greedy).result(30).generated_ids
    finally:
        engine.stop()


def by_transformers(folder: Path) -> list[int]:
    from transformers import AutoModelForCausalLM

    return greedy_by_transformers(AutoModelForCausalLM.from_pretrained(folder).eval(), PROMPT, 10)


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.parametrize(
    "rope", [YARN, LINEAR, {**YARN, **LLAMA3, "rope_type": "llama3"}], ids=lambda rope: rope["rope_type"]
)
def test_stretched_positions_are_served_beyond_the_original_length(rope: Any, tmp_path: Path) -> None:
    """A prompt of 80 tokens was refused where 32 positions are stretched by 4."""
    folder = saved(tmp_path, rope_parameters=rope)
    assert generate(folder) == generate(folder, max_sequence_length=128) == by_transformers(folder)


def test_the_remedy_for_a_refused_dynamic_text_works(tmp_path: Path) -> None:
    """The error said to raise max_sequence_length, which had no effect."""
    rope = {**LINEAR, "rope_type": "dynamic"}
    folder = saved(tmp_path, rope_parameters=rope)
    with pytest.raises(RequestTooLarge, match="set rope_type to yarn and original_max_position_embeddings to 32"):
        generate(folder, max_sequence_length=128)
    edit(folder, rope_parameters={**rope, "rope_type": "yarn", "original_max_position_embeddings": 32})
    assert generate(folder) == by_transformers(folder)


def test_the_remedy_for_a_refused_longrope_text_works(tmp_path: Path) -> None:
    rope = {**LONGROPE, "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]}
    folder = saved(tmp_path, rope_parameters=rope, max_position_embeddings=128)
    with pytest.raises(RequestTooLarge, match="set short_factor to what long_factor is; then 128 tokens are possible"):
        generate(folder)
    edit(folder, rope_parameters={**rope, "short_factor": rope["long_factor"]})
    assert generate(folder) == by_transformers(folder)


def test_a_length_beyond_the_model_is_cut_with_a_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved(tmp_path)
    with (
        caplog.at_level(logging.WARNING, "penstock"),
        pytest.raises(RequestTooLarge, match="Positions can be stretched"),
    ):
        generate(folder, max_sequence_length=128)
    assert "max_sequence_length=128 is cut to 32: the model's config has max_position_embeddings=32" in caplog.text
    edit(folder, rope_parameters=YARN)
    caplog.clear()
    assert generate(folder, max_sequence_length=128) == by_transformers(folder)
    assert not [record for record in caplog.records if record.name.startswith("penstock")]


def test_a_limit_of_the_settings_says_so(tmp_path: Path) -> None:
    folder = saved(tmp_path, rope_parameters=YARN)
    with pytest.raises(RequestTooLarge, match="shorten the prompt\nTo allow more, raise max_sequence_length"):
        generate(folder, max_sequence_length=64)
    with pytest.raises(
        RequestTooLarge, match="shorten the prompt\nTo allow more, raise memory_pool_size or kv_cache_tokens"
    ):
        generate(folder, kv_cache_tokens=64)
