"""`VLLMEngine`: vLLM's `AsyncLLM` behind the `Engine` protocol.

Owns the `AsyncLLM`, unless a running one was given, and translates requests and outputs. Deadlines are kept by
`StreamedEngine`, because vLLM has none.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from penstock.api.arguments import Arguments, read_arguments
from penstock.api.channel import Channel
from penstock.api.handle import RequestHandle
from penstock.api.prompt import Prompt, as_batch, read_prompt
from penstock.api.waiting import result_of
from penstock.backends.encoding import Encoder
from penstock.backends.streamed import StreamedEngine, StreamedRequest
from penstock.backends.vllm_outputs import add_output
from penstock.backends.vllm_params import (
    NEW_TOKENS,
    check_params,
    resolve,
    structure_arguments,
    vllm_arguments,
    vllm_priority,
)
from penstock.backends.vllm_process import check_options, start_vllm
from penstock.backends.vllm_scores import Scoring
from penstock.backends.vllm_weights import VLLMWeights, alive, dead
from penstock.errors import (
    EngineOverloaded,
    ExecutionError,
    GrammarError,
    PenstockError,
    RequestError,
    described,
    text_of,
)
from penstock.generation import Params, default_params
from penstock.sampling import RequestPriority, SamplingParams
from penstock.scores import Score

T = TypeVar("T")
Completion = str | Sequence[int]  # a text without special tokens, or token ids
ABORT_S = 1.0  # the longest that vLLM is given to hand out what an aborted request has


@dataclass(slots=True, eq=False)
class VLLMWork:
    """What is particular to a request here: its resolved parameters, and a completion that is scored."""

    params: SamplingParams | None = None
    scoring: Scoring | None = None


class VLLMEngine(StreamedEngine[VLLMWork]):
    """Generates with vLLM: `model` is a model's folder or name, or a running `AsyncLLM`.

    `options` are fields of vLLM's `AsyncEngineArgs` (`dtype`, `tensor_parallel_size`, `distributed_executor_backend`,
    ...), checked when the engine starts. By default priorities count (`scheduling_policy="priority"`), and any number
    of log probabilities may be asked for (`max_logprobs=-1`). With `logprobs_mode="raw_logits"` `score` returns logits,
    and outputs hold no log probabilities. vLLM starts its processes with "spawn": a script needs `if __name__ ==
    "__main__":`.

    A running `AsyncLLM` is used on `loop`, the event loop of another thread on which it runs, and is not shut down.
    Raises `ConfigurationError` if vLLM is not installed.
    """

    def __init__(
        self, model: str | os.PathLike[str] | Any, *, loop: asyncio.AbstractEventLoop | None = None, **options: Any
    ) -> None:
        super().__init__("penstock-vllm", loop)
        self._owns_llm = isinstance(model, str | os.PathLike)
        if isinstance(model, str | os.PathLike):
            check_options(options)
            self.model: str = os.fspath(model)
            self._llm: Any = None
        else:
            self.model, self._llm = model.model_config.model, model
        self._options = options
        self._encoder: Encoder | None = None
        self._aborts: set[asyncio.Task[None]] = set()
        self._weights: VLLMWeights | None = None

    # Capabilities beside `generate`.

    @property
    def tokenizer(self) -> object:
        """The tokenizer, which two threads must not use at once; None before the engine has started."""
        return None if self._llm is None else self._llm.get_tokenizer()

    async def tokenize(self, prompt: Prompt, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a prompt. Raises `RequestError`."""
        read = read_prompt(prompt)
        return (await self._run(lambda: self._encoding().encode(read, add_special_tokens)))[1]

    async def detokenize(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids. Raises `RequestError`."""
        return await self._run(lambda: self._encoding().decode(ids, skip_special_tokens))

    def default_params(self, max_tokens: int | None = None) -> SamplingParams:
        """The parameters of a request without any. Starts the engine."""
        self.start()
        return default_params(self._llm.model_config.get_diff_sampling_param(), max_tokens or NEW_TOKENS)

    def reset_prefix_cache(self) -> None:
        """Reuse nothing computed so far; blocks until vLLM has forgotten it."""
        self.start()
        with self._lock:
            loop = self._loop()
        asyncio.run_coroutine_threadsafe(alive(self._llm, self._llm.reset_prefix_cache()), loop).result()

    async def score(
        self,
        prompts: Prompt | Sequence[Prompt],
        completions: Completion | Sequence[Completion],
        *,
        params: Params = None,
        logits: bool = False,
        entropies: bool = False,
        namespace: str = "",
        priority: RequestPriority = RequestPriority.NORMAL,
        deadline: float | None = None,
    ) -> list[Score]:
        """The log probabilities of a completion after each prompt. Of `params` only the temperature may be set.

        `logits` needs an engine with `logprobs_mode="raw_logits"`. Raises `RequestError`, and whatever awaiting a
        request raises.
        """
        batch, completed = as_batch(prompts), as_batch(completions)
        if len(batch) != len(completed):
            raise RequestError(f"{len(batch)} prompts and {len(completed)} completions: pass one for each")
        arguments = [
            read_arguments(prompt, params, namespace=namespace, priority=priority, deadline=deadline)
            for prompt in batch
        ]
        mode = self._options.get("logprobs_mode") if self._llm is None else self._llm.model_config.logprobs_mode
        wishes = (arguments[0].params if arguments else None, mode == "raw_logits", logits, entropies)
        ids = [await self._completion_ids(completion) for completion in completed]
        works = [VLLMWork(scoring=Scoring.of(tokens, *wishes)) for tokens in ids]
        handles = [self._submit_work(*pair) for pair in zip(arguments, works, strict=True)]
        for handle in handles:
            await handle
        return [work.scoring.score() for work in works if work.scoring is not None]

    async def _completion_ids(self, completion: Prompt) -> object:
        return await self.tokenize(completion, add_special_tokens=False) if isinstance(completion, str) else completion

    def _submit_work(self, arguments: Arguments, work: VLLMWork) -> RequestHandle:
        channel = Channel(f"score-{id(work):x}", arguments.priority, arguments.deadline)
        self._submit(StreamedRequest(channel, arguments, work))
        return RequestHandle(channel, self)

    # Weights.

    @property
    def weight_version(self) -> int:
        """How often the weights were updated."""
        return 0 if self._weights is None else self._weights.version

    async def pause(self, mode: str = "abort") -> None:
        """Start no more requests. "abort" ends what runs, "wait" serves it first, "keep" leaves it for later.

        Raises `EngineStateError` if the engine is paused already.
        """
        await self._run(lambda: self._opened_weights().pause(mode))

    async def resume(self) -> None:
        """Go on after `pause`. Raises `EngineStateError` if the engine is not paused."""
        await self._run(lambda: self._opened_weights().resume())

    async def update_weights(self, source: object, *, mode: str = "abort") -> int:
        """Load the weights in a folder of safetensors, and return their version; K/V of older weights is not reused.

        `mode` says what happens to running requests: "abort" ends them, "wait" serves them first. "keep" is refused,
        because their K/V would be of the old weights. Raises `WeightsError` for weights that do not fit: nothing was
        changed then, unless it has `is_mixed`.
        """
        return await self._run(lambda: self._opened_weights().update(source, mode))

    def _opened_weights(self) -> VLLMWeights:
        assert self._weights is not None, "the engine has not started"
        return self._weights

    # The connection.

    async def _open(self) -> None:
        if self._llm is None:
            # Not on the main thread, where vLLM could install signal handlers; nor on this one, which serves deadlines.
            self._llm = await asyncio.to_thread(start_vllm, self.model, self._options)
        self._encoder, self._weights = Encoder(self._llm.get_tokenizer()), VLLMWeights(self._llm, self.model)

    async def _close(self) -> None:
        self._encoding().close()
        if self._owns_llm:
            await asyncio.to_thread(self._llm.shutdown)

    def _encoding(self) -> Encoder:
        assert self._encoder is not None, "the engine has not started"
        return self._encoder

    async def _run(self, function: Callable[[], Awaitable[T]]) -> T:
        """The result of a coroutine on the engine's loop, for a caller on any loop."""

        async def run() -> T:
            await self._opened()
            return await function()

        with self._lock:
            loop = self._loop()
        return await result_of(asyncio.run_coroutine_threadsafe(run(), loop))

    # Requests.

    def _prepare(self, arguments: Arguments) -> tuple[VLLMWork, int]:
        check_params(arguments.params)
        return VLLMWork(), getattr(arguments.params, "n", getattr(arguments.params, "num_return_sequences", 1))

    async def _stream(self, request: StreamedRequest[VLLMWork]) -> None:
        channel, work, arguments = request.channel, request.work, request.arguments
        channel.prompt, channel.prompt_token_ids = await self._encoding().encode(arguments.prompt)
        ids = channel.prompt_token_ids
        if work.scoring is None:
            work.params = self._resolved(arguments.params, ids)
        else:
            ids, work.params = work.scoring.request(ids)
        priority = vllm_priority(arguments.priority) if self._llm.scheduler_config.policy == "priority" else 0
        stream = self._llm.generate(
            _prompt(ids, arguments.namespace), self._vllm_params(work), channel.request_id, priority=priority
        )
        async with contextlib.aclosing(stream) as outputs:
            await self._read(request, outputs)

    def _resolved(self, params: Params, ids: Sequence[int]) -> SamplingParams:
        config = self._llm.model_config
        return resolve(params, len(ids), config.max_model_len, config.get_diff_sampling_param())

    async def _read(self, request: StreamedRequest[VLLMWork], outputs: AsyncIterator[Any]) -> None:
        params, scoring = request.work.params, request.work.scoring
        assert params is not None
        async for output in outputs:
            if scoring is not None and output.prompt_logprobs:
                scoring.entries, scoring.weight_version = output.prompt_logprobs, self.weight_version
            with_prompt = params.prompt_logprobs is not None and scoring is None
            self._publish(request, add_output(request, params, output, self.weight_version, with_prompt=with_prompt))

    def _vllm_params(self, work: VLLMWork) -> Any:
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
        from vllm.sampling_params import SamplingParams as VLLMParams

        assert work.params is not None
        arguments = vllm_arguments(work.params, with_logprobs=self._llm.model_config.logprobs_mode == "raw_logprobs")
        if work.params.structured_outputs is not None:
            structure = structure_arguments(work.params.structured_outputs)
            arguments["structured_outputs"] = StructuredOutputsParams(**structure)
        if work.scoring is not None:
            arguments |= {"logprobs": None, "flat_logprobs": True}
        return VLLMParams(**arguments, output_kind=RequestOutputKind.DELTA)

    def _interrupt(self, request: StreamedRequest[VLLMWork], task: asyncio.Task[None]) -> None:
        """Ask vLLM for what it still has, where it knows the request; closing the stream would lose that."""
        if not request.transcripts:
            task.cancel()
            return
        abort = asyncio.ensure_future(self._abort(request.channel.request_id, task))
        self._aborts.add(abort)
        abort.add_done_callback(self._aborts.discard)

    async def _abort(self, request_id: str, task: asyncio.Task[None]) -> None:
        with contextlib.suppress(Exception):  # vLLM has failed: the stream ends with its error
            await self._llm.abort(request_id)
        await asyncio.wait([task], timeout=ABORT_S)
        task.cancel()

    def _error_of(self, error: BaseException) -> PenstockError:
        from vllm.exceptions import GracefulHTTPError, VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError

        if isinstance(error, EngineDeadError):
            return dead()
        if isinstance(error, GracefulHTTPError):
            return EngineOverloaded(f"vLLM is overloaded: {text_of(error)}")
        if isinstance(error, VLLMClientError):
            words = text_of(error)
            is_grammar = any(word in words.lower() for word in ("grammar", "schema", "regex", "structured"))
            return (GrammarError if is_grammar else RequestError)(f"vLLM refused the request: {words}")
        return ExecutionError(f"vLLM failed: {described(error.__cause__ or error)}")


def _prompt(ids: Sequence[int], namespace: str) -> dict[str, object]:
    """Token ids in the form that vLLM's renderers give them."""
    salt = {"cache_salt": namespace} if namespace else {}
    return {"type": "token", "prompt_token_ids": list(ids), **salt}
