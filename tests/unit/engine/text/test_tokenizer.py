"""Copies of a tokenizer give the same results as the original, and its changes do not affect them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from penstock.demo import MODEL_DIR
from penstock.engine.text.tokenizer import copy_tokenizer
from tests.tokenizers_for_tests import TEXT, byte_fallback, byte_level, in_context


def with_added_tokens() -> Any:
    """Added words and special tokens alternately, with various settings; some are in the vocabulary already."""
    tokenizer = byte_level()
    tokenizer.add_tokens(["<tool>", AddedToken("lake", single_word=True)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<a>", "<b>"]})
    tokenizer.add_tokens([AddedToken("<c>", lstrip=True, normalized=False)])
    return tokenizer


def truncating() -> Any:
    """A tokenizer whose Rust part truncates and pads."""
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.enable_truncation(40, stride=2)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    return tokenizer


KINDS: dict[str, Callable[[], Any]] = {
    "byte level": byte_level,
    "byte fallback": byte_fallback,
    "unknown class": lambda: in_context(byte_fallback()),
    "added tokens": with_added_tokens,
    "truncating": truncating,
    "demo": lambda: AutoTokenizer.from_pretrained(MODEL_DIR),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_a_copy_is_the_same_tokenizer(make: Callable[[], Any]) -> None:
    tokenizer = make()
    twin = copy_tokenizer(tokenizer)
    text = f"{TEXT} <tool><a> lake <b>  <c>"
    ids = tokenizer.backend_tokenizer.encode(text).ids
    assert type(twin) is type(tokenizer)
    assert twin.backend_tokenizer is not tokenizer.backend_tokenizer
    assert twin.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert twin.backend_tokenizer.encode(text).ids == ids
    assert twin.decode(ids) == tokenizer.decode(ids)
    assert twin.get_added_vocab() == tokenizer.get_added_vocab()


def test_no_change_of_the_original_reaches_a_copy() -> None:
    tokenizer = byte_level()
    twin, before = copy_tokenizer(tokenizer), tokenizer("The lake")["input_ids"]
    tokenizer.add_tokens(["The lake"])
    tokenizer.backend_tokenizer.pre_tokenizer.add_prefix_space = True
    tokenizer.backend_tokenizer.enable_truncation(1)
    assert tokenizer("The lake")["input_ids"] != before
    assert twin("The lake")["input_ids"] == before
    assert len(twin) == len(tokenizer) - 1


def test_a_tokenizer_of_another_kind_is_copied_as_an_object() -> None:
    class Letters:
        def __init__(self) -> None:
            self.table = {"a": 1}

    letters = Letters()
    twin = copy_tokenizer(letters)
    letters.table["b"] = 2
    assert twin.table == {"a": 1}
    assert copy_tokenizer(None) is None
