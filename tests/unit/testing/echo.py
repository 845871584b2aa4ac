"""An engine that generates its prompt, built only from the public parts of `penstock.api`."""

import asyncio
import time
from typing import Any, Self

from penstock.api.arguments import check_id, read_arguments
from penstock.api.callbacks import Callbacks
from penstock.api.channel import Channel, RequestStatus
from penstock.api.event_loop import LoopThread
from penstock.api.handle import RequestHandle
from penstock.api.prompt import Prompt
from penstock.api.transcript import Transcript
from penstock.api.waiting import Wakeups, call_on_loop
from penstock.errors import DeadlineExceeded, EngineClosed, RequestAborted, RequestError
from penstock.generation import Params
from penstock.outputs import RequestOutput

STATUSES = {type(None): RequestStatus.COMPLETED, RequestAborted: RequestStatus.CANCELLED}


class EchoEngine:
    def __init__(self) -> None:
        self._thread = LoopThread("echo")
        self._callbacks = Callbacks(lambda request_id, error: self._post(request_id, RequestError(str(error))))
        self._running: dict[str, tuple[Channel, Transcript]] = {}
        self._stopped = False

    def generate(
        self, prompt: Prompt, params: Params = None, *, request_id: str | None = None, **options: Any
    ) -> RequestHandle:
        arguments, request_id = read_arguments(prompt, params, **options), check_id(request_id)
        if self._stopped:
            raise EngineClosed("the engine was stopped")
        if request_id in self._running:
            raise RequestError("this request id is already running")
        channel = Channel(request_id, arguments.priority, arguments.deadline)
        channel.prompt_token_ids = ids = arguments.prompt.token_ids or []
        self._running[request_id] = channel, Transcript(request_id)
        count = getattr(arguments.params, "max_tokens", None)
        asyncio.run_coroutine_threadsafe(self._echo(request_id, ids[:count], arguments.deadline), self._thread.loop)
        handle = RequestHandle(channel, self)
        if callback := options.get("callback"):
            self._callbacks.stream(handle, callback)
        return handle

    async def _echo(self, request_id: str, ids: list[int], deadline: float) -> None:
        entry = self._running.get(request_id)
        for token in ids:
            await asyncio.sleep(0.001)
            if time.monotonic() > deadline:
                self._end(request_id, DeadlineExceeded("too late"))
            if entry is None or self._running.get(request_id) is not entry:  # the id may be in use again
                return
            channel, transcript = entry
            transcript.add(f" {token}", [token], [0.0], [0.0])
            channel.put(transcript, wakeups := Wakeups())
            wakeups.send()
        self._end(request_id, None)

    def _post(self, request_id: str, error: Exception) -> None:
        call_on_loop(self._thread.loop, self._end, request_id, error)

    def _end(self, request_id: str, error: Any) -> None:
        if request_id in self._running:
            channel, transcript = self._running.pop(request_id)
            transcript.end("", "length" if error is None else "abort")
            output = RequestOutput(request_id, None, channel.prompt_token_ids, [transcript.completion()])
            if isinstance(error, RequestAborted | DeadlineExceeded | EngineClosed):
                error.output = output
            channel.put(transcript, wakeups := Wakeups())
            channel.end(STATUSES.get(type(error), RequestStatus.FAILED), output, error, wakeups)
            wakeups.send()

    def abort(self, request_id: str) -> None:
        self._post(request_id, RequestAborted("aborted"))

    def start(self) -> None: ...

    def stop(self, drain: float = 30.0) -> None:
        self._stopped, end = True, time.monotonic() + drain
        while self._running and time.monotonic() < end:
            time.sleep(0.001)
        for request_id in list(self._running):
            self._post(request_id, EngineClosed("the engine was stopped"))
        self._callbacks.close()
        self._thread.close(wait=True)

    def get_stats(self) -> dict[str, object]:
        return {"num_requests": len(self._running)}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.to_thread(self.stop, 0)
