"""The adaptive controller: batches that others waited for, by their time and rate."""

from __future__ import annotations

import pytest

from penstock import AdaptiveInferenceController, EngineConfig
from penstock.errors import RequestError


def record(
    controller: AdaptiveInferenceController, rate: float, memory_usage: float = 0.5, latency: float = 1.0
) -> int:
    """Ten batches of the current size; the size that follows."""
    for _ in range(10):
        controller.update_metrics(latency=latency, memory_usage=memory_usage, throughput=rate)
    return controller.adapt_parameters()["batch_size"]


def test_parameters_are_a_batch_size_and_a_draft_length_and_never_a_temperature() -> None:
    """004-103, 004-104, B4-16: the temperature followed the latency."""
    controller = AdaptiveInferenceController()
    assert controller.adapt_parameters() == {"batch_size": 32, "speculation_length": 8} == controller.current_params
    controller.update_metrics(5.0, 0.99, 1.0)
    assert controller.adapt_parameters().keys() == {"batch_size", "speculation_length"}


def test_the_batch_grows_while_it_makes_more_tokens_per_second() -> None:
    """004-104."""
    controller = AdaptiveInferenceController()
    assert record(controller, 100.0) == 64
    assert record(controller, 150.0) == 128
    assert record(controller, 90.0) == 64


def test_settings_that_were_given_are_limits() -> None:
    config = EngineConfig(max_batch_size=32, speculation_length=3)
    controller = AdaptiveInferenceController(config)
    assert record(controller, 100.0) == 32
    assert controller.current_params["speculation_length"] == 3
    assert config.target is None, "the caller's object stays as it was"


def test_the_batch_does_not_grow_while_memory_is_short() -> None:
    controller = AdaptiveInferenceController(EngineConfig(gc_threshold=0.8))
    assert record(controller, 100.0, memory_usage=0.9) == 32
    assert record(controller, 100.0, memory_usage=0.7) == 64


def test_a_batch_that_takes_too_long_shrinks_under_the_latency_target() -> None:
    controller = AdaptiveInferenceController(EngineConfig(target="latency", max_inter_token_ms=50))
    first = record(controller, 100.0, latency=0.01)
    assert first > 4
    assert record(controller, 100.0, latency=0.1) < first


@pytest.mark.parametrize("metrics", [(-1, 0, 1), (1, "much", 1), (1, 0, float("nan"))], ids=str)
def test_metrics_that_are_no_measurements_are_refused(metrics: tuple[float, float, float]) -> None:
    with pytest.raises(RequestError, match="a number >= 0"):
        AdaptiveInferenceController().update_metrics(*metrics)
