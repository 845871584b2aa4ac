"""The text of a calibration, as far as the tokenizer and the model go along."""

from __future__ import annotations

import pytest
import torch

from penstock.models.calibration import MAX_TOKENS, MIN_TOKENS, calibration_ids

CPU = torch.device("cpu")


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


class Broken:
    """A caller's tokenizer that cannot do it."""

    def encode(self, text: str) -> list[int]:
        raise RuntimeError


def test_the_text_is_cut_to_the_tokens_that_help_and_to_the_longest_sequence() -> None:
    ids = calibration_ids(Bytes(), 10_000, 256, CPU)
    assert ids is not None
    assert (ids.dtype, len(ids)) == (torch.int64, MAX_TOKENS)
    shorter = calibration_ids(Bytes(), 100, 256, CPU)
    assert shorter is not None
    assert torch.equal(shorter, ids[:100])


@pytest.mark.parametrize("tokenizer", [None, object(), Broken()], ids=["none", "without encode", "broken"])
def test_without_a_working_tokenizer_there_is_no_calibration(tokenizer: object) -> None:
    assert calibration_ids(tokenizer, 1000, 256, CPU) is None


def test_tokens_that_the_model_does_not_have_and_short_sequences_give_no_calibration() -> None:
    assert calibration_ids(Bytes(), 1000, 64, CPU) is None
    assert calibration_ids(Bytes(), MIN_TOKENS - 1, 256, CPU) is None
