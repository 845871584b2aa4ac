"""What a model's generation config says about requests without parameters, and which tokens end a text.

Owns the translation of every field of transformers' `GenerationConfig` into our names; what cannot act is named in one
warning. Never raises for what a model's files say. Called once per load.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

from penstock.errors import text_of
from penstock.sampling import SamplingParams

log = logging.getLogger("penstock")

# Fields that mean what our parameter means, by its name.
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
_LENGTHS = ("max_length", "min_length")  # the prompt counts; see `generation.default_params`
_TOP_K = 50  # what transformers takes where a model that samples sets none

# Fields that we do not follow: when they would act in transformers, and what to do instead.
_IGNORED: dict[str, tuple[Callable[[Any], bool], str]] = {
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
# Fields that change no token of a decoder-only model here: other memory, speed or return values, padding, encoders.
WITHOUT_MEANING = frozenset({
    "use_cache", "cache_config", "max_cache_len", "low_memory",
    "prefill_chunk_size", "compile_config", "disable_compile", "continuous_batching_config",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "return_dict_in_generate", "transformers_version",
    "pad_token_id", "bos_token_id", "decoder_start_token_id",
    "use_mtp", "speculation_type", "is_assistant", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "prompt_lookup_num_tokens", "max_matching_ngram_size",
    "assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind",
    "assistant_ensemble_weight",
})  # fmt: skip
_ANSWER = "penstock-answer"
KNOWN = frozenset({*_RULES, *_DRAWS, *_BEAMS, *_LENGTHS, *_IGNORED, "do_sample", "num_beams", "eos_token_id"})


def generation_defaults(
    module: nn.Module, vocab_size: int, eos_token_ids: frozenset[int], *, has_text: bool
) -> tuple[dict[str, Any], list[str]]:
    """The parameters that the model's generation config sets, in our names; and what of it cannot act, in words.

    `max_length` and `min_length` keep their names, since they depend on the prompt. `has_text`: there is a tokenizer.
    """
    config: Any = getattr(module, "generation_config", None)
    if config is None:
        return {}, []
    fields = {name: getattr(config, name, None) for name in KNOWN}
    ignored = [f"{name} ({remedy})" for name, (acts, remedy) in _IGNORED.items() if acts(fields[name])]
    if fields["stop_strings"] and not has_text:
        fields["stop_strings"] = None
        ignored.append("stop_strings (they need a tokenizer)")
    found: dict[str, Any] = {}
    for name, value in _acting(fields, ignored).items():
        if value is not None and (kept := _usable(name, value, vocab_size, ignored)) is not None:
            found[_RULES.get(name, name)] = kept
    if "bad_words" in found:  # as transformers does it, EOS is no bad word
        found["bad_words"] = [word for word in found["bad_words"] if len(word) > 1 or word[0] not in eos_token_ids]
    return found | _search(fields, found), ignored


def _acting(fields: Mapping[str, Any], ignored: list[str]) -> dict[str, Any]:
    """The fields that mean something to the kind of generation that the config asks for."""
    acting = {name: fields[name] for name in (*_RULES, *_LENGTHS)}
    if fields["do_sample"] is True:
        acting |= {name: fields[name] for name in _DRAWS}
        acting["top_k"] = _TOP_K if fields["top_k"] is None else fields["top_k"]
        if _width(fields) > 1:
            ignored.append("num_beams (with do_sample=True, tokens are drawn without beams)")
    else:
        acting["temperature"] = 0.0
        acting |= {name: fields[name] for name in _BEAMS if _width(fields) > 1}
    return acting


def _search(fields: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    width = _width(fields)
    if width < 2 or fields["do_sample"] is True:
        return {}
    return {"use_beam_search": True, "best_of": width, "n": min(found.get("n", 1), width)}


def _width(fields: Mapping[str, Any]) -> int:
    return fields["num_beams"] if isinstance(fields["num_beams"], int) else 1


def _usable(name: str, value: Any, size: int, ignored: list[str]) -> Any:
    """A field's value as a request may have it, without ids that the model does not have; None where nothing is."""
    ours = _RULES.get(name, name)
    try:
        if name in _LENGTHS:
            return SamplingParams(max_tokens=None, min_tokens=value).min_tokens or None
        value = getattr(SamplingParams(**{"max_tokens": None, ours: _without_none(name, value)}), ours)
        kept = _known(ours, value, size)
    except Exception as error:  # whatever a file may hold
        ignored.append(f"{name} ({text_of(error)})")
        return None
    if kept != value:
        ignored.append(f"{name} (token ids beyond the model's vocabulary of {size})")
    return kept if kept or not isinstance(kept, Collection) else None


def _without_none(name: str, value: Any) -> Any:
    """Whisper's way to say "no tokens to suppress" is [-1]."""
    return [token for token in value if token != -1] if name.endswith("suppress_tokens") else value


def _known(name: str, value: Any, size: int) -> Any:
    """Only the ids below `size`."""
    match name:
        case "suppress_tokens" | "begin_suppress_tokens" | "forced_eos_token_id":
            return tuple(token for token in value if token < size)
        case "forced_bos_token_id":
            return value if value < size else None
        case "bad_words":
            return tuple(word for word in value if isinstance(word, str) or max(word) < size)
        case "sequence_bias":
            return {ids: bias for ids, bias in value.items() if max(ids) < size}
    return value


def eos_token_ids(module: nn.Module, tokenizer: Any) -> frozenset[int]:
    """All ids that end a text: the generation config's, else the model config's; the tokenizer's; and end of turn."""
    text_config: Any = module.config.get_text_config()  # type: ignore[union-attr, operator]
    model = _eos_of(getattr(module, "generation_config", None)) or _eos_of(text_config)
    return model | _eos_of(tokenizer) | end_of_turn(tokenizer)


def _eos_of(holder: Any) -> frozenset[int]:
    ids: Any = getattr(holder, "eos_token_id", None)
    if isinstance(ids, int):
        return frozenset([ids])
    return frozenset(id for id in ids or () if isinstance(id, int))


def end_of_turn(tokenizer: Any) -> frozenset[int]:
    """The special token that the tokenizer's chat template writes behind an assistant's message, if any.

    A chat that does not end there runs on into the next turn. Whatever goes wrong in a template is no reason not to
    load a model.
    """
    if not getattr(tokenizer, "chat_template", None):
        return frozenset()
    messages = [{"role": "user", "content": "penstock-question"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        after = text.rpartition(_ANSWER)[2].lstrip() if _ANSWER in text else ""
        added = {str(token): id for id, token in tokenizer.added_tokens_decoder.items()}
        ends = [token for token in added if token and after.startswith(token)]
        return frozenset([added[max(ends, key=len)]] if ends else ())
    except Exception as error:
        log.debug("the chat template does not show how a turn ends: %s", text_of(error))
        return frozenset()
