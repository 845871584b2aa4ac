"""What the output must be: `response_format` of OpenAI's APIs and vLLM's `structured_outputs`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from penstock.serving.body import Listed, RequestModel
from penstock.serving.errors import invalid
from penstock.structured_outputs import StructuredOutputs


class StructuredFields(RequestModel):
    """The fields of `StructuredOutputs`: exactly one of the first five."""

    json_schema: dict[str, object] | str | bool | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Listed[str] | None = None
    grammar: str | None = None
    whitespace_pattern: str | None = None

    def value(self) -> StructuredOutputs:
        """The engine's record. Raises `RequestError`."""
        return StructuredOutputs(
            json=self.json_schema,
            json_object=bool(self.json_object),
            regex=self.regex,
            choice=self.choice,
            grammar=self.grammar,
            whitespace_pattern=self.whitespace_pattern,
        )


class NamedSchema(RequestModel):
    """A schema with a name, which only its author needs."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, object] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(RequestModel):
    """Text, any JSON object, or what a schema says."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    def value(self) -> StructuredOutputs | None:
        """The engine's record. Raises `RequestError`."""
        if self.type == "json_object":
            return StructuredOutputs(json_object=True)
        if self.type == "text":
            return None
        if self.json_schema is None or self.json_schema.schema_ is None:
            raise invalid("response_format of type json_schema needs a schema", "response_format.json_schema.schema")
        return StructuredOutputs(json=self.json_schema.schema_)


class StructureFields(RequestModel):
    """Both ways to say it; not at once."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredFields | None = None

    def structure(self) -> StructuredOutputs | None:
        """What the output must be, or None. Raises `HttpError`, `RequestError`."""
        from_format = None if self.response_format is None else self.response_format.value()
        if self.structured_outputs is None:
            return from_format
        if from_format is not None:
            raise invalid("pass either response_format or structured_outputs", "structured_outputs")
        return self.structured_outputs.value()
