"""Every field of a generation config has an effect or is named, and whatever the files contain, requests run."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GenerationConfig

from penstock.config import EngineConfig
from penstock.generation import default_params
from penstock.models.generation_defaults import KNOWN, end_of_turn, eos_token_ids, generation_defaults
from penstock.models.loading import load
from penstock.sampling import SamplingParams
from tests.tiny_models import VOCAB, build
from tests.tokenizers_for_tests import byte_level

# Fields that change no token of a decoder-only model: memory, speed, return values, padding, encoders.
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


def module_of(**fields: Any) -> Any:
    """A model with nothing but a generation config of these values."""
    return SimpleNamespace(generation_config=SimpleNamespace(**fields))


def translated(**fields: Any) -> tuple[dict[str, Any], list[str]]:
    return generation_defaults(module_of(**fields), 100, frozenset({2}), has_text=True)


def test_every_field_of_transformers_is_known() -> None:
    """A person decides about a field that a new version adds."""
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields - KNOWN - WITHOUT_MEANING == set()
    assert set() == KNOWN & WITHOUT_MEANING


def test_a_plain_generation_config_is_greedy_and_needs_no_warning() -> None:
    assert translated(**vars(GenerationConfig())) == ({"temperature": 0.0}, [])


def test_a_model_that_samples_draws_from_the_50_likeliest_unless_it_says_otherwise() -> None:
    assert translated(do_sample=True) == ({"top_k": 50}, [])
    assert translated(do_sample=True, top_k=0, temperature=0.5) == ({"top_k": 0, "temperature": 0.5}, [])


def test_sampling_fields_of_a_model_that_does_not_sample_do_nothing() -> None:
    assert translated(do_sample=False, top_p=0.5, typical_p=0.2, length_penalty=2.0) == ({"temperature": 0.0}, [])


def test_num_beams_sets_the_width_of_the_search() -> None:
    defaults, ignored = translated(num_beams=3, num_return_sequences=5, length_penalty=0.5, early_stopping="never")
    params = SamplingParams(**defaults)
    assert (params.num_beams, params.n, params.length_penalty, params.early_stopping) == (3, 3, 0.5, "never")
    assert ignored == []
    defaults, ignored = translated(num_beams=3, do_sample=True, num_return_sequences=2)
    assert (SamplingParams(**defaults).num_beams, defaults["n"], len(ignored)) == (0, 2, 1)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_time": 2.0}, "deadline="),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"token_healing": True}, "token_healing"),
        ({"encoder_no_repeat_ngram_size": 3}, "set no_repeat_ngram_size"),
        ({"top_p": 1.5, "do_sample": True}, "top_p"),
        ({"min_new_tokens": "many"}, "min_new_tokens"),
        ({"max_length": -5}, "max_length"),
        ({"num_return_sequences": 0}, "num_return_sequences"),
        ({"suppress_tokens": [5, 100]}, "suppress_tokens"),
        ({"bad_words_ids": [[3, 100]]}, "bad_words_ids"),
        ({"bad_words_ids": 7}, "bad_words_ids"),
        ({"bad_words_ids": [["a"]]}, "bad_words_ids"),
        ({"sequence_bias": [[[1, 100], 2.0]]}, "sequence_bias"),
        ({"sequence_bias": {"1": 2.0}}, "sequence_bias"),
        ({"forced_eos_token_id": 100}, "forced_eos_token_id"),
        ({"exponential_decay_length_penalty": [1]}, "exponential_decay_length_penalty"),
        ({"stop_strings": [""]}, "stop_strings"),
    ],
)
def test_fields_without_effect_are_named_and_break_no_request(fields: dict[str, Any], says: str) -> None:
    defaults, ignored = translated(**fields)
    assert [says in sentence for sentence in ignored] == [True]
    assert default_params(defaults, 5, 3).max_tokens == 5


def test_neutral_values_need_no_warning() -> None:
    fields = {"suppress_tokens": [-1], "guidance_scale": 1.0, "use_cache": False, "cache_implementation": "static"}
    assert translated(**fields, num_beam_groups=1, encoder_repetition_penalty=1.0) == ({"temperature": 0.0}, [])


def test_eos_is_not_a_bad_word() -> None:
    assert translated(bad_words_ids=[[2], [3], [4, 2]])[0]["bad_words"] == [(3,), (4, 2)]


def test_a_stop_string_needs_a_tokenizer() -> None:
    defaults, ignored = generation_defaults(module_of(stop_strings="x"), 100, frozenset(), has_text=False)
    assert ("stop" in defaults, len(ignored)) == (False, 1)


def test_fields_without_effect_are_named_in_one_warning_at_load(caplog: pytest.LogCaptureFixture) -> None:
    model = build("llama")
    model.generation_config.update(max_time=1.0, guidance_scale=3.0, suppress_tokens=[VOCAB])
    with caplog.at_level(logging.WARNING, logger="penstock"):
        load(model, None, EngineConfig(skip_tokenizer_init=True))
    (record,) = [record for record in caplog.records if "generation config" in record.message]
    assert all(name in record.message for name in ("max_time", "guidance_scale", "suppress_tokens"))


def test_lengths_with_the_prompt_become_lengths_of_the_output() -> None:
    defaults, _ = translated(max_length=20, min_length=12)
    params = default_params(defaults, 256, 8)
    assert (params.max_tokens, params.min_new_tokens) == (12, 4)
    assert default_params(defaults, 256, 30).max_tokens == 256, "a length that the prompt uses up limits nothing"
    assert default_params(defaults, 256, 15).min_new_tokens == 0
    assert default_params(defaults, 256).max_tokens == 256


def test_max_new_tokens_overrides_max_length() -> None:
    defaults, _ = translated(max_length=20, min_length=12, max_new_tokens=5, min_new_tokens=2)
    params = default_params(defaults, 256, 8)
    assert (params.max_tokens, params.min_new_tokens) == (5, 2)


def test_a_min_length_above_max_length_breaks_no_request() -> None:
    params = default_params(translated(max_new_tokens=5, min_new_tokens=9)[0], 256, 8)
    assert (params.max_tokens, params.min_new_tokens, params.num_held) == (5, 9, 9)


def eos_of(config: Any, tokenizer: Any = None) -> frozenset[int]:
    text = SimpleNamespace(eos_token_id=7)
    model: Any = SimpleNamespace(generation_config=config, config=SimpleNamespace(get_text_config=lambda: text))
    return eos_token_ids(model, tokenizer)


def test_the_tokenizers_eos_and_the_end_of_turn_end_a_text_too() -> None:
    """A chat continued with the next turn where the generation config names another token."""
    tokenizer = byte_level()
    end = tokenizer.convert_tokens_to_ids("<end>")
    assert eos_of(SimpleNamespace(eos_token_id=5), tokenizer) == {5, 2, end}
    assert eos_of(SimpleNamespace(eos_token_id=[5, 6]), tokenizer) == {5, 6, 2, end}


def test_a_base_model_keeps_its_eos_ids() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = None
    assert eos_of(SimpleNamespace(eos_token_id=2), tokenizer) == {2}
    assert eos_of(SimpleNamespace(eos_token_id=None), None) == {7}
    assert eos_of(None, SimpleNamespace(eos_token_id=None)) == {7}


BEFORE, AFTER = "{% for m in messages %}<|{{ m.role }}|>", "{% endfor %}"


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (BEFORE + "{{ m.content }}<end>\n" + AFTER, {"<end>"}),
        (BEFORE + " {{ m.content }} </s>" + AFTER, {"</s>"}),
        (BEFORE + "<think></think>{{ m.content | upper }}<end>" + AFTER, set()),
        (BEFORE + "{{ m.content }}\n" + AFTER, set()),
        (BEFORE + "{{ m.content }}<|im_end|>" + AFTER, set()),
        (BEFORE + "{{ m.content }}{{ nothing.at.all }}" + AFTER, set()),
        ("{{ raise_exception('no') }}", set()),
        ("{% for", set()),
        ("a chat without messages<end>", set()),
    ],
)
def test_the_end_of_turn_is_what_the_template_writes_after_an_answer(template: str, ends: set[str]) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = template
    assert end_of_turn(tokenizer) == {tokenizer.convert_tokens_to_ids(token) for token in ends}
