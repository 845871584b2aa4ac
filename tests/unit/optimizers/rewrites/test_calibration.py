"""A pass over a text calibrates each linear module with its inputs, and leaves no trace in the model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from penstock.demo import MODEL_DIR
from penstock.kernels.native import Kernels, available
from penstock.kernels.products import Calibration
from penstock.optimizers.rewrites.calibration import calibrated
from penstock.optimizers.rewrites.layer_parts import is_linear
from tests.tiny_models import build
from tests.unit.optimizers.rewrites.rewritten import rewritten

TEXT = (
    "The weather was fine, and the children went down to the lake with their father. They had taken bread and apples "
    "along, and a blanket to sit on. When the sun had gone, they walked home, and their mother asked what they saw."
)
OTHER = "A king had three sons. The eldest was strong and the second was clever, and nobody knew what the youngest was."


@pytest.fixture
def kernels() -> Iterator[Kernels]:
    if not available():
        pytest.skip("no compiler")
    kernels = Kernels(1)
    yield kernels
    kernels.close()


def calibration_of(module: nn.Module) -> Calibration | None:
    return getattr(module, "calibration", None)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_modules_have_a_calibration_inside_the_context_alone(name: str) -> None:
    model = build(name).eval()
    ids = torch.arange(20)[None] % 30
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
        with calibrated(model, lambda: model(input_ids=ids).logits):
            linears = [part for part in model.modules() if is_linear(part)]
            assert linears
            for part in linears:
                calibration = calibration_of(part)
                assert calibration is not None
                assert calibration.directions.isfinite().all()
        assert not any(calibration_of(part) for part in model.modules())
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_modules_with_the_same_input_share_a_calibration_and_the_head_computes_one_token() -> None:
    model, shapes = build("llama").eval(), []

    def run() -> Tensor:
        logits: Tensor = model(input_ids=torch.arange(20)[None] % 30).logits
        shapes.append(logits.shape[:2])
        return logits

    with torch.inference_mode(), calibrated(model, run):
        attention = model.model.layers[0].self_attn
        assert calibration_of(attention.q_proj) is calibration_of(attention.v_proj)
        assert calibration_of(attention.q_proj) is not calibration_of(attention.o_proj)
    assert shapes == [(1, 1)]


def test_inputs_that_are_not_finite_calibrate_nothing() -> None:
    model = build("llama").eval()
    with torch.inference_mode():
        model.model.embed_tokens.weight[3] = torch.nan
        with calibrated(model, lambda: model(input_ids=torch.arange(20)[None] % 30).logits):
            assert not any(calibration_of(part) for part in model.modules())


def test_a_pass_that_fails_leaves_no_hooks() -> None:
    model = build("llama").eval()

    def run() -> Tensor:
        model(input_ids=torch.arange(4)[None])
        raise MemoryError

    with pytest.raises(MemoryError), torch.inference_mode(), calibrated(model, run):
        raise AssertionError("the context must not be entered")
    model(input_ids=torch.arange(4)[None])
    assert not any(calibration_of(part) for part in model.modules())


def test_a_calibrated_model_is_nearer_to_the_original_on_another_text(kernels: Kernels) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    text, other = (torch.tensor(tokenizer.encode(text)) for text in (TEXT, OTHER))
    errors = []
    for text_ids in (None, text):
        model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
        with torch.inference_mode():
            expected = model(input_ids=other[None]).logits[0]
            logits = rewritten(model, kernels, quantize=True, text_ids=text_ids).logits(other)
        errors.append((logits - expected).norm() / expected.norm())
    assert errors[1] < 0.95 * errors[0]
