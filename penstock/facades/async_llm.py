"""`AsyncLLMEngine`: the engine under the names of vLLM's lessons; streams `RequestOutput`s instead of deltas.

A thin facade of `InferenceEngine` that only accumulates deltas into outputs. Called by programs written for vLLM.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any, Self, Unpack

from penstock.api.handle import RequestHandle
from penstock.api.prompt import Prompt
from penstock.api.stats import EngineStats
from penstock.engine.inference import InferenceEngine
from penstock.errors import ConfigurationError, shown
from penstock.facades.engine_args import EngineArguments, engine_config
from penstock.generation import Params
from penstock.outputs import CompletionOutput, Delta, RequestOutput
from penstock.sampling import OutputKind, RequestPriority, SamplingParams
from penstock.values import LARGEST_COUNT, integer, items


class AsyncEngineArgs:
    """The arguments of an `AsyncLLMEngine`: `model`, `tokenizer`, and those of `LLM` and `EngineConfig`."""

    def __init__(self, model: object = None, tokenizer: object = None, **settings: Unpack[EngineArguments]) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = engine_config(settings, {"max_batch_size": 256, "max_sequence_length": None})


class OutputStream:
    """One request: await it for the final `RequestOutput`, or iterate over it for one output per step.

    `SamplingParams.output_kind` determines their content: everything so far (the default), only what is new, or only
    the final result. Cancelling, closing or dropping the stream aborts the request.
    """

    def __init__(self, handle: RequestHandle, kind: OutputKind, n: int) -> None:
        self._handle = handle
        self._kind = kind
        self._n = n
        self._completions: dict[int, CompletionOutput] = {}
        self._exhausted = False

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self._handle.request_id

    def __await__(self) -> Generator[object, None, RequestOutput]:
        return self._handle.__await__()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._exhausted:
            raise StopAsyncIteration
        if self._kind is OutputKind.FINAL_ONLY:
            self._exhausted = True
            return await self._handle
        delta = await self._handle.__anext__()
        self._completions[delta.index] = _extended(self._completions.get(delta.index), delta)
        if self._kind is OutputKind.DELTA:
            return self._output([_from_delta(delta)])
        if self._complete and delta.finish_reason in ("stop", "length"):
            return await self._handle  # the result has what deltas lack: metrics, prompt logprobs
        return self._output([self._completions[index] for index in sorted(self._completions)])

    async def aclose(self) -> None:
        """Abort the request if it still runs."""
        await self._handle.aclose()

    @property
    def _complete(self) -> bool:
        """Whether every completion has had its last delta; a later one may not have had its first yet."""
        return len(self._completions) == self._n and all(out.finish_reason for out in self._completions.values())

    def _output(self, outputs: list[CompletionOutput]) -> RequestOutput:
        handle = self._handle
        return RequestOutput(self.request_id, handle.prompt, handle.prompt_token_ids, outputs, self._complete)


def _from_delta(delta: Delta) -> CompletionOutput:
    return CompletionOutput(
        index=delta.index,
        text=delta.text,
        token_ids=list(delta.token_ids),
        cumulative_logprob=sum(delta.token_logprobs),
        logprobs=list(delta.logprobs) or None,
        finish_reason=delta.finish_reason,
        stop_reason=delta.stop_reason,
        token_logprobs=list(delta.token_logprobs),
        weight_versions=list(delta.weight_versions),
    )


def _extended(previous: CompletionOutput | None, delta: Delta) -> CompletionOutput:
    """A new record, so that records returned earlier do not change."""
    completion = _from_delta(delta)
    if previous is None:
        return completion
    completion.text = previous.text + completion.text
    completion.token_ids = previous.token_ids + completion.token_ids
    completion.cumulative_logprob += previous.cumulative_logprob
    completion.token_logprobs = previous.token_logprobs + completion.token_logprobs
    completion.weight_versions = previous.weight_versions + completion.weight_versions
    if previous.logprobs or completion.logprobs:
        completion.logprobs = (previous.logprobs or []) + (completion.logprobs or [])
    return completion


class AsyncLLMEngine:
    """Online generation for servers. Create it with `from_engine_args`; the first request loads the model."""

    def __init__(self, engine: InferenceEngine) -> None:
        self.engine = engine

    @classmethod
    def from_engine_args(cls, engine_args: AsyncEngineArgs) -> Self:
        """An engine with these arguments. Raises `ConfigurationError`."""
        if not isinstance(engine_args, AsyncEngineArgs):
            raise ConfigurationError(f"engine_args must be AsyncEngineArgs, got {shown(engine_args)}")
        return cls(InferenceEngine(engine_args.model, engine_args.tokenizer, engine_args.config))

    def generate(
        self, prompt: Prompt, sampling_params: Params = None, request_id: str | None = None, *, priority: int = 0
    ) -> OutputStream:
        """Submit at once; await or iterate over the result. `priority` is vLLM's: lower first, 0 is normal."""
        kind, n = OutputKind.CUMULATIVE, 1
        if isinstance(sampling_params, SamplingParams):
            kind, n = sampling_params.output_kind, sampling_params.n
        handle = self.engine.generate(prompt, sampling_params, request_id=request_id, priority=_class_of(priority))
        return OutputStream(handle, kind, n)

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """Abort one request or several; unknown ids are ignored."""
        for each_id in [request_id] if isinstance(request_id, str) else items("request_id", request_id):
            self.engine.abort(each_id)

    async def get_tokenizer(self) -> Any:
        """The model's tokenizer; loads the model if necessary."""
        await self.engine.__aenter__()
        return self.engine.tokenizer

    def get_stats(self) -> EngineStats:
        """The engine's statistics."""
        return self.engine.get_stats()

    def shutdown(self) -> None:
        """Stop at once and free all resources."""
        self.engine.stop(0.0)


def _class_of(priority: int) -> RequestPriority:
    """The priority class for vLLM's number: -1 is HIGH, -2 and below CRITICAL, 1 and above LOW."""
    number = integer("priority", priority, -LARGEST_COUNT, rule="an integer, lower first")
    return RequestPriority(min(4, max(1, RequestPriority.NORMAL - number)))
