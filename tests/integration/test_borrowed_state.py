"""A borrowed module is served as what it is now: adapters of peft and layers that its owner changes later.

The oracle is the module's own forward pass, over the whole text, after every change and in the middle of requests.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from penstock import ConfigurationError, ExecutionError, InferenceEngine, SamplingParams
from penstock.config import EngineConfig
from penstock.models.borrow import Borrowed
from penstock.models.loading import load
from tests.tiny_models import build

PROMPT = list(range(10, 50))  # whole blocks of it stay cached
TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj"]


def randomize(model: nn.Module) -> None:
    """An adapter that was just made adds nothing."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and not parameter.any():
            parameter.data.normal_(0, 0.3)


def with_adapters(dropout: float = 0.0, rank: int = 4) -> Any:
    """A model with two adapters, the first active, in training mode."""
    config = partial(LoraConfig, r=rank, lora_alpha=8, target_modules=TARGETS, lora_dropout=dropout)
    model = get_peft_model(build("llama"), config())
    model.add_adapter("other", config(lora_alpha=16))
    randomize(model)
    return model.train()


def engine_of(model: nn.Module, **settings: Any) -> InferenceEngine:
    return InferenceEngine(model, skip_tokenizer_init=True, num_threads=1, batch_timeout_ms=0, **settings)


def own_logprobs(model: nn.Module, ids: list[int]) -> torch.Tensor:
    """The module's own log probabilities of the next token, which leave its mode as it was."""
    training = model.training
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = (
            model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float().log_softmax(-1)
        )
    model.train(training)
    return found


def check(engine: InferenceEngine, model: nn.Module) -> None:
    """The engine's next token and its logprob are the module's own."""
    output = engine.generate(PROMPT, SamplingParams(temperature=0, max_tokens=1)).result(30).outputs[0]
    own = own_logprobs(model, PROMPT)
    assert output.token_ids == [int(own.argmax())]
    assert output.token_logprobs == pytest.approx([own.max().item()], abs=1e-4)


def rescale(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "merged_adapters"):
            module.set_scale("default", 3.0)


def add_third(model: Any) -> None:
    model.add_adapter("third", LoraConfig(r=2, target_modules=TARGETS))
    randomize(model)


CHANGES: tuple[Callable[[Any], Any], ...] = (
    lambda model: model.merge_adapter(),
    lambda model: model.unmerge_adapter(),
    lambda model: model.base_model.disable_adapter_layers(),
    lambda model: model.base_model.enable_adapter_layers(),
    lambda model: model.set_adapter("other"),
    lambda model: model.merge_adapter(["other"]),
    lambda model: model.unmerge_adapter(),
    add_third,
    lambda model: model.set_adapter("third"),
    lambda model: model.delete_adapter("other"),
    lambda model: model.set_adapter("default"),
    rescale,
)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_adapters_are_served_as_the_module_has_them_now(dropout: float) -> None:
    """`merge_adapter()` counted the adapter twice; disabling, choosing and scaling one showed nothing at all."""
    model = with_adapters(dropout)
    engine = engine_of(model)
    check(engine, model)
    for change in CHANGES:
        change(model)
        check(engine, model)
    assert model.training
    engine.stop()


