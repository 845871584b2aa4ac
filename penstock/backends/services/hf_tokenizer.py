"""`hf_tokenizer`: a tokenizer of transformers, with corrections that training code expects."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

from penstock.errors import ConfigurationError, described

# Its config names two tokens that end a turn; training and sampling must agree on this one.
_GEMMA2, _GEMMA2_END, _GEMMA2_END_ID = "gemma-2-2b-it", "<end_of_turn>", 107


class Tokenizer(Protocol):
    """What the clients call of a tokenizer of transformers."""

    pad_token_id: int | None
    eos_token_id: int | None
    all_special_ids: list[int]
    chat_template: str | None

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, with the special tokens of a prompt."""
        ...

    def decode(
        self, ids: Sequence[int], *, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = True
    ) -> str:
        """The text of token ids."""
        ...

    def apply_chat_template(self, messages: Sequence[Mapping[str, object]], **options: object) -> Any:
        """The text of a conversation, or its token ids."""
        ...


def set_pad_token_id(tokenizer: Tokenizer) -> None:
    """Let a tokenizer without a padding token pad with its end token."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id


def hf_tokenizer(
    name_or_path: str, correct_pad_token: bool = True, correct_gemma2: bool = True, **kwargs: object
) -> Tokenizer:
    """Load a tokenizer with `AutoTokenizer`; `kwargs` go to `from_pretrained`.

    `correct_pad_token` pads with the end token where there is no padding token. `correct_gemma2` makes <end_of_turn>
    (107) the end token of gemma-2-2b-it. Raises `ConfigurationError` if there is no tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = cast(Tokenizer, AutoTokenizer.from_pretrained(name_or_path, **kwargs))
    except (OSError, ValueError) as error:
        hint = "set inference_service.tokenizer to the folder or hub id of one"
        raise ConfigurationError(
            f"no tokenizer can be loaded from {name_or_path!r}: {hint} ({described(error)})"
        ) from error
    if correct_pad_token:
        set_pad_token_id(tokenizer)
    if correct_gemma2 and isinstance(name_or_path, str) and _GEMMA2 in name_or_path:
        tokenizer.eos_token, tokenizer.eos_token_id = _GEMMA2_END, _GEMMA2_END_ID  # type: ignore[attr-defined]
    return tokenizer


_tokenizers: dict[str, Tokenizer] = {}
_loading = threading.Lock()


def shared_tokenizer(name_or_path: str) -> Tokenizer:
    """The tokenizer of this name, loaded once for all clients of the process."""
    with _loading:
        if name_or_path not in _tokenizers:
            _tokenizers[name_or_path] = hf_tokenizer(name_or_path)
        return _tokenizers[name_or_path]
