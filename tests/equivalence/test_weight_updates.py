"""An engine over a live module follows every parameter: at once where it shares the weights, after a refresh where it
runs on packed copies.

The oracle is the module's own forward pass. Each parameter is changed alone, so nothing hides behind another one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from penstock import InferenceEngine
from penstock.errors import ConfigurationError
from penstock.kernels.native import available
from penstock.models.borrow import weight_bytes
from penstock.models.executor import Executor
from penstock.sampling import SamplingParams
from tests.drive import Driver, logprobs_by_transformers, sequence
from tests.tiny_models import build

Settings = dict[str, Any]

pytestmark = pytest.mark.skipif(not available(), reason="no compiler")

BF16 = torch.bfloat16
# Norms of every kind, biases, tied heads, transposed and fused matrices, experts, sinks.
NAMES = [
    "llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2",
    "opt", "phi3", "gpt_neox", "olmo2", "mixtral", "gpt_oss",
]  # fmt: skip
TIED = {"tie_word_embeddings": True}
PROMPT = [(7 * i * i + 3 * i) % 150 + 2 for i in range(28)]
SCORE = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
# How far off an engine may be, and which effects are more than rounding, relative to how far log probabilities lie
# apart. In bfloat16, rounding may choose another expert.
TOLERANCE = {torch.float32: 1e-4, BF16: 0.2}
EFFECT = {torch.float32: 1e-5, BF16: 0.03}
PACKED: Settings = {"weight_mode": "packed"}


class Engine:
    """An engine over a live module, without its loop, that computes every prompt anew."""

    def __init__(self, module: nn.Module | str, **settings: Any) -> None:
        self.driver = Driver(module, num_blocks=16, block_size=16, enable_kv_cache=False, num_threads=1, **settings)
        self._next_id = 0

    @property
    def runner(self) -> Executor:
        return self.driver.runner

    def refresh(self, names: list[str] | None = None) -> int:
        return self.runner.refresh_weights(names)

    def logprobs(self) -> Tensor:
        """Log probabilities of the prompt's tokens but the first."""
        self._next_id += 1
        self.driver.run([sequence(self._next_id, PROMPT, SCORE)])
        return torch.tensor([entry.logprob for entry in self.driver.prompt_logprobs[self._next_id]])


def own_logprobs(module: nn.Module) -> Tensor:
    return torch.tensor(logprobs_by_transformers(module, PROMPT[:1], PROMPT[1:]))


def distance(left: Tensor, right: Tensor) -> float:
    """Relative to how far log probabilities lie apart."""
    return ((left - right).norm() / (right - right.mean()).norm()).item()


def perturb(parameter: nn.Parameter) -> None:
    """Change every number, by about as much as it is large."""
    noise = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        parameter.add_((noise - 0.5).to(parameter.dtype) * (parameter.abs().mean() + 0.5))


def perturb_all(module: nn.Module) -> None:
    for parameter in module.parameters():
        perturb(parameter)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_that_changes_in_place_shows(name: str, dtype: torch.dtype) -> None:
    """A bfloat16 model's sinks were converted once, and packed weights were those of the load for ever."""
    module = build(name, **(TIED if name == "llama" else {})).to(dtype)
    engines = [Engine(module, weight_mode=mode) for mode in ("shared", "packed")]
    before, own_before = [engine.logprobs() for engine in engines], own_logprobs(module)
    for parameter_name, parameter in module.named_parameters():
        original = parameter.detach().clone()
        perturb(parameter)
        own = own_logprobs(module)
        effect = distance(own_before, own)
        for engine, earlier in zip(engines, before, strict=True):
            engine.refresh([parameter_name])
            logprobs = engine.logprobs()
            assert distance(logprobs, own) < TOLERANCE[dtype], parameter_name
            if effect > EFFECT[dtype]:
                assert distance(logprobs, earlier) > effect / 5, parameter_name
        parameter.data.copy_(original)
        engines[1].refresh([parameter_name])
    assert all(torch.equal(engine.logprobs(), earlier) for engine, earlier in zip(engines, before, strict=True))


def head_in_float32(module: Any) -> Any:
    """As trainers set it up: float32 weights, and a forward method and a hook of instances that convert."""
    head, dtype = module.lm_head.float(), module.model.norm.weight.dtype
    head.forward = lambda states: nn.functional.linear(states.float(), head.weight)
    module.model.embed_tokens.register_forward_hook(lambda part, args, output: output.to(dtype))
    return module


