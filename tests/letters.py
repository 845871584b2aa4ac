"""A tokenizer small enough to know by heart, for tests of text."""

from __future__ import annotations

from typing import Any


class LetterTokenizer:
    """Token 0 is "a", token 1 is "b"; 25 has no text at all. Other `letters` may take their place."""

    def __init__(self, letters: str = "abcdefghijklmnopqrstuvwxyz") -> None:
        self._letters = letters

    def __len__(self) -> int:
        return len(self._letters)

    def convert_ids_to_tokens(self, ids: list[int], **options: Any) -> list[str]:
        return [self._letters[i] for i in ids]

    def decode(self, ids: list[int], **options: Any) -> str:
        if 25 in ids:
            raise ValueError("no text for z")
        return "".join(self.convert_ids_to_tokens(ids))
