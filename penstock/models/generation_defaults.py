"""The parameters that a model's generation config sets for requests without parameters, and the tokens that end a text.

Translates every field of transformers' `GenerationConfig` into our names, and lists those that have no effect here.
Never raises, whatever a model's files contain. Called once per load.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Protocol, cast

from torch import nn

from penstock.errors import text_of
from penstock.models.checks import text_config
from penstock.sampling import SamplingParams

log = logging.getLogger("penstock")

# Fields that have the meaning of one of our parameters, and its name.
_RULES = {
    "repetition_penalty": "repetition_penalty",
    "no_repeat_ngram_size": "no_repeat_ngram_size",
    "bad_words_ids": "bad_words",
    "sequence_bias": "sequence_bias",
    "suppress_tokens": "suppress_tokens",
    "begin_suppress_tokens": "begin_suppress_tokens",
    "forced_bos_token_id": "forced_bos_token_id",
    "forced_eos_token_id": "forced_eos_token_id",
    "exponential_decay_length_penalty": "exponential_decay_length_penalty",
    "renormalize_logits": "renormalize_logits",
    "stop_strings": "stop",
    "min_new_tokens": "min_new_tokens",
    "max_new_tokens": "max_tokens",
    "num_return_sequences": "n",
}
_DRAWS = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_BEAMS = ("length_penalty", "early_stopping")
_LENGTHS = ("max_length", "min_length")  # they include the prompt; see `generation.default_params`
_TOP_K = 50  # transformers' default for a model that samples

# Fields that have no effect here: whether a value would have one in transformers, and what to do instead.
_IGNORED: dict[str, tuple[Callable[[object], bool], str]] = {
    "max_time": (bool, "pass deadline= to generate()"),
    "guidance_scale": (lambda value: value not in (None, 1), "there is no classifier-free guidance"),
    "watermarking_config": (bool, "pass a logits processor"),
    "encoder_repetition_penalty": (lambda value: value not in (None, 1), "set repetition_penalty"),
    "encoder_no_repeat_ngram_size": (bool, "set no_repeat_ngram_size"),
    "token_healing": (bool, "end prompts where a token ends"),
    "remove_invalid_values": (bool, "logits that are NaN or infinite end their request"),
    "penalty_alpha": (bool, "there is no contrastive search"),
    "dola_layers": (bool, "there is no DoLa decoding"),
    "num_beam_groups": (lambda value: value not in (None, 1), "beams are searched in one group"),
    "diversity_penalty": (bool, "beams are searched in one group"),
    "constraints": (bool, "pass a logits processor"),
    "force_words_ids": (bool, "pass a logits processor"),
    "cache_implementation": (lambda value: value == "quantized", "set EngineConfig's fields for the K/V cache"),
}
_ANSWER = "penstock-answer"
KNOWN = frozenset({*_RULES, *_DRAWS, *_BEAMS, *_LENGTHS, *_IGNORED, "do_sample", "num_beams", "eos_token_id"})

Fields = Mapping[str, object]  # of a generation config, which may contain anything


class _ChatTokenizer(Protocol):
    """A tokenizer of transformers with a chat template."""

    added_tokens_decoder: Mapping[int, object]

    def apply_chat_template(self, conversation: list[dict[str, str]], *, tokenize: bool) -> object: ...


def generation_defaults(
    module: nn.Module, vocab_size: int, eos_token_ids: frozenset[int], *, has_text: bool
) -> tuple[dict[str, Any], list[str]]:
    """The parameters that the model's generation config sets, in our names; and what has no effect, in words.

    `max_length` and `min_length` keep their names, since they depend on the prompt. `has_text`: there is a tokenizer.
    """
    config: object = getattr(module, "generation_config", None)
    if config is None:
        return {}, []
    fields = {name: getattr(config, name, None) for name in KNOWN}
    ignored = [f"{name} ({remedy})" for name, (acts, remedy) in _IGNORED.items() if acts(fields[name])]
    if fields["stop_strings"] and not has_text:
        fields["stop_strings"] = None
        ignored.append("stop_strings (they need a tokenizer)")
    defaults: dict[str, Any] = {}
    for name, value in _effective_fields(fields, ignored).items():
        if value is not None and (usable := _usable(name, value, vocab_size, ignored)) is not None:
            defaults[_RULES.get(name, name)] = usable
    if "bad_words" in defaults:  # as in transformers, EOS is not a bad word
        words = [word for word in defaults["bad_words"] if len(word) > 1 or word[0] not in eos_token_ids]
        defaults["bad_words"] = words
    num_beams = _num_beams(fields)
    if num_beams > 1 and fields["do_sample"] is not True:
        defaults |= {"use_beam_search": True, "best_of": num_beams, "n": min(defaults.get("n", 1), num_beams)}
    return defaults, ignored


def _effective_fields(fields: Fields, ignored: list[str]) -> dict[str, object]:
    """The fields that matter to the kind of generation that the config selects."""
    effective = {name: fields[name] for name in (*_RULES, *_LENGTHS)}
    num_beams = _num_beams(fields)
    if fields["do_sample"] is True:
        effective |= {name: fields[name] for name in _DRAWS}
        effective["top_k"] = _TOP_K if fields["top_k"] is None else fields["top_k"]
        if num_beams > 1:
            ignored.append("num_beams (with do_sample=True, tokens are drawn without beams)")
    else:
        effective["temperature"] = 0.0
        effective |= {name: fields[name] for name in _BEAMS if num_beams > 1}
    return effective


def _num_beams(fields: Fields) -> int:
    return fields["num_beams"] if isinstance(fields["num_beams"], int) else 1


def _usable(name: str, value: object, vocab_size: int, ignored: list[str]) -> object:
    """A field's value as a request may have it, without ids outside the vocabulary; None where nothing is left."""
    parameter = _RULES.get(name, name)
    try:
        if name in _LENGTHS:
            return SamplingParams(max_tokens=None, min_tokens=cast(int, value)).min_tokens or None
        if name.endswith("suppress_tokens"):  # Whisper writes [-1] for "none"
            value = [token for token in cast(Iterable[object], value) if token != -1]
        value = getattr(SamplingParams(**{"max_tokens": None, parameter: cast(Any, value)}), parameter)
        usable = _within_vocabulary(parameter, value, vocab_size)
    except Exception as error:  # a file may contain anything
        ignored.append(f"{name} ({text_of(error)})")
        return None
    if usable != value:
        ignored.append(f"{name} (token ids beyond the model's vocabulary of {vocab_size})")
    return usable if usable or not isinstance(usable, Collection) else None