@pytest.mark.parametrize("mode", ["shared", "packed"])
@pytest.mark.parametrize("tied", [False, True])
def test_t18_a_float32_head_of_a_bfloat16_model_follows_its_weight(tied: bool, mode: str) -> None:
    """A copy of it went stale elsewhere; here such a module was refused, because a view had lost the conversions."""
    module = head_in_float32(build("llama", tie_word_embeddings=tied).to(BF16))
    engine = Engine(module, weight_mode=mode)
    before = engine.logprobs()
    assert distance(before, own_logprobs(module)) < TOLERANCE[BF16] / 10
    perturb(module.lm_head.weight)
    engine.refresh(["model.embed_tokens.weight" if tied else "lm_head.weight"])
    after = engine.logprobs()
    assert distance(after, own_logprobs(module)) < TOLERANCE[BF16] / 10
    assert distance(after, before) > 10 * EFFECT[BF16]


def test_copies_of_a_model_with_a_float32_head_may_all_have_one_dtype() -> None:
    module = head_in_float32(build("llama", tie_word_embeddings=True).to(BF16))
    engine = Engine(module, dtype="float32", **PACKED)
    assert distance(engine.logprobs(), own_logprobs(module)) < TOLERANCE[BF16] / 10


COPIES: dict[str, Settings] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantization": "int8"},
    "int8 computed in bfloat16": {"dtype": "bfloat16", "quantization": "int8"},
}


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("copies", COPIES)
def test_refreshed_copies_of_float32_weights_are_those_of_a_new_engine(copies: str, name: str) -> None:
    module = build(name)
    engine = Engine(module, **PACKED, **COPIES[copies])
    perturb_all(module)
    engine.refresh()
    assert torch.equal(engine.logprobs(), Engine(module, **PACKED, **COPIES[copies]).logprobs())
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())


def test_copies_in_another_dtype_follow_parameter_by_parameter() -> None:
    """Embeddings, which no kernel packs, are copies there, too."""
    module = build("qwen2")
    engine = Engine(module, dtype="bfloat16", **PACKED)
    for name, parameter in module.named_parameters():
        perturb(parameter)
        engine.refresh([name])
    assert torch.equal(engine.logprobs(), Engine(module, dtype="bfloat16", **PACKED).logprobs())


def test_a_dtype_of_its_own_needs_copies() -> None:
    with pytest.raises(ConfigurationError, match=r"dtype='bfloat16' needs copies of the weights.*weight_mode='packed'"):
        Engine(build("llama"), dtype="bfloat16")


def test_packed_copies_are_those_of_the_load_until_they_are_refreshed() -> None:
    module: Any = build("llama")
    engine = Engine(module, **PACKED)
    before = engine.logprobs()
    perturb(module.model.layers[0].mlp.up_proj.weight)
    perturb(module.model.layers[1].self_attn.k_proj.weight)
    assert torch.equal(engine.logprobs(), before)
    assert engine.refresh(["model.layers.1.self_attn.k_proj.weight"]) == 1
    assert distance(engine.logprobs(), before) > 1e-3
    assert distance(engine.logprobs(), own_logprobs(module)) > 1e-3
    assert engine.refresh() > 1
    assert distance(engine.logprobs(), own_logprobs(module)) < 1e-4


