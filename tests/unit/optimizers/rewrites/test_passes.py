"""Rewrites take over what they can prove equal, leave the rest, and can be left out one by one."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from penstock.config import REWRITES, EngineConfig
from penstock.errors import ConfigurationError
from penstock.kernels.native import Kernels, available
from penstock.models.checks import compare
from penstock.models.loading import load
from penstock.optimizers.rewrites.fused_layer import FusedLayer, PassThroughLayer
from penstock.optimizers.rewrites.packed_modules import PackedLinear, PackedNorm
from penstock.optimizers.rewrites.passes import PASSES
from tests.tiny_models import ARCHITECTURES, FUSED, build
from tests.unit.optimizers.rewrites.rewritten import rewritten

pytestmark = pytest.mark.skipif(not available(), reason="no compiler")
PLAIN = {"fused_layers": FusedLayer, "packed_linears": PackedLinear, "packed_norms": PackedNorm}
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.05}


@pytest.fixture
def kernels() -> Iterator[Kernels]:
    rewrite = Kernels(1)
    yield rewrite
    rewrite.close()


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_rewritten_as_far_as_the_table_says(
    kernels: Kernels, name: str, dtype: torch.dtype
) -> None:
    rewrite = rewritten(build(name).to(dtype), kernels)
    fused = rewrite.reports["fused_layers"]
    assert (fused.num_replaced, fused.num_candidates) == (FUSED[name], 2)
    found = {pass_name: rewrite.count(kind) for pass_name, kind in PLAIN.items()}
    found["fused_layers"] = sum(part.num_layers for part in rewrite.module.modules() if isinstance(part, FusedLayer))
    assert found == {pass_name: applied.num_replaced for pass_name, applied in rewrite.reports.items()}
    assert not any(type(module) is nn.Linear for module in rewrite.module.modules())
    rewrite.compare(ROUNDING[dtype])


def test_the_names_of_a_configuration_are_those_of_the_passes() -> None:
    assert set(REWRITES) == {"kernels", *PASSES}


def test_an_unknown_name_is_refused_with_the_nearest_or_all_that_there_are() -> None:
    with pytest.raises(ConfigurationError, match="there is no rewrite 'fused_layer': did you mean 'fused_layers'"):
        EngineConfig(disabled_rewrites=("packed_norms", "fused_layer"))
    config = EngineConfig(disabled_rewrites=["kernels"])
    with pytest.raises(ConfigurationError, match="choose from kernels, fused_layers, packed_linears, packed_norms"):
        config.disabled_rewrites = ("zzz",)
    assert config.disabled_rewrites == ("kernels",)


@pytest.mark.parametrize("disabled", PASSES)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_each_pass_can_be_left_out(kernels: Kernels, name: str, disabled: str) -> None:
    rewrite = rewritten(build(name), kernels, disabled=[disabled])
    assert rewrite.reports.keys() == PASSES.keys() - {disabled}
    assert rewrite.count(PLAIN[disabled]) == 0
    assert all(rewrite.count(kind) for pass_name, kind in PLAIN.items() if pass_name != disabled)
    rewrite.compare(1e-5)


def test_without_fusing_its_matrices_and_norms_are_packed_one_by_one(kernels: Kernels) -> None:
    rewrite = rewritten(build("llama"), kernels, disabled=["fused_layers"])
    assert rewrite.count(PackedLinear) == 2 * 7 + 1
    assert rewrite.count(PackedNorm) == 2 * 2 + 1


class Louder(LlamaDecoderLayer):
    """One step louder than its structure says."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs) * 1.01


class Sharper(LlamaDecoderLayer):
    """Attends more sharply far from the beginning, where no trial goes."""

    def forward(self, hidden_states: Tensor, *args: Any, position_ids: Tensor, **kwargs: Any) -> Tensor:
        factor = 1 + 0.1 * torch.log1p(torch.floor(position_ids / 100))
        return super().forward(hidden_states * factor[..., None], *args, position_ids=position_ids, **kwargs)


@pytest.mark.parametrize("kind", [Louder, Sharper])
def test_a_layer_that_computes_more_than_its_structure_shows_stays_as_it_is(
    kernels: Kernels, kind: type[LlamaDecoderLayer]
) -> None:
    model = build("llama")
    model.model.layers[1].__class__ = kind
    rewrite = rewritten(model, kernels)
    assert [type(layer) for layer in model.model.layers] == [FusedLayer, kind]
    assert rewrite.reports["fused_layers"].num_replaced == 1
    rewrite.compare(1e-5)