def _within_vocabulary(parameter: str, value: Any, vocab_size: int) -> object:
    """The ids below `vocab_size` of a parameter of any type."""
    match parameter:
        case "suppress_tokens" | "begin_suppress_tokens" | "forced_eos_token_id":
            return tuple(token for token in value if token < vocab_size)
        case "forced_bos_token_id":
            return value if value < vocab_size else None
        case "bad_words":
            return tuple(word for word in value if isinstance(word, str) or max(word) < vocab_size)
        case "sequence_bias":
            return {ids: bias for ids, bias in value.items() if max(ids) < vocab_size}
    return value


def eos_token_ids(module: nn.Module, tokenizer: object) -> frozenset[int]:
    """All ids that end a text: the generation config's, else the model config's; the tokenizer's; and end of turn."""
    model_ids = _eos_of(getattr(module, "generation_config", None)) or _eos_of(text_config(module))
    return model_ids | _eos_of(tokenizer) | end_of_turn(tokenizer)


def _eos_of(owner: object) -> frozenset[int]:
    ids: object = getattr(owner, "eos_token_id", None)
    if isinstance(ids, int):
        return frozenset([ids])
    return frozenset(id for id in cast(Iterable[object], ids or ()) if isinstance(id, int))


def end_of_turn(tokenizer: object) -> frozenset[int]:
    """The special token that the tokenizer's chat template writes after an assistant's message, if any.

    A chat that does not end there continues with the next turn. A template that fails does not keep a model from
    loading.
    """
    if not getattr(tokenizer, "chat_template", None):
        return frozenset()
    messages = [{"role": "user", "content": "penstock-question"}, {"role": "assistant", "content": _ANSWER}]
    try:
        templated = cast(_ChatTokenizer, tokenizer)
        text = str(templated.apply_chat_template(messages, tokenize=False))
        remainder = text.rpartition(_ANSWER)[2].lstrip() if _ANSWER in text else ""
        added = {str(token): id for id, token in templated.added_tokens_decoder.items()}
        ends = [token for token in added if token and remainder.startswith(token)]
        return frozenset([added[max(ends, key=len)]] if ends else ())
    except Exception as error:
        log.debug("the chat template does not show how a turn ends: %s", text_of(error))
        return frozenset()
