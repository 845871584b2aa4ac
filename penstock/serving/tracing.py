"""OpenTelemetry traces: one span per HTTP request, with the semantic conventions of HTTP and of generative AI.

Where spans go is decided by whoever configures OpenTelemetry: the program, or `opentelemetry-instrument penstock serve
--tracing`. Never holds text of a request. Imports opentelemetry only if tracing is on; called by the gate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import cast

from starlette.datastructures import Headers

from penstock import __version__
from penstock.errors import ConfigurationError

Value = str | int | float | list[str]
# By the end of the route's path.
_OPERATIONS = {
    "/chat/completions": "chat",
    "/messages": "chat",
    "/responses": "chat",
    "/completions": "text_completion",
    "/generate": "text_completion",
    "/embeddings": "embeddings",
}
# Facts of a call, and the attributes under which a span has them. The last name is vLLM's.
_ATTRIBUTES = {
    "model": "gen_ai.request.model",
    "response_id": "gen_ai.response.id",
    "finish_reasons": "gen_ai.response.finish_reasons",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "error": "error.type",
    "first_token_s": "gen_ai.latency.time_to_first_token",
}


@dataclass(slots=True)
class Outcome:
    """What the gate knows at the end of a request."""

    route: str = "unknown"
    status: int = 0
    facts: Mapping[str, object] = field(default_factory=dict)


class Tracing:
    """Raises `ConfigurationError` if it is `enabled` and opentelemetry is not installed."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        try:
            if enabled:
                import_module("opentelemetry.trace")
        except ImportError:
            text = "tracing needs OpenTelemetry: pip install 'penstock[otel]', or leave tracing out"
            raise ConfigurationError(text) from None

    @contextmanager
    def request(self, method: str, headers: Headers) -> Iterator[Outcome]:
        """A span around a request, which is current inside the block; the caller completes the outcome before its end.

        Its parent is the current span, which a program has that mounts the app, or the one that `traceparent` names.
        """
        outcome = Outcome()
        if not self.enabled:
            yield outcome
            return
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind, StatusCode, get_current_span, get_tracer

        has_parent = get_current_span().get_span_context().is_valid
        tracer, parent = get_tracer("penstock", __version__), None if has_parent else extract(dict(headers))
        # An exception's message may quote the request, so it is not recorded.
        with tracer.start_as_current_span(
            method, parent, SpanKind.SERVER, record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                yield outcome
            except Exception:
                span.set_status(StatusCode.ERROR)
                raise
            finally:
                span.update_name(f"{method} {outcome.route}")
                for name, value in _attributes(method, outcome).items():
                    span.set_attribute(name, value)
                if outcome.status >= 500:
                    span.set_status(StatusCode.ERROR)


def _attributes(method: str, outcome: Outcome) -> dict[str, Value]:
    route, facts = outcome.route, outcome.facts
    values = {attribute: cast(Value, facts[name]) for name, attribute in _ATTRIBUTES.items() if name in facts}
    values |= {"http.request.method": method, "http.route": route, "http.response.status_code": outcome.status}
    operation = next((name for end, name in _OPERATIONS.items() if route.endswith(end)), None)
    if operation is not None:
        values |= {"gen_ai.operation.name": operation, "gen_ai.provider.name": "penstock"}
    if outcome.status >= 500:
        values.setdefault("error.type", str(outcome.status))
    return values
