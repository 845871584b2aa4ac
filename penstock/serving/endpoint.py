"""What endpoints that generate have in common: read the body, submit, and answer in one of two ways.

An endpoint turns a body into a `Work`, and a `Work` into an answer: `respond` awaits the outputs while it watches for
the client to leave; `stream` sends frames. Both end the engine's requests whatever happens.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from starlette.requests import Request
from starlette.responses import Response

from penstock.api.prompt import Prompt
from penstock.errors import PenstockError, described
from penstock.outputs import RequestOutput
from penstock.sampling import SamplingParams
from penstock.serving.chat_task import ChatTask
from penstock.serving.errors import Failure, failure_of, openai_envelope
from penstock.serving.gate import Call, call_of
from penstock.serving.generation import Generation, Options, submit
from penstock.serving.server import Server
from penstock.serving.sse import COMMENT, DONE, EventStream, cancelled_on_disconnect, frame

FailureFrame = Callable[[Failure], bytes]


def openai_failure_frame(failure: Failure) -> bytes:
    """An error as the last frame of a stream of chats or completions."""
    return frame(openai_envelope(failure))


@dataclass(frozen=True, slots=True)
class Exchange:
    """One HTTP request and the server that answers it. `id` names the engine's request and the answer."""

    server: Server
    request: Request
    call: Call
    id: str

    @classmethod
    def begin(cls, server: Server, request: Request, prefix: str) -> Exchange:
        """An exchange with a new id of this prefix."""
        call, name = call_of(request.scope), f"{prefix}{uuid.uuid4().hex}"
        call.facts["response_id"] = name
        return cls(server, request, call, name)

    def check_model(self, name: str | None) -> str:
        """The name under which to answer. Raises a 404 for an unknown one."""
        self.call.facts["model"] = model = self.server.check_model(name)
        return model

    async def submit(
        self, prompts: Sequence[Prompt], params: SamplingParams, options: Options, suffix: str = ""
    ) -> Generation:
        """Submit the prompts to the model, or the adapter, that was checked; returns once all are accepted.

        Ends them if one is refused, the client leaves, or an administrator aborts them meanwhile.
        """
        name, server = f"{self.id}{suffix}", self.server
        options = replace(options, adapter=server.adapter_of(str(self.call.facts["model"])))
        with ExitStack() as cancels, server.lifecycle.abortable(cancels.close, self.id, self.call.id):
            async with cancelled_on_disconnect(self.request.receive, cancels.close):
                handles = await submit(server.engine, prompts, params, options, name, cancels, server.metrics)
            cancels.pop_all()
        generation = Generation(handles, server.metrics)
        self.call.facts["prompt_tokens"] = generation.usage().prompt_tokens
        return generation

    async def submit_chat(self, task: ChatTask, options: Options) -> Generation:
        """Submit a chat; again without its reasoning if its template turns out to end that by itself."""
        generation = await self.submit([task.prompt], task.params, options)
        if task.params.reasoning_end is not None and task.begins_after_reasoning(generation.handles[0].prompt or ""):
            generation.cancel()
            generation = await self.submit([task.prompt], task.without_reasoning().params, options, "-direct")
        return generation

    async def outputs(self, generation: Generation) -> list[RequestOutput]:
        """The results. Ends the generation if the client leaves, or an administrator aborts it."""
        with self.server.lifecycle.abortable(generation.cancel, self.id, self.call.id):
            async with cancelled_on_disconnect(self.request.receive, generation.cancel):
                outputs = await generation.outputs()
        self.call.facts["completion_tokens"] = sum(len(out.token_ids) for output in outputs for out in output.outputs)
        self._note_ends(generation)
        return outputs

    def stream(
        self,
        generation: Generation,
        frames: AsyncIterator[bytes],
        *,
        failure_frame: FailureFrame = openai_failure_frame,
        done: bytes = DONE,
        ping: bytes = COMMENT,
    ) -> Response:
        """The frames as a response. An error becomes the last frame; otherwise `done` is, if it is not empty."""
        guarded = self._guarded(generation, frames, failure_frame, done)
        interval_s = self.server.settings.ping_interval_s
        return EventStream(guarded, generation.cancel, ping=ping, interval_s=interval_s)

    async def _guarded(
        self,
        generation: Generation,
        frames: AsyncIterator[bytes],
        failure_frame: FailureFrame,
        done: bytes,
    ) -> AsyncGenerator[bytes, None]:
        try:
            with self.server.lifecycle.abortable(generation.cancel, self.id, self.call.id):
                async for data in frames:
                    yield data
                if done:
                    yield done
        except Exception as error:
            self.call.facts["error"] = type(error).__name__
            if not isinstance(error, PenstockError):
                self.server.log.error("stream failed", response_id=self.id, error=described(error), exc_info=True)
            yield failure_frame(failure_of(error, self.request.scope))
        finally:
            self.call.facts["completion_tokens"] = generation.usage().completion_tokens
            self._note_ends(generation)

    def _note_ends(self, generation: Generation) -> None:
        reasons = [out.finish_reason for output in generation.ended for out in output.outputs]
        times = [output.metrics.first_token_s for output in generation.ended]
        if reasons:
            self.call.facts["finish_reasons"] = reasons
        if seconds := [time_s for time_s in times if time_s is not None]:
            self.call.facts["first_token_s"] = round(min(seconds), 6)
