"""The draft model's most likely tokens are those of transformers, with the model's own Python and without."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.config import EngineConfig
from penstock.demo import DRAFT_DIR
from penstock.errors import ConfigurationError, ExecutionError
from penstock.kernels.native import available
from penstock.models.draft_runner import DraftRunner
from penstock.models.loading import load_draft
from penstock.models.protocol import ModelSpec
from penstock.sampling import SamplingParams
from penstock.step import Row, StepPlan
from tests.drive import prompts
from tests.tiny_models import VOCAB, build

GREEDY = SamplingParams(temperature=0.0, max_tokens=1)
BLOCKS, SIZE = 64, 4


def runner_of(source: str, vocab_size: int, **settings: Any) -> DraftRunner:
    target = ModelSpec(name="large", vocab_size=vocab_size, max_length=100)
    runner = load_draft(source, target, EngineConfig(dtype="float32", device="cpu", **settings))
    runner.allocate(BLOCKS, SIZE)
    return runner


@pytest.fixture(scope="module")
def demo() -> Iterator[DraftRunner]:
    runner = runner_of(str(DRAFT_DIR), 4096)
    yield runner
    runner.close()


def row_of(number: int, tokens: list[int], start: int = 0, end: int | None = None) -> Row:
    """One of three rows of up to 80 tokens."""
    end = len(tokens) if end is None else end
    blocks = array("i", range(20 * number, 20 * number + 20))
    return Row(number, tokens, start, end, blocks, end == len(tokens), GREEDY, len(tokens))


def by_transformers(model: Any, tokens: list[int]) -> tuple[int, float]:
    with torch.inference_mode():
        best = model(torch.tensor([tokens])).logits[0, -1].softmax(-1).max(-1)
    return int(best.indices), float(best.values)


def check(runner: DraftRunner, model: Any, vocab_size: int) -> None:
    """Complete texts, half of one, and its other half together with single tokens."""
    texts = prompts(3, 70, vocab_size, seed=2)
    assert runner.guess(StepPlan((row_of(2, texts[2], end=30),))) == [None]
    guesses = runner.guess(StepPlan((row_of(0, texts[0]), row_of(1, texts[1]), row_of(2, texts[2], end=30))))
    longer = [[*texts[0], 7], texts[2]]
    guesses += runner.guess(StepPlan((row_of(0, longer[0], len(texts[0])), row_of(2, longer[1], 30))))
    expected = [by_transformers(model, text) for text in (*texts[:2], *longer)]
    assert guesses[2] is None, "nothing is drawn in the middle of a text"
    del guesses[2]
    for guess, (token, probability) in zip(guesses, expected, strict=True):
        assert guess is not None
        assert guess[0] == token
        assert guess[1] == pytest.approx(probability, rel=1e-3)


def test_the_demo_draft_guesses_the_tokens_of_transformers(demo: DraftRunner) -> None:
    from transformers import AutoModelForCausalLM

    assert demo.is_lean == available()
    check(demo, AutoModelForCausalLM.from_pretrained(DRAFT_DIR, dtype=torch.float32), 4096)


@pytest.mark.parametrize(
    ("name", "is_lean"), [("llama", True), ("qwen3", True), ("gemma2", False), ("gemma3_text", False), ("gpt2", False)]
)
def test_a_model_runs_lean_only_if_its_logits_stay_the_same(name: str, is_lean: bool, tmp_path: Path) -> None:
    """Gemma scales its embeddings or rotates by kind of layer; GPT-2 has no rotary positions."""
    model = build(name)
    model.save_pretrained(tmp_path)
    runner = runner_of(str(tmp_path), VOCAB)
    assert runner.is_lean == (is_lean and available())
    check(runner, model, VOCAB)
    runner.close()


def test_without_kernels_a_model_runs_as_it_is(tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path)
    runner = runner_of(str(tmp_path), VOCAB, disabled_rewrites=("kernels",))
    assert not runner.is_lean
    check(runner, model, VOCAB)


def test_a_failing_pass_raises_an_execution_error(demo: DraftRunner) -> None:
    with pytest.raises(ExecutionError, match="forward pass failed"):
        demo.guess(StepPlan((row_of(0, [10**9]),)))
    check_again = demo.guess(StepPlan((row_of(0, [5, 6]),)))
    assert check_again[0] is not None


def test_logits_that_are_not_numbers_give_no_guess(tmp_path: Path) -> None:
    """It counted as the most certain kind of guess."""
    model = build("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[100] = torch.nan
    model.save_pretrained(tmp_path)
    runner = runner_of(str(tmp_path), VOCAB)
    sick, healthy = runner.guess(StepPlan((row_of(0, [5, 100, 7]), row_of(1, [5, 6, 7]))))
    assert sick is None
    assert healthy is not None
    runner.close()


def test_another_vocabulary_is_refused_with_what_to_use() -> None:
    with pytest.raises(ConfigurationError, match="4096 tokens in its vocabulary and large has 160: choose a smaller"):
        runner_of(str(DRAFT_DIR), 160)
