"""`scripted:FILE`: a model whose replies are listed in a YAML or JSON file.

    replies: [first answer, second answer]      # in order, over and over; or by what the user's message contains:
    # replies: {weather: It rains., "": I do not know.}
    step_s: 0.02                                # optional: seconds per token
    tokenizer: ./my-model                       # optional: whose tokenizer and chat template to use

Called by `serve`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.cli.session import JsonObject
from penstock.config import read_mapping
from penstock.demo import MODEL_DIR
from penstock.errors import ConfigurationError
from penstock.models.scripted_replies import ScriptedReplies

_KEYS = frozenset({"replies", "step_s", "tokenizer", "chat_template", "max_length"})


def scripted_engine_parts(path: str, settings: JsonObject) -> tuple[ScriptedReplies, object]:
    """The model and its tokenizer. Raises `ConfigurationError`."""
    script = read_mapping(path)
    if unknown := set(script) - _KEYS:
        raise ConfigurationError(f"{path} has an unknown key {min(unknown)!r}: it may have {', '.join(sorted(_KEYS))}")
    replies = script.get("replies")
    if not _are_replies(replies):
        raise ConfigurationError(f"{path} needs replies: a list of texts, or a mapping of questions to texts")
    tokenizer = _tokenizer(str(script.get("tokenizer") or settings.pop("tokenizer", None) or MODEL_DIR))
    if script.get("chat_template"):
        tokenizer.chat_template = script["chat_template"]
    return _model(path, replies, tokenizer, script), tokenizer


def _are_replies(value: object) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and all(isinstance(text, str) for pair in value.items() for text in pair)
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _model(path: str, replies: Any, tokenizer: Any, script: Mapping[str, object]) -> ScriptedReplies:
    try:
        return ScriptedReplies(
            replies,
            lambda text: list(tokenizer.encode(text, add_special_tokens=False)),
            lambda ids: str(tokenizer.decode(ids)),
            int(tokenizer.eos_token_id),
            vocab_size=len(tokenizer),
            max_length=int(script.get("max_length", 1 << 16)),  # type: ignore[call-overload]  # refused below
            step_s=float(script.get("step_s", 0.0)),  # type: ignore[arg-type]  # refused below
        )
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{path} has an invalid value: {error}") from None


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot load the tokenizer {name}: {error}") from None
