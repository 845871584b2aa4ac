"""Loading: devices, dtypes, defaults, EOS ids, and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from penstock.config import EngineConfig
from penstock.demo import MODEL_DIR
from penstock.errors import ConfigurationError
from penstock.models.loading import load, resolve_device, resolve_dtype
from tests.tiny_models import ARCHITECTURES, build

IDS_ONLY = {"skip_tokenizer_init": True}


def test_no_model_means_the_demo_model() -> None:
    loaded = load(None, None, EngineConfig())
    assert loaded.runner.spec.name == str(MODEL_DIR)
    assert loaded.tokenizer.decode(loaded.tokenizer("def f():")["input_ids"]) == "def f():"


def test_a_folder_keeps_its_checkpoints_dtype_unless_told_otherwise(tmp_path: Path) -> None:
    build("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert load(tmp_path, None, EngineConfig(**IDS_ONLY)).runner.spec.dtype == "bfloat16"
    assert load(tmp_path, None, EngineConfig(dtype="float32", **IDS_ONLY)).runner.spec.dtype == "float32"


def test_a_folder_below_a_home_is_found_and_an_unknown_home_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check expanded "~", the loader took it for a hub id; without a home it was an untyped error."""
    monkeypatch.setenv("HOME", str(tmp_path))
    build("llama").save_pretrained(tmp_path / "model")
    assert load("~/model", None, EngineConfig(**IDS_ONLY)).runner.spec.name == str(tmp_path / "model")
    with pytest.raises(ConfigurationError, match="home folder that is not known here: pass the whole path"):
        load("~nobody-of-that-name/model", None, EngineConfig(**IDS_ONLY))


def test_generation_defaults_and_all_eos_ids_come_from_the_generation_config() -> None:
    model = build("llama")
    model.generation_config.update(eos_token_id=[3, 5], temperature=0.5, top_p=0.8, do_sample=True)
    spec = load(model, None, EngineConfig(**IDS_ONLY)).runner.spec
    assert spec.eos_token_ids == {3, 5}
    assert (spec.defaults["temperature"], spec.defaults["top_p"]) == (0.5, 0.8)


def test_a_model_that_does_not_sample_by_default_is_greedy_by_default() -> None:
    model = build("llama")
    model.generation_config.update(do_sample=False, temperature=0.5)
    assert load(model, None, EngineConfig(**IDS_ONLY)).runner.spec.defaults["temperature"] == 0.0


def test_the_shorter_of_the_models_and_the_configured_length_holds() -> None:
    model = build("llama")
    assert load(model, None, EngineConfig(max_model_len=100, **IDS_ONLY)).runner.spec.max_length == 100
    assert load(model, None, EngineConfig(max_model_len=None, **IDS_ONLY)).runner.spec.max_length == 512


def test_kv_bytes_per_token_are_those_of_all_layers() -> None:
    spec = load(build("llama"), None, EngineConfig(**IDS_ONLY)).runner.spec
    assert spec.kv_bytes_per_token == 2 * 2 * (8 + 8) * 4


@pytest.mark.parametrize("name", ["cuda:63", "toaster"])
def test_an_absent_device_is_refused_with_what_to_use(name: str) -> None:
    with pytest.raises(ConfigurationError, match='use "'):
        resolve_device(name)


def test_an_unknown_dtype_is_refused() -> None:
    assert resolve_dtype("bf16") is torch.bfloat16
    with pytest.raises(ConfigurationError, match="float16"):
        resolve_dtype("float12")


def test_a_live_module_without_tokenizer_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigurationError, match="skip_tokenizer_init"):
        load(build("llama"), None, EngineConfig())


def test_a_module_that_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="not a transformers model"):
        load(nn.Linear(2, 2), None, EngineConfig(**IDS_ONLY))


def test_a_model_whose_paged_pass_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that ignores position_ids computes something else on a ragged batch: the probe at load must see it."""
    model = build("llama")
    rotary = type(model.model.rotary_emb)
    right = rotary.forward

    def deaf(self: nn.Module, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return right(self, x, torch.arange(x.shape[1])[None])

    monkeypatch.setattr(rotary, "forward", deaf)
    with pytest.raises(ConfigurationError, match="differs from the model's own"):
        load(model, None, EngineConfig(**IDS_ONLY))


def test_rotary_frequencies_that_depend_on_neighbours_end_the_context() -> None:
    """longrope chooses frequencies by the longest position of a pass: another request changed the tokens."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    model = build("phi3", rope_parameters=rope, original_max_position_embeddings=64)
    assert load(model, None, EngineConfig(max_model_len=None, **IDS_ONLY)).runner.spec.max_length == 64


def test_windows_that_only_a_mask_would_apply_are_refused() -> None:
    """phimoe applies its window through the mask alone, which a probe shorter than the window cannot detect."""
    from transformers import PhimoeConfig, PhimoeForCausalLM

    shape = {**ARCHITECTURES["mixtral"], "sliding_window": 16}
    model = PhimoeForCausalLM(PhimoeConfig(**shape)).eval()
    with pytest.raises(ConfigurationError, match="slide over 16 tokens"):
        load(model, None, EngineConfig(**IDS_ONLY))
    assert load(model, None, EngineConfig(max_model_len=16, **IDS_ONLY)).runner.spec.max_length == 16


def test_an_error_that_cannot_say_what_it_is_does_not_hide_what_failed_at_load() -> None:
    """The message was built with the error's own `__str__`, and what that raised hid the error."""

    class MuteError(Exception):
        def __str__(self) -> str:
            raise SystemExit(9)

    class Refusing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise MuteError

    model = build("llama")
    model.model.layers[0].mlp.act_fn = Refusing()
    with pytest.raises(ConfigurationError, match="a trial pass of the model failed: MuteError"):
        load(model, None, EngineConfig(**IDS_ONLY))
