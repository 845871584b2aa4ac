"""`SpeculativeDecoder` and `ParallelSampler` hand on what they are given; a scripted model repeats 5, 6, 7."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from penstock import ConfigurationError, ParallelSampler, ScriptedModel, SpeculativeDecoder
from penstock.optimizers.levels import warn_of_no_effect


def scripted() -> ScriptedModel:
    return ScriptedModel([5, 6, 7], vocab_size=32, max_length=64)


def test_speculative_generate_returns_prompt_and_output_in_the_type_of_the_prompt() -> None:
    """004-104."""
    decoder = SpeculativeDecoder(scripted())
    assert decoder.get_acceptance_rate() == 0.0
    output = decoder.speculative_generate(torch.tensor([[1, 2], [3, 4]]), max_length=3)
    assert output.tolist() == [[1, 2, 5, 6, 7], [3, 4, 5, 6, 7]]
    assert decoder.speculative_generate([1], max_length=2, temperature=0.5) == [[1, 5, 6]]
    decoder.stop()


def test_speculation_length_is_the_longest_draft() -> None:
    decoder = SpeculativeDecoder(scripted())
    for length in (0, 12):
        assert decoder.speculative_generate([[1]], 9, speculation_length=length) == [[1, *[5, 6, 7] * 3]]
    assert decoder.engine.config.speculation_length == 12
    decoder.stop()


def test_an_acceptance_threshold_is_named_once_and_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """004-104, B4-15: it decided on drafts in place of the model's probabilities."""
    warn_of_no_effect.cache_clear()
    decoder = SpeculativeDecoder(scripted())
    for threshold in (0.8, 0.9, 0.1):
        assert decoder.speculative_generate([[1]], 2, acceptance_threshold=threshold) == [[1, 5, 6]]
    messages = [text for _, _, text in caplog.record_tuples if "acceptance_threshold" in text]
    assert len(messages) == 1
    assert messages[0].startswith("acceptance_threshold has no effect: a threshold would change the output")
    decoder.stop()


def test_a_draft_model_that_cannot_be_saved_is_refused() -> None:
    class Unsaved:
        def save_pretrained(self, folder: str) -> None:
            raise OSError("disk full")

    with pytest.raises(ConfigurationError, match="a draft model cannot be a Linear: pass a folder"):
        SpeculativeDecoder(scripted(), torch.nn.Linear(2, 2))
    with pytest.raises(ConfigurationError, match="the draft model cannot be saved: disk full"):
        SpeculativeDecoder(scripted(), Unsaved())


def script(tokens: Any, sample: int) -> int:
    """The candidates 1, 1, 2 and 3, three tokens each."""
    return [1, 1, 2, 3][sample]


def test_parallel_generate_returns_the_chosen_candidate_and_all() -> None:
    """004-104."""
    sampler = ParallelSampler(ScriptedModel(script, vocab_size=32, max_length=64), num_parallel=4)
    best, candidates = sampler.parallel_generate(torch.tensor([[9]]), max_length=3)
    assert [candidate.tolist() for candidate in candidates] == [[[9, n, n, n]] for n in (1, 1, 2, 3)]
    assert best.tolist() == candidates[0].tolist()
    sampler.stop()


def test_every_prompt_has_its_candidates() -> None:
    sampler = ParallelSampler(scripted(), num_parallel=2)
    best, candidates = sampler.parallel_generate([[8], [9]], max_length=1)
    assert best == [[8, 5], [9, 5]]
    assert candidates == [[[8, 5], [9, 5]]] * 2
    sampler.stop()


@pytest.mark.parametrize(
    ("aggregation", "chosen"),
    [("ensemble", [1, 1]), ("random", [3, 3]), (lambda output: output.token_ids[0] == 2, [2, 2])],
    ids=["ensemble", "random", "function"],
)
def test_aggregation_chooses(aggregation: Any, chosen: list[int]) -> None:
    """004-104: a vote at each position made texts that nobody had sampled."""

    def odd_one_first(tokens: Any, sample: int) -> int:
        return [3, 1, 1, 2][sample]

    sampler = ParallelSampler(ScriptedModel(odd_one_first, vocab_size=32, max_length=64))
    best, candidates = sampler.parallel_generate([[9]], max_length=2, aggregation=aggregation)
    assert best == [[9, *chosen]]
    assert sorted(candidates) == sorted([[[9, n, n]] for n in (1, 1, 2, 3)])
    with pytest.raises(ConfigurationError, match="choose from 'best', 'ensemble', 'random'"):
        sampler.parallel_generate([[9]], aggregation="worst")
    sampler.stop()
