"""`StructuredOutputs`: the form that a request's output must have, validated when constructed, then frozen.

Owns the five kinds of constraint, their ranges and their text. Compiles nothing: whether a schema can be enforced is
known when the request is admitted. Constructed by callers as a part of `SamplingParams`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from json import dumps, loads
from typing import Any, Literal

from penstock.errors import GrammarError, RequestError, concerning, described
from penstock.values import flag, items, refused, suggests_keywords, text

Kind = Literal["json", "json_object", "regex", "choice", "grammar"]
KINDS: tuple[Kind, ...] = ("json", "json_object", "regex", "choice", "grammar")
MAX_CHARACTERS = 1 << 20  # of a schema, a regular expression, a grammar, or all choices together
MAX_CHOICES = 10_000


@suggests_keywords
@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputs:
    """What the whole output must be: exactly one of `json`, `json_object`, `regex`, `choice` and `grammar`.

    `json` is a JSON schema: a dict, its JSON text, True (any value) or a pydantic model class; it is kept as JSON text.
    Objects have their properties in the schema's order. `json_object=True` admits any JSON object. `regex` is a regular
    expression that the whole output matches, `choice` a list of strings, `grammar` a context-free grammar in Lark's
    notation (as `llguidance` reads it) or in GBNF. `whitespace_pattern` is a regular expression of the white space
    between the parts of JSON; without it, these are separated as `json.dumps` does, on one line or indented, so that a
    model cannot go on with spaces.

    A constraint that cannot be enforced to the letter is refused when the request is admitted (`GrammarError`, naming
    the keyword). The output is complete only if its finish reason is "stop". Raises `RequestError` for values that are
    no constraint at all, and `GrammarError` for text that is not JSON.
    """

    json: Mapping[str, Any] | str | bool | type | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        _set(self, "json_object", flag("json_object", self.json_object))
        kinds = [
            name for name in KINDS if getattr(self, name) is not None and (name != "json_object" or self.json_object)
        ]
        if len(kinds) != 1:
            received = " and ".join(kinds) or "none of them"
            message = f"StructuredOutputs takes exactly one of {', '.join(KINDS)}, got {received}"
            raise RequestError(message, parameter="structured_outputs")
        if self.json is not None:
            _set(self, "json", _schema_text(self.json))
        if self.choice is not None:
            _set(self, "choice", _choices(self.choice))
        for name in ("regex", "grammar", "whitespace_pattern"):
            if (value := getattr(self, name)) is not None:
                _set(self, name, _bounded(name, value))
        if self.whitespace_pattern is not None and kinds[0] not in ("json", "json_object"):
            raise refused("whitespace_pattern", self.whitespace_pattern, "None with anything but json and json_object")

    @property
    def kind(self) -> Kind:
        """Which of the five it is."""
        return next(name for name in KINDS if getattr(self, name))

    @property
    def source(self) -> str:
        """The schema, expression or grammar; of choices, their JSON list."""
        if self.json_object:
            return '{"type": "object"}'
        value = getattr(self, self.kind)
        return value if isinstance(value, str) else dumps(value)


def _set(structured: StructuredOutputs, name: str, value: object) -> None:
    """Replace a caller's value with its normalized form."""
    object.__setattr__(structured, name, value)


def _bounded(name: str, value: object) -> str:
    """A non-empty string of valid Unicode and limited length."""
    string = text(name, value)
    if not 0 < len(string) <= MAX_CHARACTERS:
        rule = f"a non-empty string of at most {MAX_CHARACTERS} characters"
        raise refused(name, f"{len(string)} characters", rule)
    try:
        string.encode()
    except UnicodeEncodeError as error:
        message = f"{name} has an unpaired surrogate at character {error.start}: remove it"
        raise RequestError(message, parameter=name.rpartition(" ")[2]) from None
    return string


def _choices(value: object) -> tuple[str, ...]:
    choices = tuple(dict.fromkeys(_bounded("each choice", choice) for choice in items("choice", value)))
    if not 0 < len(choices) <= MAX_CHOICES:
        raise refused("choice", f"{len(choices)} choices", f"a list of 1 to {MAX_CHOICES} strings")
    _bounded("choice", "".join(choices))
    return choices


@concerning("json")
def _schema_text(value: object) -> str:
    """The schema as JSON text. Raises `RequestError` for other types, `GrammarError` for what is not JSON."""
    if isinstance(value, type):
        value = _model_schema(value)
    if isinstance(value, str):
        value = _parsed(_bounded("json", value))
    if not isinstance(value, Mapping | bool):
        raise refused("json", value, "a JSON schema: a dict, its JSON text, True, or a pydantic model class")
    if value is False:
        raise GrammarError("the schema false admits no output: pass a schema that some value satisfies")
    try:
        schema = dumps(dict(value) if isinstance(value, Mapping) else value, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise GrammarError(f"json is not a JSON schema: {described(error)}") from None
    return _bounded("json", schema)


def _model_schema(model: type) -> object:
    schema_of = getattr(model, "model_json_schema", None)
    if not callable(schema_of):
        raise refused("json", model, "a pydantic model class, or a JSON schema")
    try:
        return schema_of()
    except BaseException as error:  # the caller's code
        raise GrammarError(f"{model.__name__}.model_json_schema() failed: {described(error)}") from error


def _parsed(schema: str) -> object:
    try:
        return loads(schema, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"json is not JSON: {described(error)}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
