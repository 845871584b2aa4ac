"""`VLLMEngine`: vLLM's `AsyncLLM` behind the `Engine` protocol.

Owns the `AsyncLLM`, unless a running one was given, and translates requests and outputs. Deadlines are kept by
`StreamedEngine`, because vLLM has none.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from penstock.api.arguments import Arguments
from penstock.backends.encoding import Encoder
from penstock.backends.engine_start import EngineStart
from penstock.backends.hosted import HostedEngine, HostedWork, to_the_end
from penstock.backends.prompt_scores import Scoring
from penstock.backends.streamed import StreamedRequest
from penstock.backends.vllm_outputs import add_output
from penstock.backends.vllm_params import check_params, structure_arguments, vllm_arguments, vllm_priority
from penstock.backends.vllm_process import check_options, start_vllm, stop_vllm
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
from penstock.generation import Params
from penstock.sampling import SamplingParams

ABORT_S = 1.0  # the longest that vLLM is given to hand out what an aborted request has


class VLLMEngine(HostedEngine):
    """Generates with vLLM: `model` is a model's folder or name, or a running `AsyncLLM`.

    `options` are fields of vLLM's `AsyncEngineArgs` (`dtype`, `tensor_parallel_size`, `distributed_executor_backend`,
    ...), checked when the engine starts. By default priorities count (`scheduling_policy="priority"`), and any number
    of log probabilities may be asked for (`max_logprobs=-1`). With `logprobs_mode="raw_logits"` `score` returns logits,
    and outputs hold no log probabilities. vLLM starts its processes with "spawn": a script needs `if __name__ ==
    "__main__":`.

    A running `AsyncLLM` is used on `loop`, the event loop of another thread on which it runs, and is not shut down.
    Raises `ConfigurationError` if vLLM is not installed.
    """

    limit_name = "max_model_len"

    def __init__(
        self, model: str | os.PathLike[str] | Any, *, loop: asyncio.AbstractEventLoop | None = None, **options: Any
    ) -> None:
        if isinstance(model, str | os.PathLike):
            check_options(options)
            name, llm = os.fspath(model), None
        else:
            name, llm = model.model_config.model, model
        super().__init__("penstock-vllm", name, loop)
        self._owns_llm = llm is None
        self._llm: Any = llm
        self._options = options
        self._stop_llm: Callable[[], None] | None = None  # while vLLM was started here; called when the program exits
        self._aborts: set[asyncio.Task[None]] = set()

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, which two threads must not use at once; None before the engine has started."""
        return None if self._llm is None else self._llm.get_tokenizer()

    @property
    def _limit(self) -> int:
        return int(self._llm.model_config.max_model_len)

    @property
    def _defaults(self) -> Mapping[str, Any]:
        defaults: Mapping[str, Any] = self._llm.model_config.get_diff_sampling_param()
        return defaults

    @property
    def _logprobs_mode(self) -> object:
        return self._options.get("logprobs_mode") if self._llm is None else self._llm.model_config.logprobs_mode

    def _check_logits(self) -> None:
        if self._logprobs_mode != "raw_logits":
            raise RequestError('this engine has no logits: make it with logprobs_mode="raw_logits"')

    def _new_scoring(self, ids: Sequence[int], params: Params, rows: bool, entropies: bool) -> Scoring:
        are_logits = self._logprobs_mode == "raw_logits"
        return Scoring.of(ids, params, are_logits=are_logits, logits=rows, entropies=entropies, engine="vLLM")

    async def _forget_prefixes(self) -> None:
        await alive(self._llm, self._llm.reset_prefix_cache())

    # The connection.

    async def _open(self) -> None:
        if self._owns_llm:
            start = EngineStart(start_vllm, self.model, self._options)
            self._llm = await start.result()
            self._stop_llm = functools.partial(stop_vllm, self._llm, start.processes)
            atexit.register(self._stop_llm)
        self._encoder, self._weights = Encoder(self._llm.get_tokenizer()), VLLMWeights(self._llm, self.model)

    async def _close(self) -> None:
        if self._encoder is not None:
            self._encoder.close()
        if self._stop_llm is not None:
            stop, self._stop_llm, self._llm = self._stop_llm, None, None
            await to_the_end(stop)
            atexit.unregister(stop)

    # Requests.

    def _prepare(self, arguments: Arguments) -> tuple[HostedWork, int]:
        check_params(arguments.params)
        return HostedWork(), getattr(arguments.params, "n", getattr(arguments.params, "num_return_sequences", 1))

    async def _generate(self, request: StreamedRequest[HostedWork], ids: list[int], params: SamplingParams) -> None:
        arguments, request_id = request.arguments, request.channel.request_id
        priority = vllm_priority(arguments.priority) if self._llm.scheduler_config.policy == "priority" else 0
        vllm_params = self._vllm_params(params, is_score=request.work.scoring is not None)
        stream = self._llm.generate(_prompt(ids, arguments.namespace), vllm_params, request_id, priority=priority)
        async with contextlib.aclosing(stream) as outputs:
            await self._read(request, params, outputs)

    async def _read(
        self, request: StreamedRequest[HostedWork], params: SamplingParams, outputs: AsyncIterator[Any]
    ) -> None:
        scoring = request.work.scoring
        async for output in outputs:
            if scoring is not None and output.prompt_logprobs:
                scoring.entries, scoring.weight_version = output.prompt_logprobs, self.weight_version
            with_prompt = params.prompt_logprobs is not None and scoring is None
            self._publish(request, add_output(request, params, output, self.weight_version, with_prompt=with_prompt))

    def _vllm_params(self, params: SamplingParams, *, is_score: bool) -> Any:
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
        from vllm.sampling_params import SamplingParams as VLLMParams

        arguments = vllm_arguments(params, with_logprobs=self._logprobs_mode == "raw_logprobs")
        if params.structured_outputs is not None:
            arguments["structured_outputs"] = StructuredOutputsParams(**structure_arguments(params.structured_outputs))
        if is_score:
            arguments |= {"logprobs": None, "flat_logprobs": True}
        return VLLMParams(**arguments, output_kind=RequestOutputKind.DELTA)

    def _interrupt(self, request: StreamedRequest[HostedWork], task: asyncio.Task[None]) -> None:
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
