"""Masks within strings of limited length are those that llguidance makes by trying all tokens."""

from __future__ import annotations

import random
from array import array
from functools import cache
from typing import Any

import pytest
from llguidance import LLExecutor, LLMatcher

from penstock import StructuredOutputs
from penstock.constraint import MaskRequest
from penstock.constraints.compiler import GrammarCompiler
from penstock.constraints.matching import SLICES, GrammarMatcher
from penstock.constraints.probes import ProbeVocabulary, StringTail, limits_of, words_of
from tests.tokenizers_for_tests import byte_fallback, byte_level

EOS = 2
FREE = {"type": "string", "maxLength": 9}
KEYS = {"type": "object", "properties": {"the": {"const": "turbine"}, "text": {"type": "string", "maxLength": 5}}}
SCHEMAS = [
    FREE,
    {"type": "array", "items": {"type": "string", "minLength": 3, "maxLength": 6}},
    {"anyOf": [{"type": "string", "maxLength": 4}, {"enum": ["the lake", "the evening", 'the "end"', "вода в реке"]}]},
    {**KEYS, "additionalProperties": {"type": "string", "maxLength": 7}},
    {**KEYS, "additionalProperties": False},
]


@cache
def tokenizer(kind: str) -> Any:
    return {"byte_level": byte_level, "byte_fallback": byte_fallback}[kind]()


@cache
def compiler(kind: str) -> GrammarCompiler:
    return GrammarCompiler(len(tokenizer(kind)), {EOS})


def start(schema: Any, kind: str = "byte_level") -> GrammarMatcher:
    constraint = compiler(kind).compile(StructuredOutputs(json=schema), None, tokenizer(kind)).start(ends_itself=False)
    assert isinstance(constraint, GrammarMatcher)
    return constraint


def start_without_probes(schema: Any, kind: str = "byte_level") -> GrammarMatcher:
    constraint = start(schema, kind)
    constraint.tail = None
    return constraint


def mask_of(constraint: GrammarMatcher) -> set[int]:
    bits = array("i", [0]) * constraint.filler.num_words
    assert not constraint.filler.fill([MaskRequest(constraint, 0)], bits)
    return {token for token in range(32 * len(bits)) if bits[token >> 5] >> (token & 31) & 1}


def ids(text: str) -> list[int]:
    """A token for each character or byte."""
    vocabulary = start(FREE).filler
    place = {word: token for token, word in reversed(list(enumerate(vocabulary.token_bytes)))}
    return [place[bytes([byte])] for byte in text.encode()]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("schema", SCHEMAS, ids=str)
def test_every_mask_of_a_random_output_is_that_of_all_tokens(schema: Any, kind: str) -> None:
    num_probed = 0
    for seed in range(6):
        rng, constraint, twin = random.Random(seed), start(schema, kind), start_without_probes(schema, kind)
        for _ in range(40):
            num_probed += constraint.takes_probes()
            mask = mask_of(constraint)
            assert mask == mask_of(twin)
            if not (choices := sorted(mask - {EOS})):
                break
            tokens = [rng.choice(choices)]
            constraint.advance(tokens)
            twin.advance(tokens)
    assert num_probed


@pytest.mark.parametrize(
    ("schema", "text", "is_probed"),
    [
        (FREE, '"', False),  # the probes are of no use before the first character
        (FREE, '"a', True),
        (FREE, '"1234567', True),
        (FREE, '"123456789', False),  # nothing but the quote may follow
        (FREE, '"a\\"b', False),  # a text of the schema may be spelled with escapes
        (FREE, '"вода', True),
        (SCHEMAS[2], '"th', False),  # "the lake" may follow, which is longer than the limit
        (SCHEMAS[2], '"ti', True),
        (SCHEMAS[2], '"вод', False),
        (SCHEMAS[3], '{"th', False),
        (SCHEMAS[3], '{"tha": "abc', True),
        (SCHEMAS[3], '{"the": "turb', False),
        (SCHEMAS[4], '{"the": "turbine", "text": "ab', True),
        (
            {"type": "array", "prefixItems": [{"type": "string"}, FREE], "items": False},
            '["' + "k" * 100 + '", "abc',
            True,
        ),
        ({"type": "string", "maxLength": 40}, '"' + "k" * 9, False),  # far from the limit
        ({"type": "string", "maxLength": 40}, '"' + "k" * 36, True),
    ],
)
def test_probes_are_asked_where_the_characters_of_a_string_are_free(schema: Any, text: str, is_probed: bool) -> None:
    constraint, twin = start(schema), start_without_probes(schema)
    for token in ids(text):
        constraint.advance([token])
        twin.advance([token])
    assert constraint.takes_probes() == is_probed
    if is_probed and constraint.tail is not None:
        (mask,) = constraint.filler.probes.fill([constraint.tail], LLExecutor(1))
        assert mask is not None
    assert mask_of(constraint) == mask_of(twin)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string"},
        {"type": "string", "maxLength": 9, "pattern": "^[a-z]*$"},
    ],
    ids=str,
)
def test_schemas_of_other_strings_have_no_probes(schema: Any) -> None:
    assert start(schema).tail is None


def test_a_tail_whose_vocabulary_lacks_the_characters_of_a_token_is_of_no_use() -> None:
    texts = [b"", *(bytes([byte]) for byte in b'"a]['), b"ab"]
    vocabulary = ProbeVocabulary(texts, [0], SLICES)
    grammar = LLMatcher(vocabulary.tokenizer, LLMatcher.grammar_from_json_schema(FREE), log_level=0)
    tails = [StringTail(grammar, vocabulary, [9], []).start() for _ in range(2)]
    for tail, token in zip(tails, (2, 5), strict=True):
        tail.advance([1, token])
    assert [tail.catch_up() for tail in tails] == [True, False]
    assert [tail.catch_up() for tail in tails] == [True, False]


def test_limits_and_words_are_those_of_the_whole_schema() -> None:
    schema = '{"a": {"maxLength": 3.0, "enum": ["x", {"k": "y"}]}, "b": [{"maxLength": 7}], "maxLength": "no"}'
    assert sorted(limits_of(schema)) == [3, 7]
    assert words_of(schema) == (b"", b"a", b"b", b"enum", b"k", b"maxLength", b"no", b"x", b"y")
