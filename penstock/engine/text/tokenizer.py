"""The `Tokenizer` protocol, and `copy_tokenizer`, which makes copies for the engine's threads.

The copies share vocabulary and merges, which never change: copying these would hold the interpreter lock, and so block
every event loop of the program, for a tenth of a second per 30,000 entries. Tokenizers of the Rust library are
recognised by their attributes; any other is copied as a Python object. Called while an engine starts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import groupby
from typing import Protocol, TypeVar

T = TypeVar("T")
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


class Tokenizer(Protocol):
    """A tokenizer of `transformers`, or a similar object. Further attributes are used if present."""

    def encode(self, text: str, **options: bool) -> Sequence[int]:
        """The token ids of a text."""
        ...

    def decode(self, token_ids: list[int], **options: bool) -> str:
        """The text of token ids."""
        ...

    def convert_ids_to_tokens(self, ids: list[int], **options: bool) -> Sequence[str | bytes | None]:
        """The vocabulary's entries; None for ids outside it."""
        ...


def copy_tokenizer(tokenizer: T) -> T:
    """A deep copy, unaffected by any change of the original. None gives None."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    clone = _copy_backend(backend)
    return copy.deepcopy(tokenizer, {} if clone is None else {id(backend): clone})


def _copy_backend(backend: object) -> object:
    """A Rust tokenizer over the same model; None for any other object, or if the copy would differ."""
    from tokenizers import Tokenizer

    if type(backend) is not Tokenizer:
        return None
    clone = Tokenizer(backend.model)
    for part in _PARTS:
        if (value := getattr(backend, part)) is not None:
            setattr(clone, part, copy.deepcopy(value))
    added = backend.get_added_tokens_decoder()
    for special, tokens in groupby((added[token_id] for token_id in sorted(added)), key=lambda token: token.special):
        (clone.add_special_tokens if special else clone.add_tokens)(list(tokens))
    if backend.truncation is not None:
        clone.enable_truncation(**backend.truncation)
    if backend.padding is not None:
        clone.enable_padding(**backend.padding)
    clone.encode_special_tokens = backend.encode_special_tokens
    return clone if clone.get_added_tokens_decoder() == added else None
