"""What `SGLangEngine` makes of parameters, read by the library that SGLang reads it with."""

from __future__ import annotations

from llguidance import LLMatcher, grammar_from
from llguidance.hf import from_tokenizer

from penstock import SamplingParams, StructuredOutputs
from penstock.backends.sglang_params import sglang_arguments
from tests.tokenizers_for_tests import byte_level


def test_choices_are_a_grammar_of_their_letters() -> None:
    choices = ["a", 'b"\n', "é", "日本", "a/b\\c", "\U0001f600", "\t x", "%ignore"]
    params = SamplingParams(structured_outputs=StructuredOutputs(choice=choices))
    grammar = grammar_from("ebnf", sglang_arguments(params, 0)["ebnf"])
    tokenizer = byte_level()
    library_tokenizer = from_tokenizer(tokenizer)
    for text in choices:
        matcher, ids = LLMatcher(library_tokenizer, grammar), tokenizer.encode(text, add_special_tokens=False)
        assert matcher.try_consume_tokens(ids) == len(ids)
        assert matcher.is_accepting()


def test_seeds_of_samples_fit_into_64_bits_and_differ() -> None:
    for seed in (0, -1, 2**63 - 1):
        seeds = [sglang_arguments(SamplingParams(seed=seed), index)["sampling_seed"] for index in range(100)]
        assert len(set(seeds)) == 100
        assert all(0 <= value < 2**63 for value in seeds)
