"""`field_of`: the field of a request that gave a parameter to the engine, which error responses name as `param`.

Owns what the APIs call the engine's parameters. Called by `failure_of`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

from pydantic import BaseModel
from starlette.types import Scope

from penstock.sampling import SamplingParams

_BODY = "penstock.body"
_STRUCTURES = ("structured_outputs", "json", "regex", "choice", "grammar", "whitespace_pattern")


def _structured_by(*names: str) -> Mapping[str, Sequence[str]]:
    return dict.fromkeys(_STRUCTURES, names)


# By route and parameter: the fields that may give it, of which the first that a body has counts. Without an entry it
# has the parameter's own name.
_FIELDS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "/v1/chat/completions": {
        **_structured_by("response_format", "structured_outputs", "tools"),
        "prompt": ("messages",),
        "max_tokens": ("max_completion_tokens", "max_tokens"),
        "logprobs": ("top_logprobs", "logprobs"),
        "adapter": ("model",),
    },
    "/v1/completions": {
        **_structured_by("response_format", "structured_outputs"),
        "prompt_logprobs": ("logprobs",),
        "adapter": ("model",),
    },
    "/v1/responses": {
        **_structured_by("text.format", "tools"),
        "prompt": ("input",),
        "max_tokens": ("max_output_tokens",),
        "logprobs": ("top_logprobs", "include"),
        "adapter": ("model",),
    },
    "/v1/responses/input_tokens": {"prompt": ("input",)},
    "/v1/embeddings": {"prompt": ("input",), "adapter": ("model",)},
    "/tokenize": {"prompt": ("messages", "prompt")},
    "/detokenize": {"ids": ("tokens",)},
    "/inference/v1/generate": {
        **{field.name: (f"sampling_params.{field.name}",) for field in fields(SamplingParams)},
        **_structured_by("sampling_params.response_format", "sampling_params.structured_outputs"),
        "prompt": ("token_ids",),
        "adapter": ("model",),
    },
}


def note_body(scope: Scope, body: BaseModel) -> None:
    """Keep the body of a request, in which `field_of` looks."""
    scope[_BODY] = body


def field_of(scope: Scope | None, parameter: str | None) -> str | None:
    """The field of this request's body that gave the parameter; None if it has none, or is not known."""
    body = None if scope is None else scope.get(_BODY)
    if scope is None or body is None or parameter is None:
        return None
    names = _FIELDS.get(getattr(scope.get("route"), "path", ""), {})
    return next((field for field in names.get(parameter, (parameter,)) if _has(body, field)), None)


def _has(body: object, field: str) -> bool:
    """Whether a body has a field; a dot leads into an object."""
    name, _, rest = field.partition(".")
    is_given = isinstance(body, BaseModel) and name in body.model_fields_set
    return is_given and (not rest or _has(getattr(body, name), rest))
