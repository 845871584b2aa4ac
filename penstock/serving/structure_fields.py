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


class VllmStructureFields(RequestModel):
    """vLLM's way to say it. Its old names are refused: ignoring them would leave the output unconstrained."""

    structured_outputs: StructuredFields | None = None
    guided_json: object = None
    guided_regex: object = None
    guided_choice: object = None
    guided_grammar: object = None

    def structure_beside(self, other: StructuredOutputs | None, name: str) -> StructuredOutputs | None:
        """What the output must be, or None. `other` is what the API's own field `name` says; not both at once.

        Raises `HttpError`, `RequestError`.
        """
        for kind in ("json", "regex", "choice", "grammar"):
            if getattr(self, f"guided_{kind}") is not None:
                text = f'guided_{kind} was replaced: pass structured_outputs={{"{kind}": ...}}'
                raise invalid(text, f"guided_{kind}")
        if self.structured_outputs is None:
            return other
        if other is not None:
            raise invalid(f"pass either {name} or structured_outputs", "structured_outputs")
        return self.structured_outputs.value()


class StructureFields(VllmStructureFields):
    """Both ways of OpenAI's chats and completions; not at once."""

    response_format: ResponseFormat | None = None

    def structure(self) -> StructuredOutputs | None:
        """What the output must be, or None. Raises `HttpError`, `RequestError`."""
        from_format = None if self.response_format is None else self.response_format.value()
        return self.structure_beside(from_format, "response_format")
