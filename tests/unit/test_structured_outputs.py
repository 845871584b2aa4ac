from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pydantic import BaseModel

from penstock import GrammarError, RequestError, SamplingParams, StructuredOutputs

SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"const": "é"}}}


class Point(BaseModel):
    x: int


class Broken(BaseModel):
    @classmethod
    def model_json_schema(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        raise SystemExit("no schema")


def deep() -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(100_000):
        schema = {"items": schema}
    return schema


def test_a_schema_is_kept_as_json_text_in_its_own_order() -> None:
    text = '{"type": "object", "properties": {"b": {"type": "string"}, "a": {"const": "é"}}}'
    assert StructuredOutputs(json=SCHEMA).source == StructuredOutputs(json=text).source == text
    assert StructuredOutputs(json=SCHEMA) == StructuredOutputs(json=text)
    assert StructuredOutputs(json=Point).source == StructuredOutputs(json=Point.model_json_schema()).source
    assert StructuredOutputs(json=True).source == "true"


def test_a_schema_that_is_changed_later_does_not_change_the_constraint() -> None:
    schema: dict[str, Any] = {"type": "string"}
    structured = StructuredOutputs(json=schema)
    schema["type"] = "integer"
    assert structured.source == '{"type": "string"}'


@pytest.mark.parametrize(
    ("values", "kind", "source"),
    [
        ({"json": {}}, "json", "{}"),
        ({"json_object": True}, "json_object", '{"type": "object"}'),
        ({"json_object": 1}, "json_object", '{"type": "object"}'),
        ({"regex": "[ab]"}, "regex", "[ab]"),
        ({"choice": ["no", "yes", "no"]}, "choice", '["no", "yes"]'),
        ({"grammar": 'start: "a"'}, "grammar", 'start: "a"'),
    ],
)
def test_kind_and_source_name_the_constraint(values: Any, kind: str, source: str) -> None:
    structured = StructuredOutputs(**values)
    assert (structured.kind, structured.source) == (kind, source)
    assert replace(structured) == structured
    assert hash(replace(structured)) == hash(structured)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({}, "exactly one of json, json_object, regex, choice, grammar, got none of them"),
        ({"json_object": False}, "got none of them"),
        ({"json": {}, "regex": "a"}, "got json and regex"),
        ({"json": 5}, "json must be a JSON schema"),
        ({"json": []}, "json must be a JSON schema"),
        ({"json": "[1]"}, "json must be a JSON schema"),
        ({"json": int}, "json must be a pydantic model class"),
        ({"json": "{"}, "json is not JSON"),
        ({"json": '{"minimum": NaN}'}, "NaN is no JSON number"),
        ({"json": {"minimum": float("nan")}}, "json is not a JSON schema"),
        ({"json": {"const": object()}}, "json is not a JSON schema"),
        ({"json": '{"const": "\\ud800"}'}, "json has an unpaired surrogate"),
        ({"json": False}, "the schema false admits no output"),
        ({"json": "false"}, "the schema false admits no output"),
        ({"json": Broken}, r"Broken.model_json_schema\(\) failed: SystemExit: no schema"),
        ({"json": deep()}, "json is not a JSON schema: RecursionError"),
        ({"json": '{"items":' * 100_000}, "json is not JSON: RecursionError"),
        ({"json": {"const": "x" * (1 << 20)}}, "json must be a non-empty string of at most 1048576 characters"),
        ({"json_object": "yes"}, "json_object must be True or False"),
        ({"regex": ""}, "regex must be a non-empty string"),
        ({"regex": b"a"}, "regex must be a string"),
        ({"regex": "\ud800"}, "regex has an unpaired surrogate at character 0"),
        ({"choice": "ab"}, "choice must be a list"),
        ({"choice": []}, "choice must be a list of 1 to 10000 strings"),
        ({"choice": map(str, range(10_001))}, "choice must be a list of 1 to 10000 strings"),
        ({"choice": ["a", ""]}, "each choice must be a non-empty string"),
        ({"choice": ["a", 1]}, "each choice must be a string"),
        ({"grammar": 5}, "grammar must be a string"),
        ({"regex": "a", "whitespace_pattern": " "}, "whitespace_pattern must be None with anything but json"),
        ({"json": {}, "whitespace_pattern": ""}, "whitespace_pattern must be a non-empty string"),
    ],
    ids=lambda value: "",
)
def test_what_is_no_constraint_is_refused_where_it_is_written(values: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        StructuredOutputs(**values)


def test_what_is_no_json_is_a_grammar_error() -> None:
    with pytest.raises(GrammarError):
        StructuredOutputs(json="{")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs must be StructuredOutputs or None"),
        ({"reasoning_end": ""}, "reasoning_end must be None or a non-empty string"),
        ({"reasoning_end": 5}, "reasoning_end must be None or a non-empty string"),
        ({"reasoning_end": "</think>", "detokenize": False}, "reasoning_end must be None when detokenize=False"),
        (
            {"reasoning_end": "x", "use_beam_search": True, "n": 2, "temperature": 0},
            "reasoning_end must be None with use",
        ),
    ],
)
def test_parameters_around_a_constraint_are_checked(values: Any, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        SamplingParams(**values)


def test_a_beam_search_takes_no_constraint() -> None:
    structured = StructuredOutputs(regex="a")
    with pytest.raises(RequestError, match="structured_outputs must be None with use_beam_search"):
        SamplingParams(structured_outputs=structured, use_beam_search=True, n=2, temperature=0)
