"""`TokenBound`: how many tokens a text has at least, from its bytes and the longest token, without encoding it.

Exact in one direction: `tokenizer.encode` never returns fewer. Known for byte-level BPE alone (GPT, Llama 3, Qwen,
SmolLM), which drops no text; for other tokenizers the bound is 0. Called by `InputProcessor` for long texts.
"""

from __future__ import annotations

import json
import unicodedata
from typing import Any, cast

from penstock.engine.text.tokenizer import Tokenizer
from penstock.engine.text.tokenizer_pool import is_plain

# A text may have so many times the bytes that it has in composed form.
NFC_FACTOR = 4
_DROPPING = frozenset({"removed", "Removed"})
_KEEPING = frozenset({"ByteLevel", "Split", "Digits", "Punctuation"})
# Bytes that vocabularies may lack: of control characters and of no valid text, which compose with nothing.
_INERT = frozenset({*range(0x20), 0x7F, 0xC0, 0xC1, *range(0xF1, 0x100)})


class TokenBound:
    """The bound for tokenizers that are copies of each other. The first long text examines one of them."""

    def __init__(self) -> None:
        self._facts: tuple[int, bytes, bool] | None = None  # longest token, bytes without tokens, whether it composes

    def at_least(self, tokenizer: Tokenizer | None, text: str) -> int:
        """A lower bound of the number of tokens of a text; 0 where nothing is known. Any thread may call it."""
        if self._facts is None:
            self._facts = _facts(tokenizer)
        longest, missing, composes = self._facts
        if not longest:
            return 0
        num_bytes = len(text.encode(errors="ignore").translate(None, missing))
        if composes and not text.isascii():
            num_bytes //= NFC_FACTOR
        return -(-num_bytes // longest)


def _facts(tokenizer: Tokenizer | None) -> tuple[int, bytes, bool]:
    from tokenizers import models, normalizers

    unknown = 0, b"", False
    if tokenizer is None or not is_plain(tokenizer):
        return unknown
    backend: Any = getattr(tokenizer, "backend_tokenizer")  # noqa: B009 - not every tokenizer has one
    is_composing = isinstance(backend.normalizer, normalizers.NFC)
    if not (backend.normalizer is None or is_composing) or not isinstance(backend.model, models.BPE):
        return unknown
    added = list(backend.get_added_tokens_decoder().values())
    if any(token.lstrip or token.rstrip for token in added) or not _keeps_all_bytes(backend.pre_tokenizer):
        return unknown  # a token that strips takes in any number of spaces
    vocab = backend.get_vocab(with_added_tokens=False)
    missing = bytes(byte for byte, letter in _alphabet().items() if letter not in vocab)
    if not _INERT.issuperset(missing):
        return unknown
    contents = [form for token in added for form in (token.content, unicodedata.normalize("NFC", token.content))]
    longest = max([len(token) for token in vocab] + [len(content.encode()) for content in contents])
    return longest, missing, is_composing


def _keeps_all_bytes(pre_tokenizer: object) -> bool:
    """Whether it maps bytes to letters and drops nothing."""
    if pre_tokenizer is None:
        return False
    state = json.loads(cast(Any, pre_tokenizer).__getstate__())
    steps = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    return steps[-1]["type"] == "ByteLevel" and all(
        step["type"] in _KEEPING and step.get("behavior") not in _DROPPING for step in steps
    )


def _alphabet() -> dict[int, str]:
    """The letter of each byte, as byte-level BPE has them since GPT-2."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + number) for number, byte in enumerate(others)}
