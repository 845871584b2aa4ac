"""What a batch takes: by hand, and beside what real models and real caches hold."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from penstock.errors import ConfigurationError
from penstock.models.baseline import SHAPES
from penstock.models.storage import LayerShape
from penstock.models.torch_attention import TorchBackend
from penstock.scheduling.estimator import MemoryEstimator, dtype_name
from tests.tiny_models import ARCHITECTURES

GIB = 1 << 30


def config_of(kind: str, sizes: dict[str, Any]) -> Any:
    """A transformers config."""
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **sizes)


def measured_weights(config: Any) -> int:
    """Bytes of the parameters of a model of this config, in float32; nothing is allocated for them."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def test_cache_is_two_numbers_per_layer_head_and_place() -> None:
    estimator = MemoryEstimator(4096, 32, 32)
    assert estimator.cache_bytes(1, 2048) == 2 * 32 * 32 * 128 * 2 * 2048 == GIB
    assert estimator.cache_bytes(3, 10, "float32") == 3 * 10 * 2 * 32 * 32 * 128 * 4


def test_grouped_heads_and_their_size_count() -> None:
    """004-83: neither did before; 8 of 64 heads of keys and values are an eighth of the cache."""
    whole, grouped = MemoryEstimator(8192, 80, 64), MemoryEstimator(8192, 80, 64, num_kv_heads=8)
    assert whole.cache_bytes(1, 100) == 8 * grouped.cache_bytes(1, 100)
    assert MemoryEstimator(1024, 28, 16, head_dim=128).cache_bytes(1, 1) == 28 * 16 * 128 * 2 * 2


def test_int8_cache_has_scales() -> None:
    estimator = MemoryEstimator(1024, 28, 16, num_kv_heads=8, head_dim=128, cache_dtype="int8")
    assert estimator.cache_bytes(1, 1) == 28 * 8 * (128 + 128 + 8)


def test_activations_are_those_of_one_step() -> None:
    estimator = MemoryEstimator(8, 3, 2, intermediate_size=32, vocab_size=50, dtype="float32", max_step_tokens=10)
    widest = 2 * 8 + 2 * 32
    assert estimator.activation_bytes(2, 4) == 8 * widest * 4 + 2 * 50 * 4
    assert estimator.activation_bytes(2, 400) == 10 * widest * 4 + 2 * 50 * 4, "longer prompts come in chunks"
    assert estimator.activation_bytes(20, 400) == 20 * widest * 4 + 20 * 50 * 4, "every row has a token"


def test_a_larger_batch_takes_more() -> None:
    """004-84."""
    estimator = MemoryEstimator(model_hidden_size=768, num_layers=12, num_heads=12)
    assert estimator.estimate_batch_memory(batch_size=4, sequence_length=512) > 0
    assert 1.9 < estimator.estimate_batch_memory(8, 512) / estimator.estimate_batch_memory(4, 512) < 2.1
    assert estimator.estimate_batch_memory(4, 512, torch.float32) > 1.9 * estimator.estimate_batch_memory(4, 512)


def test_a_seven_billion_model_takes_what_it_takes() -> None:
    """004-83: one sequence of 2,048 tokens was said to take 2,841 MB and 32 of them 90 GB."""
    estimator = MemoryEstimator(model_hidden_size=4096, num_layers=32, num_heads=32)
    assert 1.0 < estimator.estimate_batch_memory(1, 2048) / GIB < 1.05
    assert 32.0 < estimator.estimate_batch_memory(32, 2048) / GIB < 32.1


def test_the_best_batch_is_the_largest_that_fits() -> None:
    estimator = MemoryEstimator(64, 2, 4, vocab_size=100, weight_bytes=1000)
    limit = estimator.estimate_total_memory(5, 30)
    assert limit == 1000 + estimator.estimate_batch_memory(5, 30)
    assert estimator.find_optimal_batch_size([30, 10] * 8, limit, 32) == 5
    assert estimator.find_optimal_batch_size([30, 10] * 8, limit - 1, 32) == 4
    assert estimator.find_optimal_batch_size([30, 10] * 8, limit, 3) == 3
    assert estimator.find_optimal_batch_size([30, 10], limit, 32) == 2


