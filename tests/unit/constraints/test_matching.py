"""Grammars over a small byte-level tokenizer: what may follow, what ends an output, and what is refused."""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from penstock import GrammarError, StructuredOutputs
from penstock.constraint import Constraint, MaskRequest
from penstock.constraints.compiler import GrammarCompiler
from tests.tokenizers_for_tests import byte_fallback, byte_level

EOS = 2


@cache
def tokenizer() -> Any:
    return byte_level()


@cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(len(tokenizer()), {EOS})


def start(marker: str | None = None, *, ends_itself: bool = False, **values: Any) -> Constraint:
    return compiler().compile(StructuredOutputs(**values), marker, tokenizer()).start(ends_itself=ends_itself)


def ids(text: str) -> list[int]:
    return list(tokenizer().encode(text, add_special_tokens=False))


def masks(constraint: Constraint, draft: tuple[int, ...] = ()) -> list[set[int]]:
    words = constraint.filler.num_words
    bits = array("i", [0]) * (words * (1 + len(draft)))
    assert not constraint.filler.fill([MaskRequest(constraint, 0, draft)], bits)
    return [
        {32 * word + bit for word in range(words) for bit in range(32) if bits[i * words + word] >> bit & 1}
        for i in range(1 + len(draft))
    ]


def accepts(text: str, **values: Any) -> bool:
    constraint = start(**values)
    try:
        constraint.advance([*ids(text), EOS])
    except GrammarError:
        return False
    return True


@pytest.mark.parametrize(
    ("values", "good", "bad"),
    [
        ({"json": {"type": "integer"}}, ["12", "-3"], ["1.5", '"1"', "", "12 "]),
        ({"json": True}, ["null", '{"a": [1]}'], ["nul", "{"]),
        ({"json_object": True}, ["{}", '{"a": {"b": null}}'], ["[]", "1"]),
        ({"regex": "^[ab]{2}$"}, ["ab", "ba"], ["a", "abc", "xab"]),
        ({"choice": ["yes", 'no "q" \\ \n\x7f é水', "x"]}, ["yes", 'no "q" \\ \n\x7f é水'], ["no", "y", "yesx"]),
        ({"grammar": 'start: "a" b\nb: /[0-9]+/'}, ["a12"], ["a", "12"]),
        ({"grammar": 'root ::= "a" [0-9]+'}, ["a12"], ["a", "12"]),
    ],
)
def test_each_kind_of_constraint_accepts_its_own_texts(values: Any, good: list[str], bad: list[str]) -> None:
    assert [text for text in good if not accepts(text, **values)] == []
    assert [text for text in bad if accepts(text, **values)] == []


