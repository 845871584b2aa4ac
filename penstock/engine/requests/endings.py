"""The end of a request as its reader sees it: last delta, latencies, and the error that awaiting raises.

Pure functions of a `Request`; none of them ends it. Called by `OutputProcessor`.
"""

from __future__ import annotations

from penstock.api.transcript import Transcript
from penstock.engine.requests.request import Request
from penstock.errors import (
    DeadlineExceeded,
    EngineClosed,
    PenstockError,
    RequestAborted,
    RequestError,
    described,
    text_of,
)
from penstock.outputs import CompletionOutput, RequestMetrics, RequestOutput
from penstock.sequence import FinishReason


def final_transcript(request: Request, reason: FinishReason) -> Transcript:
    """The last delta of a request without completions."""
    transcript = Transcript(request.id)
    transcript.end("", reason.value)
    return transcript


def metrics_of(request: Request, now: float) -> RequestMetrics:
    """Latencies of a request, in seconds since its arrival."""

    def since(moment: float | None) -> float | None:
        return None if moment is None else moment - request.arrival

    return RequestMetrics(since(request.started), since(request.first_token), now - request.arrival)


def delivery_fault(error: BaseException) -> PenstockError:
    """The error of a request whose output could not be delivered."""
    return error if isinstance(error, PenstockError) else RequestError(f"the output failed: {described(error)}")


def bare_output(request: Request, reason: FinishReason, metrics: RequestMetrics) -> RequestOutput:
    """The output of a request whose completions cannot be assembled."""
    prompt, ids = request.channel.prompt, request.channel.prompt_token_ids
    return RequestOutput(request.id, prompt, ids, [CompletionOutput(finish_reason=reason.value)], metrics=metrics)


def ending_error(
    request: Request, reason: FinishReason, output: RequestOutput | None, error: Exception | None
) -> Exception:
    """The error of a request that ended early, with its partial output; `error` is what ended it, if anything did."""
    if isinstance(error, EngineClosed | RequestAborted):
        error.output = output
    if error is not None:
        return error
    if reason is FinishReason.DEADLINE:
        return DeadlineExceeded(f"request {request.id} passed its deadline", output)
    return RequestAborted(f"request {request.id} was aborted", output)


def closing_error(error: BaseException | None = None, output: RequestOutput | None = None) -> EngineClosed:
    """The error of a request whose engine was stopped, or failed with `error`."""
    text = "the engine was stopped" if error is None else f"the engine failed: {text_of(error)}"
    return EngineClosed(text, output)