def test_one_matrix_of_several_is_packed_without_its_neighbours() -> None:
    """The names say what changed; nothing else is read."""
    module: Any = build("llama")
    engine = Engine(module, quantization="int8", **PACKED)
    before = engine.logprobs()
    gate, up = module.model.layers[0].mlp.gate_proj.weight, module.model.layers[0].mlp.up_proj.weight
    original = gate.detach().clone()
    perturb(gate)
    engine.refresh(["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(engine.logprobs(), before)
    gate.data.copy_(original)
    perturb(up)
    engine.refresh(["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(engine.logprobs(), Engine(module, quantization="int8", **PACKED).logprobs())


@pytest.mark.parametrize("settings", [{}, {"weight_mode": "shared"}, {"quantization": "int8"}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_that_the_engine_loaded_follows_new_tensors(name: str, settings: Settings, tmp_path: Path) -> None:
    module = build(name)
    module.save_pretrained(tmp_path)  # type: ignore[operator]
    file = tmp_path / "model.safetensors"
    stored = file.read_bytes()
    engine = Engine(str(tmp_path), **settings)
    perturb_all(module)
    for parameter_name, parameter in module.named_parameters():
        engine.runner.refresh_weights([parameter_name], {parameter_name: parameter.detach()})
    assert file.read_bytes() == stored
    module.save_pretrained(tmp_path / "new")  # type: ignore[operator]
    assert torch.equal(engine.logprobs(), Engine(str(tmp_path / "new"), **settings).logprobs())


def test_what_is_no_parameter_or_has_another_shape_is_refused_before_anything_is_written() -> None:
    module: Any = build("llama")
    engine = Engine(module, **PACKED)
    before = engine.logprobs()
    perturb_all(module)
    names = ["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(ConfigurationError, match=r"'lm_head.wight' is not a parameter of the model"):
        engine.refresh([*names, "lm_head.wight"])
    module.lm_head.weight = nn.Parameter(torch.zeros(170, 32))
    with pytest.raises(ConfigurationError, match=r"lm_head.weight is .* \(170, 32\) .* was \(160, 32\) on cpu"):
        engine.refresh([*names, "lm_head.weight"])
    module.lm_head.weight = nn.Parameter(torch.zeros(160, 32))
    engine.refresh(["lm_head.weight"])
    assert distance(engine.logprobs(), before) > 0.1


@pytest.mark.parametrize(
    ("settings", "of_live", "of_loaded"),
    [({}, "shared", "packed"), ({"weight_mode": "shared"}, "shared", "shared"), (PACKED, "packed", "packed")],
)
def test_the_mode_of_the_weights_is_a_fact_of_the_loaded_model(
    settings: Settings, of_live: str, of_loaded: str, tmp_path: Path
) -> None:
    module = build("llama")
    module.save_pretrained(tmp_path)  # type: ignore[operator]
    live, loaded = (Engine(model, **settings).runner.spec for model in (module, str(tmp_path)))
    assert [spec.weight_mode for spec in (live, loaded)] == [of_live, of_loaded]
    for spec in (live, loaded):
        assert (spec.packed_bytes > 0.5 * weight_bytes(module)) == (spec.weight_mode == "packed")


def test_without_kernels_weights_are_shared() -> None:
    engine = Engine(build("llama"), disabled_rewrites=("kernels",), **PACKED)
    assert (engine.runner.spec.weight_mode, engine.refresh()) == ("shared", 0)


async def test_statistics_name_the_mode_and_the_packed_bytes() -> None:
    async with InferenceEngine(build("llama"), skip_tokenizer_init=True, weight_mode="packed") as engine:
        stats = engine.get_stats()
    assert stats["weight_mode"] == "packed"
    assert stats["packed_bytes"] > 2 * 4 * 3 * 32 * 64


MIB = 2**20
WIDE: Settings = {"vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1024}
LARGE: dict[str, tuple[str, Settings, Settings]] = {
    "float32": ("llama", WIDE, {}),
    "bfloat16": ("llama", WIDE, {"dtype": "bfloat16"}),
    "int8": ("llama", WIDE, {"quantization": "int8"}),
    "transposed int8": ("gpt2", {"vocab_size": 1000, "n_embd": 1024, "n_head": 8}, {"quantization": "int8"}),
}


def resident(field: str) -> int:
    """Bytes of memory that this process has ("VmRSS") or had at most ("VmHWM")."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


@pytest.mark.parametrize("copies", LARGE)
def test_a_refresh_needs_less_memory_than_the_largest_packed_unit(copies: str) -> None:
    """Their largest unit, the output head or the first matrix of the MLP, has 4 to 16 MiB."""
    peak = Path("/proc/self/clear_refs")
    name, shape, settings = LARGE[copies]
    engine = Engine(build(name, **shape), **PACKED, **settings)
    engine.refresh()  # the pool's threads have their scratch
    try:
        peak.write_text("5")
    except OSError:
        pytest.skip("this system does not reset the peak")
    before = resident("VmRSS")
    assert engine.refresh() > 4
    weights = engine.runner.spec.packed_bytes
    assert resident("VmHWM") - before < 4 * MIB <= weights / 2


@pytest.mark.parametrize("mode", ["shared", "packed"])
def test_ten_training_steps_beside_generation_leave_the_same_weights(mode: str) -> None:
    """Bit for bit those of ten steps without an engine."""
    alone, served = train(build("llama")), build("llama")
    engine = InferenceEngine(served, skip_tokenizer_init=True, num_threads=1, batch_timeout_ms=0, weight_mode=mode)
    engine.start()
    num_tokens = 0

    def generate(step: int) -> None:
        nonlocal num_tokens
        handles.append(engine.generate(PROMPT[step:], SamplingParams(max_tokens=60, ignore_eos=True, seed=step)))
        if step >= 3:  # so that three requests run at any time
            num_tokens += len(handles[step - 3].result(60).outputs[0].token_ids)

    handles: list[Any] = []
    train(served, generate)
    engine.stop()
    assert num_tokens == 7 * 60
    weights, expected = served.state_dict(), alone.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


def train(module: Any, beside: Callable[[int], None] = lambda step: None) -> Any:
    """Ten steps of AdamW, with a call of `beside` before each."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(3)
    module.train()
    for step in range(10):
        beside(step)
        ids = torch.randint(2, 150, (4, 16), generator=generator)
        module(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return module