def test_white_space_is_as_json_dumps_makes_it_and_bounded() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}}
    for text in ('{"a":[1,2]}', '{"a": [1, 2]}', '{\n  "a": [\n    1,\n    2\n  ]\n}'):
        assert accepts(text, json=schema), text
    for text in ('{"a":  [1]}', '{\n\n"a": [1]}', '{"a": [1]} ', ' {"a": [1]}'):
        assert not accepts(text, json=schema), text
    assert accepts('{"a":   [1]}', json=schema, whitespace_pattern=" {1,3}")
    assert not accepts('{"a":\n[1]}', json=schema, whitespace_pattern=" {1,3}")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json": {"not": {"type": "string"}}}, "not"),
        ({"json": {"if": {"const": 1}, "then": {"type": "integer"}}}, "if"),
        ({"json": {"type": "string", "format": "made-up"}}, "format: made-up"),
        ({"json": {"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}}, "uniqueItems"),
        ({"json": {"oneOf": [{"type": "integer"}, {"minimum": 3}], "x-guidance": {"coerce_one_of": True}}}, "oneOf"),
        ({"json": {"$ref": "#/nowhere"}}, "nowhere"),
        ({"json": {"type": "nothing"}}, "nothing"),
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": "a(?=b)c"}, "look-around"),
        ({"regex": "a{1000000}"}, "10000 characters"),
        ({"grammar": "start: nothing"}, "nothing"),
        ({"grammar": "root ::= ("}, "GBNF"),
        ({"json": {}, "whitespace_pattern": "("}, "unclosed group"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(values: Any, says: str) -> None:
    with pytest.raises(GrammarError, match=says):
        start(**values)


def test_eos_may_follow_only_a_complete_output() -> None:
    constraint = start(regex="[0-9]{2,3}")
    assert EOS not in masks(constraint)[0]
    constraint.advance(ids("12"))
    assert EOS in masks(constraint)[0]
    assert not constraint.is_complete
    constraint.advance(ids("3"))
    assert constraint.is_complete
    assert masks(constraint)[0] == {EOS}


def test_without_eos_the_token_that_completes_the_output_is_the_last() -> None:
    constraint = start(ends_itself=True, regex="[0-9]{2,3}")
    constraint.advance(ids("12"))
    assert EOS not in masks(constraint)[0]
    assert constraint.advance([*ids("3"), *ids("x")]) == len(ids("3"))
    assert constraint.is_complete


def test_a_token_that_may_not_follow_is_an_error() -> None:
    with pytest.raises(GrammarError, match="could not be continued"):
        start(regex="[0-9]+").advance(ids("1x"))
    with pytest.raises(GrammarError, match="EOS came before its end"):
        start(regex="[0-9]{2}").advance([*ids("1"), EOS])


def test_masks_after_drafts_are_those_of_the_advanced_constraint() -> None:
    constraint, advanced = start(regex="[0-9]{2}[a-f]+"), start(regex="[0-9]{2}[a-f]+")
    draft = tuple(ids("12a"))
    expected = [masks(advanced)[0]]
    for token in draft:
        advanced.advance([token])
        expected += masks(advanced)
    assert masks(constraint, draft) == expected
    assert masks(constraint) == expected[:1]


def test_a_draft_is_trimmed_to_what_may_follow() -> None:
    constraint = start(regex="[0-9]{2}[a-f]*")
    assert constraint.trim([*ids("1"), *ids("2"), *ids("x"), *ids("a")]) == (*ids("1"), *ids("2"))
    assert constraint.trim([*ids("1"), *ids("2"), EOS]) == (*ids("1"), *ids("2"))
    assert constraint.trim([]) == ()


def test_text_that_no_choice_is_left_about_is_forced() -> None:
    constraint = start(json={"type": "object", "properties": {"abc": {"type": "integer"}}, "required": ["abc"]})
    constraint.advance(ids('{"'))
    forced = constraint.forced(100)
    assert tokenizer().decode(forced) in 'abc":'
    assert len(forced) > 0
    assert constraint.forced(1) == forced[:1]
    assert constraint.trim(forced) == forced
    constraint.advance(ids('abc": 1'))
    assert constraint.forced(100) == ()


def test_every_mask_holds_exactly_the_tokens_that_advance() -> None:
    rng = random.Random(0)
    values = {"json": {"type": "object", "properties": {"k": {"enum": ["éa", "b"]}, "n": {"type": "number"}}}}
    for _ in range(5):
        path: list[int] = []
        for _ in range(12):
            constraint = start(**values)
            constraint.advance(path)
            legal = masks(constraint)[0]
            for token in range(len(tokenizer())):
                trial = start(**values)
                trial.advance(path)
                try:
                    trial.advance([token])
                except GrammarError:
                    assert token not in legal
                else:
                    assert token in legal
            choices = sorted(legal - {EOS})
            if not choices:
                break
            path.append(rng.choice(choices))


def test_the_grammar_sleeps_until_the_reasoning_ends() -> None:
    constraint = start("</think>", regex="[0-9]{2}")
    assert masks(constraint)[0] >= set(range(len(tokenizer()))) - {EOS}
    assert EOS not in masks(constraint)[0]
    assert constraint.forced(10) == ()
    draft = (*ids("well"), *ids("</think>"), *ids("1"))
    assert constraint.trim(draft) == draft[: len(ids("well")) + len(ids("</think>")) - 1]
    constraint.advance(ids("well 77 </think>"))
    assert not constraint.is_complete
    constraint.advance(ids("12"))
    assert constraint.is_complete


def test_tokens_after_the_marker_belong_to_the_grammar_in_the_same_step() -> None:
    constraint = start("</think>", ends_itself=True, regex="[0-9]{2}")
    tokens = [*ids("a</think>"), *ids("1"), *ids("2"), *ids("3")]
    assert constraint.advance(tokens) == len(tokens) - 1
    with pytest.raises(GrammarError):
        start("</think>", regex="[0-9]{2}").advance([*ids("a</think>"), *ids("x")])


def test_constraints_of_one_grammar_do_not_affect_each_other() -> None:
    first, second = start(regex="ab"), start(regex="ab")
    first.advance(ids("a"))
    assert masks(second)[0] == masks(start(regex="ab"))[0]


def test_a_step_fills_masks_of_all_kinds_at_once() -> None:
    plain, drafted, asleep = start(regex="[0-9]+"), start(regex="[a-z]+"), start("</t>", regex="x")
    draft = (*ids("a"), *ids("b"))
    words = plain.filler.num_words
    bits = array("i", [0]) * (words * 5)
    requests = [MaskRequest(plain, 0), MaskRequest(drafted, 1, draft), MaskRequest(asleep, 4)]
    assert not plain.filler.fill(requests, bits)
    for constraint, first, count in ((plain, 0, 1), (drafted, 1, 3), (asleep, 4, 1)):
        alone = array("i", [0]) * (words * count)
        constraint.filler.fill([MaskRequest(constraint, 0, draft if count == 3 else ())], alone)
        assert bits[first * words : (first + count) * words] == alone


def test_a_failed_constraint_is_reported_and_leaves_the_others_alone() -> None:
    good, bad = start(regex="[0-9]+"), start(regex="[0-9]+")
    with pytest.raises(GrammarError):
        bad.advance(ids("x"))
    bits = array("i", [0]) * (2 * good.filler.num_words)
    errors = good.filler.fill([MaskRequest(bad, 0), MaskRequest(good, 1)], bits)
    assert list(errors) == [0]
    assert bits[good.filler.num_words :].tobytes().strip(b"\0")


def exhaust(constraint: Constraint) -> None:
    """Advance until a limit is reached."""
    bits = array("i", [0]) * constraint.filler.num_words
    for _ in range(400):
        constraint.advance(ids("bc"))
        if error := constraint.filler.fill([MaskRequest(constraint, 0)], bits).get(0):
            raise error


def test_a_grammar_whose_limits_are_used_up_is_compiled_again() -> None:
    """All copies of a grammar share a lexer, which never recovers: every later request failed."""
    structured = StructuredOutputs(regex="(([^a]{1,8}|(?i)h){900}ello)|x")
    grammar = compiler().compile(structured, None, tokenizer())
    assert grammar.is_usable
    with pytest.raises(GrammarError, match="could not be continued"):
        exhaust(grammar.start(ends_itself=False))
    assert not grammar.is_usable
    assert compiler().find(structured, None) is None
    assert compiler().compile(structured, None, tokenizer()).is_usable


def test_a_vocabulary_without_eos_and_of_more_logits_than_tokens_is_usable() -> None:
    model = GrammarCompiler(len(tokenizer()) + 100, frozenset())
    constraint = model.compile(StructuredOutputs(regex="[0-9]{2}"), None, tokenizer()).start(ends_itself=True)
    assert constraint.filler.num_words == -(-(len(tokenizer()) + 100) // 32)
    assert constraint.advance([*ids("1"), *ids("2")]) == 2
    assert constraint.is_complete


def test_a_tokenizer_with_byte_tokens_is_usable() -> None:
    other = byte_fallback()
    constraint = GrammarCompiler(len(other), {EOS}).compile(StructuredOutputs(choice=["水é", "b"]), None, other)
    state = constraint.start(ends_itself=False)
    byte = other.convert_tokens_to_ids("<0xE6>")
    assert byte in masks(state)[0]


@pytest.mark.parametrize("values", [{"json": {"$ref": "#"}}, {"regex": r"[^\s\S]"}, {"grammar": "start: start"}])
def test_a_constraint_that_nothing_satisfies_is_refused_in_plain_words(values: Any) -> None:
    """The message was a name from inside the library."""
    with pytest.raises(GrammarError, match="cannot be enforced: no text satisfies it"):
        start(**values)


def test_an_ambiguous_grammar_reaches_its_limit_before_it_stalls_a_step() -> None:
    constraint = start(grammar="start: s\ns: s s | s s s | s s s s | /[a-z ]/\n")
    bits = array("i", [0]) * constraint.filler.num_words
    tokens = iter(ids("the water falls through the pipe to the turbine " * 8))
    seconds: list[float] = []

    def fails() -> bool:
        begin = time.thread_time()
        try:
            constraint.advance([next(tokens)])
            return bool(constraint.filler.fill([MaskRequest(constraint, 0, ())], bits))
        except GrammarError:
            return True
        finally:
            seconds.append(time.thread_time() - begin)

    while not fails():
        pass
    assert max(seconds) < 0.5


def random_walk(constraint: Constraint, rng: random.Random, length: int) -> Iterator[set[int]]:
    """The masks of a random output."""
    for _ in range(length):
        (mask,) = masks(constraint)
        yield mask
        if not (choices := sorted(mask - {EOS})):
            return
        constraint.advance([rng.choice(choices)])


@pytest.mark.parametrize("ends_itself", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        {"json": {"type": "object", "properties": {"a": {"type": "string", "maxLength": 9}, "b": {"type": "number"}}}},
        {"json": {"type": "array", "items": {"enum": ["x", "yz", 17, None]}, "minItems": 1}},
        {"json_object": True},
        {"regex": "(ab|[b-y]{2,5}é?)*"},
        {"choice": ["one", "two", "three"]},
    ],
)
def test_a_candidate_is_allowed_exactly_where_the_mask_allows_it(values: Any, ends_itself: bool) -> None:
    """All tokens of the vocabulary are tried, special ones, those beyond it and EOS among them.

    Of a complete output a mask has to tell. Ids beyond the vocabulary once made a matcher fail.
    """
    rng = random.Random(0)
    for _ in range(3):
        constraint = start(ends_itself=ends_itself, **values)
        for mask in random_walk(constraint, rng, 12):
            tokens = range(32 * constraint.filler.num_words)
            allowed = {token for token in tokens if constraint.first_allowed([token]) is not None}
            assert allowed == (set() if constraint.is_complete else mask)
            order = rng.sample(tokens, len(tokens))
            expected = next((token for token in order if token in allowed), None)
            assert constraint.first_allowed(order) == expected


def test_candidates_are_preferred_within_strings_until_a_mask_is_due() -> None:
    """A mask renews the fuel of the lexer, so one is due after at most 32 tokens, but not of all rows at once."""
    schema = {"type": "object", "properties": {"text": {"type": "string", "maxLength": 99}}, "required": ["text"]}
    (letter,), counts = ids("k"), list[int]()
    for _ in range(16):
        constraint = start(json=schema)
        masks(constraint)
        assert not constraint.prefers_candidates  # an object begins with one text
        constraint.advance(ids('{"text": "'))
        masks(constraint)
        counts.append(0)
        while constraint.prefers_candidates:
            assert constraint.first_allowed([EOS, letter]) == letter
            constraint.advance([letter])
            counts[-1] += 1
        masks(constraint)
        assert constraint.prefers_candidates
    assert sorted(counts) == list(range(17, 33))


@pytest.mark.parametrize(
    "values",
    [
        {"regex": "[a-z]*"},
        {"grammar": 'start: "a" | start "b"'},
        {"json": {"type": "string", "pattern": "^[a-z]*$"}},
        {"json": {"type": "string", "format": "date"}},
        {"json": {"type": "string"}, "whitespace_pattern": "[ ]?"},
    ],
)
def test_grammars_with_expressions_of_their_own_have_a_mask_for_every_token(values: Any) -> None:
    constraint = start(**values)
    constraint.advance(ids("a") if "json" not in values else ids('"'))
    assert not constraint.prefers_candidates


def test_a_sequence_that_reasons_has_a_mask_for_every_token() -> None:
    assert not start("</think>", json={"type": "string"}).prefers_candidates


@pytest.mark.parametrize("length", [*range(1, 13), 17, 40])
def test_a_mask_within_a_string_of_limited_length_allows_just_the_tokens_that_are_accepted(length: int) -> None:
    constraint = start(json={"type": "string", "maxLength": length})
    constraint.advance(ids('"'))
    for letter in "abcd"[:length]:
        accepted = {token for token in range(len(tokenizer())) if constraint.first_allowed([token]) is not None}
        assert masks(constraint) == [accepted]
        constraint.advance(ids(letter))
