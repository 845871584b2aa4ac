"""Parameters without effect are refused or reported; stop strings that are special tokens work by their ids."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from penstock import InferenceEngine, ScriptedModel
from penstock.engine.requests.parameter_checks import SpecialTokens, warn_once_each
from penstock.errors import RequestError
from penstock.generation import GenerationConfig
from penstock.outputs import CompletionOutput
from penstock.sampling import SamplingParams
from tests.tokenizers_for_tests import byte_level

TOKENIZER = byte_level()
END = TOKENIZER.convert_tokens_to_ids("<end>")
A = TOKENIZER.convert_tokens_to_ids("a")


def run(script: list[int], tokenizer: Any = TOKENIZER, **wishes: Any) -> CompletionOutput:
    """The output of a model that repeats `script`."""
    engine = InferenceEngine(ScriptedModel(script, vocab_size=600, eos_token_ids=frozenset({2})), tokenizer)
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 6} | wishes)
    try:
        return engine.generate([A], params).result(30).outputs[0]
    finally:
        engine.stop()


@pytest.mark.parametrize("options", [{}, {"ignore_eos": True}, {"use_beam_search": True, "best_of": 2}])
def test_a_stop_string_that_is_a_skipped_special_token_ends_the_request(options: dict[str, Any]) -> None:
    """Text never shows such a token, so the request ran to its maximum length."""
    output = run([A, END], stop=["<end>"], **options)
    assert (output.finish_reason, output.stop_reason, output.token_ids) == ("stop", "<end>", [A, END])
    assert output.text == "a"


def test_a_special_stop_shows_only_where_stops_are_included() -> None:
    output = run([A, END], stop=["<end>"], include_stop_str_in_output=True)
    assert (output.text, output.stop_reason, output.token_ids) == ("a<end>", "<end>", [A, END])
    shown = run([A, END], stop=["<end>"], skip_special_tokens=False)
    assert (shown.text, shown.stop_reason, shown.token_ids) == ("a", "<end>", [A, END])


def test_eos_that_was_asked_for_by_its_text_is_the_stop_reason() -> None:
    output = run([A, 2], stop=["</s>"])
    assert (output.finish_reason, output.stop_reason, output.text) == ("stop", "</s>", "a")


def test_the_text_of_a_special_token_that_ordinary_tokens_spell_is_found_too() -> None:
    spelled = [TOKENIZER.convert_tokens_to_ids(letter) for letter in "a<end>"]
    output = run(spelled, stop=["<end>"], max_tokens=12)
    assert (output.text, output.stop_reason, len(output.token_ids)) == ("a", "<end>", 6)


def test_an_added_token_that_text_shows_is_a_stop_like_any_other() -> None:
    tool = TOKENIZER.convert_tokens_to_ids("<tool>")
    assert SpecialTokens(TOKENIZER).ids_of(["<tool>", "<end>", "x"]) == {END: "<end>"}
    assert run([A, tool], stop=["<tool>"]).text == "a"


@pytest.mark.parametrize(
    ("wishes", "says"),
    [
        ({"stop": ["a<end>"]}, "'a<end>' cannot match"),
        ({"top_p": 0.5, "top_k": 7}, "top_p and top_k have no effect"),
        ({"length_penalty": 2.0}, "length_penalty has no effect"),
    ],
)
def test_a_parameter_without_effect_is_reported_once(
    wishes: dict[str, Any], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = InferenceEngine(ScriptedModel([A], vocab_size=600, eos_token_ids=frozenset({2})), TOKENIZER)
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 2} | wishes)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            engine.generate([A], params).result(30)
        engine.generate([A], SamplingParams(max_tokens=2, seed=1)).result(30)
        engine.generate([A], GenerationConfig(max_length=2, do_sample=False)).result(30)
    engine.stop()
    assert [record.message.count(says) for record in caplog.records] == [1]


def test_min_tokens_without_any_stop_condition_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    engine = InferenceEngine(ScriptedModel([A], vocab_size=600), TOKENIZER)
    engine.generate([A], SamplingParams(min_tokens=2, max_tokens=2)).result(30)
    engine.stop()
    assert [record.message.count("min_tokens has no effect") for record in caplog.records] == [1]


def test_wishes_for_ids_that_the_model_does_not_have_are_refused() -> None:
    with pytest.raises(RequestError, match="token id 600 in allowed_token_ids is outside"):
        run([A], allowed_token_ids=[A, 600])


@pytest.mark.parametrize(
    "wishes",
    [
        {"stop_token_ids": [A + 1, 600]},
        {"bad_words": [[A, 600]]},
        {"suppress_tokens": [600]},
        {"begin_suppress_tokens": [600]},
    ],
)
def test_stops_and_bans_of_ids_outside_the_vocabulary_are_reported(
    wishes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert run([A], **wishes).finish_reason == "length"
    assert [f"in {next(iter(wishes))} is outside" in record.message for record in caplog.records] == [True]


def test_stop_strings_without_a_tokenizer_are_refused() -> None:
    """They were accepted but never searched for."""
    with pytest.raises(RequestError, match="pass stop_token_ids"):
        run([A], tokenizer=None, stop=["x"])


def test_endlessly_many_things_are_not_remembered() -> None:
    told: list[str] = []
    tell = warn_once_each(told.append)
    for number in range(1000):
        tell(str(number % 500))
    assert told == [str(number) for number in range(100)]