def test_where_not_even_one_fits_the_best_batch_is_none() -> None:
    """004-84: at least 1 was the answer to everything."""
    estimator = MemoryEstimator(64, 2, 4)
    assert estimator.find_optimal_batch_size([30], estimator.estimate_batch_memory(1, 30) - 1, 32) == 0
    assert estimator.find_optimal_batch_size([], GIB, 32) == 0


def test_wrong_sizes_say_so() -> None:
    with pytest.raises(ConfigurationError, match="num_layers must be a positive integer, got 0"):
        MemoryEstimator(64, 0, 4)
    with pytest.raises(ConfigurationError, match="dtype 'float17' is unknown"):
        MemoryEstimator(dtype="float17")
    with pytest.raises(ConfigurationError, match="object has no num_attention_heads"):
        MemoryEstimator.from_config(object())
    assert dtype_name(torch.bfloat16) == "bfloat16"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_are_those_of_the_model(name: str) -> None:
    """Within 3 % of a tiny model, of which norms and biases are a larger part than of any real one."""
    config = config_of(name, ARCHITECTURES[name])
    estimator = MemoryEstimator.from_config(config, dtype=torch.float32)
    assert estimator.weight_bytes == pytest.approx(measured_weights(config), rel=0.03)


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_of_real_shapes_are_exact_but_for_norms(shape: str) -> None:
    config = config_of(*SHAPES[shape])
    estimator = MemoryEstimator.from_config(config, dtype="float32")
    assert estimator.weight_bytes == pytest.approx(measured_weights(config), rel=0.001)


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({}, 3 * (192 + 768 + 16) + 8 + 800),
        ({"tie_word_embeddings": True}, 3 * (192 + 768 + 16) + 8 + 400),
        ({"max_position_embeddings": 10}, 3 * (192 + 768 + 16) + 8 + 800),
        ({"model_type": "gpt2", "max_position_embeddings": 10}, 3 * (192 + 512 + 16) + 8 + 800 + 80),
        ({"model_type": "gpt2"}, 3 * (192 + 512 + 16) + 8 + 800),
        ({"moe_intermediate_size": 16}, 3 * (192 + 768 + 16) + 8 + 800),
        ({"num_experts": 4, "moe_intermediate_size": 16}, 3 * (192 + 4 * 384 + 32 + 16) + 8 + 800),
        ({"num_local_experts": 4}, 3 * (192 + 4 * 768 + 32 + 16) + 8 + 800),
    ],
    ids=str,
)
def test_weights_by_hand(options: dict[str, Any], numbers: int) -> None:
    """Layers of attention 8 x (16 + 8), a gated MLP 3 x 8 x 32 and two norms; a norm; 50 x 8 embeddings, twice."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = SimpleNamespace(**{**sizes, "intermediate_size": 32, "vocab_size": 50, "model_type": "llama", **options})
    assert MemoryEstimator.from_config(config, dtype="float32").weight_bytes == 4 * numbers


def test_cache_is_what_the_engines_storage_holds() -> None:
    kind, sizes = SHAPES["qwen3-0.6b"]
    estimator = MemoryEstimator.from_config(config_of(kind, sizes), dtype=torch.bfloat16)
    paging = TorchBackend(torch.device("cpu"))
    shapes = [LayerShape(8, 128, 128, torch.bfloat16)] * sizes["num_hidden_layers"]
    storage: Any = paging.storage(shapes, num_blocks=8, block_size=16)
    held = sum(tensor.numel() * tensor.element_size() for tensor in (*storage.keys, *storage.values))
    assert estimator.cache_bytes(2, 64) == held == paging.bytes_per_token(shapes) * 128
