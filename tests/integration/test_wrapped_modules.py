"""An engine over a module generates the same tokens whether it was made before or after a training loop touched it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from penstock import InferenceEngine, SamplingParams
from penstock.config import EngineConfig
from penstock.models.loading import load
from tests.drive import greedy_by_transformers
from tests.tiny_models import build

PROMPT = list(range(10, 50))
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def with_replaced_forward(model: Any) -> Any:
    """As trainers do it: a function of the instance that calls the original method of the owner."""
    original = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("num_items_in_batch", None)
        return original(*args, **kwargs)

    model.forward = forward
    return model


def with_hooks(model: Any) -> Any:
    for part in model.modules():
        part.register_forward_hook(lambda module, args, output: None)
        part.register_full_backward_hook(lambda *args: None)
    return model


def with_autocast(model: nn.Module) -> Any:
    """Its forward passes are bfloat16 in the trainer; its weights stay float32."""
    return Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)


def with_new_adapters(model: Any) -> Any:
    """They add nothing until they are trained."""
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=True))


def with_compiled_layers(model: Any) -> Any:
    model.model.layers[1] = torch.compile(model.model.layers[1])
    return model


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile()
    return model


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "replaced forward": with_replaced_forward,
    "hooks": with_hooks,
    "autocast": with_autocast,
    "adapters": with_new_adapters,
    "adapters and autocast": lambda model: with_autocast(with_new_adapters(model)),
    "compiled": torch.compile,
    "compiled in place": compiled_in_place,
    "compiled layers": with_compiled_layers,
    "data parallel": nn.DataParallel,
    "distributed": DistributedDataParallel,
    "compiled and distributed": lambda model: torch.compile(DistributedDataParallel(model)),
}
# What changes the structure of the module, so that packed copies of what it was are refused.
STRUCTURAL = {"adapters", "adapters and autocast"}


def tokens(engine: InferenceEngine) -> list[int]:
    return engine.generate(PROMPT, GREEDY).result(60).outputs[0].token_ids


def engine_of(model: Any, mode: str) -> InferenceEngine:
    return InferenceEngine(
        model, skip_tokenizer_init=True, num_threads=1, batch_timeout_ms=0, weight_mode=mode, enable_kv_cache=False
    )


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("mode", ["shared", "packed"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_tokens_are_the_same_before_and_after_the_module_was_wrapped(name: str, mode: str) -> None:
    """A module whose forward was replaced, or that autocasts, was refused; a compiled one died in a step."""
    model = build("llama")
    expected = greedy_by_transformers(model, PROMPT, 12)
    before = engine_of(model, mode)
    assert tokens(before) == expected
    wrapped = WRAPPERS[name](model)
    after = engine_of(wrapped, mode)
    assert tokens(after) == expected
    if mode == "shared" or name not in STRUCTURAL:
        assert tokens(before) == expected
    for engine in (before, after):
        engine.stop()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("name", ["compiled layers", "compiled and distributed", "adapters"])
def test_packed_copies_of_a_wrapped_module_are_refreshed_by_any_of_its_names(name: str) -> None:
    wrapped = WRAPPERS[name](build("llama"))
    runner = load(wrapped, None, EngineConfig(skip_tokenizer_init=True, weight_mode="packed", num_threads=1)).runner
    names = [name for name, _ in wrapped.named_parameters() if "lora" not in name and "embed_tokens" not in name]
    num_units = runner.refresh_weights(names)
    assert num_units == runner.refresh_weights()
    assert num_units > 0
    runner.close()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("mode", ["shared", "packed"])
@pytest.mark.parametrize("named_by", ["wrapper", "module"])
@pytest.mark.parametrize("name", ["compiled", "compiled layers", "data parallel", "compiled and distributed"])
async def test_an_update_takes_the_names_of_a_wrapper_and_those_of_its_module(
    name: str, named_by: str, mode: str
) -> None:
    """Packed copies of compiled layers kept the old weights, and the state dict of a wrapper was refused."""
    wrapped, other = WRAPPERS[name](build("llama")), build("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    expected = greedy_by_transformers(other, PROMPT, 12)
    source = other.state_dict()
    engine = engine_of(wrapped, mode)
    assert tokens(engine) != expected
    if named_by == "wrapper":
        source = dict(zip(wrapped.state_dict(), source.values(), strict=True))
    await engine.update_weights(source)
    assert tokens(engine) == expected
    engine.stop()