def test_layers_that_follow_each_other_run_as_one_call(kernels: Kernels) -> None:
    model = build("llama")
    rewrite = rewritten(model, kernels)
    assert [type(layer) for layer in model.model.layers] == [FusedLayer]
    assert model.model.layers[0].num_layers == 2
    rewrite.compare(1e-5)


class Indexing(LlamaModel):
    """Knows how many layers there should be."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        assert len(self.layers) == self.config.num_hidden_layers
        return super().forward(*args, **kwargs)


class Halving(LlamaModel):
    """Does something of its own between its layers."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        x = self.embed_tokens(input_ids)
        position_ids = torch.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
        angles = self.rotary_emb(x, position_ids)
        hidden = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)[None, None]
        given = {"position_embeddings": angles, "position_ids": position_ids, "attention_mask": hidden}
        if "paged" in kwargs:
            given["paged"] = kwargs["paged"]
        for layer in self.layers:
            x = layer(x / 2, **given)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x))


def test_layers_are_not_joined_over_what_a_model_does_between_them(kernels: Kernels) -> None:
    model = build("llama")
    model.model.__class__ = Halving
    rewrite = rewritten(model, kernels)
    assert rewrite.reports["fused_layers"].num_replaced == 2
    assert rewrite.count(PassThroughLayer) == 0
    rewrite.compare(1e-5)


def test_a_model_that_counts_its_layers_keeps_their_number(kernels: Kernels) -> None:
    model = build("llama")
    model.model.__class__ = Indexing
    rewrite = rewritten(model, kernels)
    assert [type(layer) for layer in model.model.layers] == [FusedLayer, PassThroughLayer]
    rewrite.compare(1e-5)


def test_parts_whose_sizes_do_not_belong_together_are_never_run(kernels: Kernels) -> None:
    """Kernels read as far as they are told: a guess must not make them read beyond a tensor."""
    model = build("llama")
    layer = model.model.layers[0]
    layer.self_attn.q_norm = nn.RMSNorm(7, eps=1e-6)
    layer.self_attn.k_norm = nn.RMSNorm(7, eps=1e-6)
    rewrite = rewritten(model, kernels)
    assert rewrite.reports["fused_layers"].num_replaced == 1
    rewrite.compare(1e-5)


def test_int8_logits_are_near_and_not_the_same(kernels: Kernels) -> None:
    rewrite = rewritten(build("llama"), kernels, quantize=True)
    assert rewrite.reports["fused_layers"].num_replaced == 2
    rewrite.compare(0.1)


def test_original_weights_are_let_go(kernels: Kernels) -> None:
    model = build("llama")
    layer = model.model.layers[0]
    watched = [weakref.ref(module) for module in (layer, layer.self_attn.q_proj, layer.mlp, model.lm_head)]
    weights = [weakref.ref(parameter) for parameter in layer.parameters()]
    del layer
    rewrite = rewritten(model, kernels)
    gc.collect()
    assert [reference() for reference in watched + weights] == [None] * (len(watched) + len(weights))
    assert [name for name, _ in rewrite.module.named_parameters()] == ["model.embed_tokens.weight"]


def test_packed_weights_count_as_weights_of_the_model(tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path)
    plain = sum(parameter.numel() * 4 for parameter in model.parameters())
    spec = load(tmp_path, None, EngineConfig(skip_tokenizer_init=True)).runner.spec
    assert 0.95 * plain <= spec.weight_bytes <= 1.2 * plain  # norms are within what they come before


def test_a_borrowed_module_keeps_its_layers() -> None:
    model = build("llama")
    before = [type(module) for module in model.modules()]
    load(model, None, EngineConfig(skip_tokenizer_init=True))
    assert [type(module) for module in model.modules()] == before


def test_a_refusal_for_quantization_says_that_it_is_about_quantization(kernels: Kernels) -> None:
    """It said that the model could not run in the paged engine and was to be served with another backend."""
    rewrite = rewritten(build("llama"), kernels, quantize=True)
    far = replace(rewrite.probed, reference=-rewrite.own_logits)
    with pytest.raises(
        ConfigurationError, match=r"loses too much to quantization='int8'.* leave out quantization='int8'"
    ):
        compare(rewrite.module, far, rewrite.paging, quantized=["quantization='int8'"])
    compare(rewrite.module, rewrite.probed, rewrite.paging, quantized=["quantization='int8'"])
