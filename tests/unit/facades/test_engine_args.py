"""Arguments take effect under either name and override a facade's defaults."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.config import EngineConfig
from penstock.errors import ConfigurationError
from penstock.facades.engine_args import engine_config

PRESET = {"max_batch_size": 256, "max_sequence_length": None, "gpu_memory_utilization": 0.9}


def test_settings_under_our_names_beat_the_presets() -> None:
    """Defaults under other engines' names used to override them."""
    config = engine_config({"max_batch_size": 8, "max_sequence_length": 100, "enable_metrics": False}, PRESET)
    assert (config.max_batch_size, config.max_sequence_length, config.enable_metrics) == (8, 100, False)


def test_settings_under_other_names_beat_the_presets_too() -> None:
    config = engine_config({"max_num_seqs": 8, "max_model_len": 100, "disable_log_stats": True}, PRESET)
    assert (config.max_batch_size, config.max_sequence_length, config.enable_metrics) == (8, 100, False)


def test_bytes_asked_for_beat_a_preset_fraction() -> None:
    assert engine_config({"kv_cache_bytes": 1 << 20}, PRESET).gpu_memory_utilization is None
    assert engine_config({}, PRESET).gpu_memory_utilization == 0.9


def test_a_setting_under_both_names_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="max_batch_size is given twice"):
        EngineConfig(max_batch_size=8, max_num_seqs=8)


def test_other_names_may_be_assigned() -> None:
    config = EngineConfig()
    config.max_num_seqs = 3
    assert config.max_batch_size == 3


def test_environment_beats_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text("max_num_seqs: 4\nmax_queue_size: 5\n")
    monkeypatch.setenv("PENSTOCK_MAX_BATCH_SIZE", "8")
    config = EngineConfig.from_yaml(file)
    assert (config.max_batch_size, config.max_queue_size) == (8, 5)