def test_a_request_that_runs_goes_on_with_the_adapters_of_now() -> None:
    """Keys and values of the old state must not be read: the text is computed anew after each change."""
    model = with_adapters()
    engine = engine_of(model)
    differences: list[float] = []

    def compare_and_change(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        own = own_logprobs(model, PROMPT + output)
        differences.append((own - logits.log_softmax(-1)).abs().max().item())
        if output and len(output) % 3 == 0:
            CHANGES[len(output) // 3 - 1](model)
        return logits

    tokens = 3 * len(CHANGES) + 3
    watched = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logits_processors=[compare_and_change])
    beside = engine.generate(PROMPT[:9], SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
    engine.generate(PROMPT, watched).result(60)
    assert len(beside.result(60).outputs[0].token_ids) == tokens
    assert len(differences) == tokens
    assert max(differences) < 1e-3
    engine.stop()


class Watched(nn.Module):
    """An activation that calls a function before it computes, in the module and in views of it."""

    call: Callable[[], None] = staticmethod(lambda: None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Watched.call()
        return nn.functional.silu(x)


def test_a_step_during_which_adapters_are_merged_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first layer was computed with the adapter, its second with the adapter twice."""
    model = with_adapters()
    model.base_model.model.model.layers[0].mlp.act_fn = Watched()
    prompts = [PROMPT[:length] for length in (5, 17, 33)]
    greedy = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    calls: list[int] = []

    def change() -> None:
        calls.append(len(calls))
        if len(calls) in (10, 20):
            model.merge_adapter() if len(calls) == 10 else model.unmerge_adapter()

    engine = engine_of(model)
    expected = [engine.generate(ids, greedy).result(30).generated_ids for ids in prompts]
    monkeypatch.setattr(Watched, "call", staticmethod(change))
    handles = [engine.generate(ids, greedy) for ids in prompts]
    assert [handle.result(30).generated_ids for handle in handles] == expected
    assert len(calls) > 20
    engine.stop()


def test_adapters_that_are_merged_and_disabled_are_refused_until_they_are_not() -> None:
    """In its next forward pass such a layer unmerges the weights, those of the owner."""
    model = with_adapters()
    engine = engine_of(model)
    check(engine, model)
    model.merge_adapter()
    model.base_model.disable_adapter_layers()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ExecutionError, match=r"call unmerge_adapter\(\) first"):
        engine.generate(PROMPT, SamplingParams(max_tokens=1)).result(30)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ConfigurationError, match=r"call unmerge_adapter\(\) first"):
        engine_of(model).start()
    model.unmerge_adapter()
    check(engine, model)
    engine.stop()


class Doubling(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


def test_parts_that_change_later_act_as_in_the_module() -> None:
    """They were silently ignored: a view was made once and for all."""
    model: Any = build("llama")
    engine = engine_of(model)
    check(engine, model)
    layers = model.model.layers
    layers[0].mlp = nn.Identity()
    check(engine, model)
    torch.nn.utils.parametrize.register_parametrization(layers[1].self_attn.q_proj, "weight", Doubling())
    check(engine, model)
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    check(engine, model)
    layers[0].self_attn.scaling *= 2
    check(engine, model)
    engine.stop()


def test_a_change_that_cannot_be_served_ends_requests_and_the_way_back_serves_again() -> None:
    model: Any = build("llama")
    engine = engine_of(model)
    check(engine, model)
    attention = model.model.layers[0].self_attn
    model.model.layers[0].self_attn = nn.Identity()
    with pytest.raises(ExecutionError, match="the borrowed module was changed, and cannot be served as it is now"):
        engine.generate(PROMPT, SamplingParams(max_tokens=1)).result(30)
    model.model.layers[0].self_attn = attention
    check(engine, model)
    engine.stop()


def test_training_beside_the_engine_is_no_change() -> None:
    """Modes, gradients, hooks of gradients and checkpointing are the trainer's own affair."""
    model: Any = build("llama")
    borrowed = Borrowed(model)
    model.train()
    model.gradient_checkpointing_enable()
    handle = model.model.layers[0].register_full_backward_hook(lambda *args: None)
    ids = torch.tensor([PROMPT])
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert not borrowed.changed(thorough=True)
    handle.remove()
    model.eval()
    assert not borrowed.changed(thorough=True)


def test_packed_copies_refuse_other_adapters_and_serve_merged_ones() -> None:
    """With packed weights a module with adapters could not be loaded at all."""
    model = with_adapters(rank=16)
    engine = engine_of(model, weight_mode="packed")
    check(engine, model)
    model.merge_adapter()
    check(engine, model)
    model.unmerge_adapter()
    add_third(model)
    check(engine, model)
    with model.disable_adapter(), pytest.raises(ExecutionError, match="set weight_mode='shared'"):
        engine.generate(PROMPT, SamplingParams(max_tokens=1)).result(30)
    check(engine, model)
    engine.stop()


def test_merged_adapters_are_not_packed_a_second_time() -> None:
    """The packed copy of a merged weight would have the adapter in it, and the view adds it."""
    model = with_adapters()
    runner = load(model, None, EngineConfig(skip_tokenizer_init=True, weight_mode="packed")).runner
    model.merge_adapter()
    with pytest.raises(ExecutionError, match=r"were merged or unmerged since it was loaded.*undo that"):
        runner.refresh_weights()
    model.unmerge_adapter()
    add_third(model)
    assert runner.refresh_weights() > 0
    runner.close()


def test_a_module_that_was_moved_is_refused_with_the_remedy() -> None:
    """Requests ended with what failed first in the pass: an assertion about a kernel."""
    model = build("llama")
    engine = engine_of(model, weight_mode="packed")
    check(engine, model)
    model.to(torch.bfloat16)
    with pytest.raises(ExecutionError, match=r"is on cpu in torch\.bfloat16.*move it back, or make a new engine"):
        check(engine, model)
    model.to(torch.float32)
    engine.stop()


def test_a_module_with_fewer_tokens_than_before_is_refused_with_the_remedy() -> None:
    """A request's token that was no more failed its whole batch: an index out of range."""
    model: Any = build("llama")
    engine = engine_of(model)
    check(engine, model)
    model.resize_token_embeddings(60)
    with pytest.raises(ExecutionError, match=r"its vocabulary shrank from \d+ to 60: make a new engine"):
        check(engine, model)
    engine.stop()
