"""Request bodies: read within a limit, parsed strictly, validated against a pydantic model.

Every fault is an `HttpError`: 413 for a long body, with or without a content-length, 408 for a slow one, 415 for a
compressed one, and 400 for anything that is not valid JSON of the right types. NaN, lone surrogates, deep nesting, tens
of thousands of lists and numbers of thousands of digits are invalid.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, TypeVar

from pydantic import BaseModel, FailFast, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from penstock.errors import shown
from penstock.serving.errors import CLIENT_CLOSED, HttpError, invalid
from penstock.serving.field_names import note_body

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")
MAX_CONTAINERS = 25_000  # objects and lists of a body; the longest chats that are allowed have half as many
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL)
BODY_TIMEOUT_S = 60.0  # clients that send slowly would otherwise occupy the open requests of all


class _FailFast(FailFast):
    """Hashable, as `|` needs it."""

    __hash__ = object.__hash__


Listed = Annotated[list[T], _FailFast()]  # one fault is enough: a list of faults could be as long as the body


class RequestModel(BaseModel):
    """Base of all request bodies: no conversion between types; unknown fields are ignored."""

    model_config = {"strict": True, "extra": "ignore", "protected_namespaces": ()}


async def read_model(request: Request, model: type[M], max_bytes: int, default: bytes = b"") -> M:
    """The body as an instance of the model. `default` stands for an empty body."""
    values = parse(await read_body(request, max_bytes) or default)
    try:
        body = model.model_validate(values)
    except ValidationError as error:
        raise _refusal(error, values) from None
    note_body(request.scope, body)
    return body


async def read_body(request: Request, max_bytes: int, timeout_s: float = BODY_TIMEOUT_S) -> bytes:
    """The whole body."""
    too_large = HttpError(413, f"the body has more than {max_bytes} bytes, this server's limit", code="body_too_large")
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() not in ("", "identity"):
        text = f"bodies with content-encoding {encoding[:40]!r} are not read: send the body uncompressed"
        raise HttpError(415, text, code="unsupported_encoding")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 18 or int(length) > max_bytes):
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError:
        raise HttpError(408, f"the body did not arrive within {timeout_s:g} seconds", code="body_timeout") from None
    except ClientDisconnect:
        raise HttpError(CLIENT_CLOSED, "the client left inside its body") from None
    return bytes(body)


def parse(body: bytes) -> object:
    """The JSON value of a body."""
    _check_containers(body)
    try:
        return from_json(body, allow_inf_nan=False, cache_strings="none")  # a cache of a million keys is slow
    except ValueError as error:
        raise invalid(f"the body is not valid JSON: {error}", code="invalid_json") from None


def _brief(value: object) -> str:
    """A value for an error message; of a large one, what it is."""
    if isinstance(value, dict | list) and len(value) > 8:
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)} items"
    return shown(value[:200] if isinstance(value, str) else value)[:200]


def _check_containers(body: bytes) -> None:
    """Refuse more objects and lists than a request needs: it takes a second to build a megabyte of them."""
    if body.count(b"{") + body.count(b"[") > MAX_CONTAINERS:
        bare = _STRING.sub(b"", body)
        count = bare.count(b"{") + bare.count(b"[")
        if count > MAX_CONTAINERS:
            text = f"the body has {count} objects and lists: at most {MAX_CONTAINERS} are read"
            raise invalid(text, code="body_too_complex")


def _refusal(error: ValidationError, body: object) -> HttpError:
    """The first fault of a body, preferring the one that lies deepest, which is what the sender meant."""
    details = max(error.errors(include_url=False), key=lambda fault: len(fault["loc"]))
    param = ".".join(_place(details["loc"], body, is_missing=details["type"] == "missing"))
    value = _brief(details.get("input"))
    if not param:
        return invalid(f"the body must be a JSON object, got {value}")
    if details["type"] == "missing":
        return invalid(f"{param} is missing", param)
    if details["type"] == "too_short" and not details.get("input"):
        return invalid(f"{param} is empty: pass at least one", param)
    return invalid(f"{param}: {details['msg']}, got {value}", param)


def _place(location: Sequence[int | str], body: object, *, is_missing: bool) -> Iterator[str]:
    """Pydantic's location without what is in no body: the alternatives of unions, and marks of keys."""
    value = body
    for number, name in enumerate(location):
        if isinstance(value, dict) and name in value:
            value = value[name]
        elif isinstance(value, list) and isinstance(name, int):
            value = value[name] if name < len(value) else None
        elif not (is_missing and number == len(location) - 1):
            continue
        yield str(name)
