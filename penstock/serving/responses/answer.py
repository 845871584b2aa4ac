"""`ResponseAnswer`: the response object of `/v1/responses`, at once or as a stream of numbered events."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from penstock.outputs import CompletionOutput, Delta
from penstock.serving.chat_task import REGULAR_ENDS, ChatTask, OutputReader
from penstock.serving.errors import Failure
from penstock.serving.generation import Usage
from penstock.serving.responses.logprobs import ContentLogprobs
from penstock.serving.responses.output import Event, OutputItems
from penstock.serving.responses.request import ResponsesRequest
from penstock.serving.sse import named_frame
from penstock.tools import ContentDelta, ReasoningDelta

_ERROR_CODES = {429: "rate_limit_exceeded", 400: "invalid_prompt"}


@dataclass(slots=True)
class ResponseAnswer:
    """Builds one response. `status` is that of the whole; `sequence_number` counts the events."""

    body: ResponsesRequest
    task: ChatTask
    id: str
    model: str
    created_at: int = field(default_factory=lambda: int(time.time()))
    status: str = "in_progress"
    error: Event | None = None
    usage: Usage | None = None
    items: OutputItems = field(default_factory=OutputItems)
    sequence_number: int = 0
    logprobs: ContentLogprobs | None = None

    def __post_init__(self) -> None:
        if self.body.has_logprobs:
            reasoning = self.task.reasoning
            self.logprobs = ContentLogprobs(self.body.top_logprobs or 0, reasoning.end if reasoning else None)

    def read(self, delta: Delta | CompletionOutput, reader: OutputReader) -> list[Event]:
        """Add what a delta, or the whole completion, says; returns the events that tell of it."""
        pieces = reader.read(delta) if isinstance(delta, Delta) else reader.read_whole(delta)
        logprobs = self.logprobs
        if logprobs is not None:
            logprobs.add(delta.token_ids, delta.logprobs or ())
        events: list[Event] = []
        for piece in pieces:
            if logprobs is not None:
                logprobs.begin(isinstance(piece, ReasoningDelta))
            entries = logprobs.take() if logprobs is not None and isinstance(piece, ContentDelta) else ()
            events += self.items.add(piece, entries)
        if delta.finish_reason in REGULAR_ENDS:
            events += self.finish(delta.finish_reason)
        return events

    def finish(self, finish_reason: str | None) -> list[Event]:
        """End the output. Called by `read` with the last delta."""
        self.status = "incomplete" if finish_reason == "length" else "completed"
        return self.items.finish(self.status, self.logprobs.take() if self.logprobs is not None else ())

    def fail(self, failure: Failure) -> list[Event]:
        """End the response with an error; the events tell of it."""
        self.status = "cancelled" if failure.code == "request_aborted" else "failed"
        self.error = {"code": _ERROR_CODES.get(failure.status, "server_error"), "message": failure.message}
        error: Event = {"type": "error", "code": failure.code, "message": failure.message, "param": failure.param}
        return [*self.items.close("incomplete"), error, self.event("response.failed")]

    def event(self, kind: str) -> Event:
        """An event with the response as it is now."""
        return {"type": kind, "response": self.value()}

    def frame(self, event: Event) -> bytes:
        """An event with the next number."""
        number = self.sequence_number
        self.sequence_number += 1
        return named_frame(str(event["type"]), {**event, "sequence_number": number})

    def value(self) -> Event:
        """The response as it is now."""
        has_output = self.status != "in_progress"
        details = {"reason": "max_output_tokens"} if self.status == "incomplete" else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created_at,
            "completed_at": int(time.time()) if self.status == "completed" else None,
            "status": self.status,
            "error": self.error,
            "incomplete_details": details,
            "output": self.items.value() if has_output else [],
            "usage": None if self.usage is None else usage_json(self.usage),
            **self._request(),
        }

    def _request(self) -> Mapping[str, object]:
        """What the client asked for, defaults included."""
        body, params, reasoning = self.body, self.task.params, self.body.reasoning
        return {
            "model": self.model,
            "instructions": body.instructions,
            "previous_response_id": body.previous_response_id,
            "reasoning": {
                "effort": reasoning.effort if reasoning else None,
                "summary": reasoning.summary if reasoning else None,
            },
            "text": {"format": _format(body), **_verbosity(body)},
            "tools": [_tool(tool) for tool in body.tools or ()],
            "tool_choice": body.tool_choice or "auto",
            "parallel_tool_calls": self.body.parallel_tool_calls is not False,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "top_logprobs": body.top_logprobs or 0,
            "truncation": body.truncation or "disabled",
            "store": body.store is not False,
            "background": False,
            "service_tier": "default",
            "metadata": body.metadata or {},
            "user": body.user,
            "safety_identifier": body.safety_identifier,
            "prompt_cache_key": body.prompt_cache_key,
        }


def usage_json(usage: Usage) -> dict[str, object]:
    """Counts of tokens."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _format(body: ResponsesRequest) -> Mapping[str, object]:
    form = None if body.text is None else body.text.format
    if form is None:
        return {"type": "text"}
    value = form.model_dump(by_alias=True, exclude_none=True)
    return {"name": "answer", **value} if form.type == "json_schema" else {"type": form.type}


def _verbosity(body: ResponsesRequest) -> Mapping[str, object]:
    return {"verbosity": body.text.verbosity} if body.text is not None and body.text.verbosity else {}


def _tool(tool: Mapping[str, object]) -> dict[str, object]:
    """A tool with the fields that clients require of it."""
    return {"description": None, "parameters": None, "strict": False, **tool}
