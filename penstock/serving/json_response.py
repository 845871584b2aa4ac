"""JSON responses from plain values, serialized by pydantic's core. Infinite numbers are null."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic_core import to_json
from starlette.responses import Response


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response whose body is this value."""
    return Response(to_json(value, inf_nan_mode="null"), status, headers, "application/json")
