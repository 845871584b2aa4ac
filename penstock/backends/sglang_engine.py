"""`SGLangEngine`: SGLang's `Engine` behind the `Engine` protocol.

Owns SGLang's engine and translates requests and outputs. Deadlines are kept by `StreamedEngine`, because SGLang has
none. Samples of one prompt are streams of their own, because SGLang cannot abort several under one id.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from penstock.api.arguments import Arguments
from penstock.api.prompt import Prompt
from penstock.backends.encoding import Encoder
from penstock.backends.engine_start import EngineStart
from penstock.backends.hosted import Completion, HostedEngine, HostedWork, to_the_end
from penstock.backends.prompt_scores import Scoring
from penstock.backends.request_params import plain_params
from penstock.backends.sglang_adapters import SGLangAdapters
from penstock.backends.sglang_outputs import PromptEntries, Stream, prompt_logprobs, refusal
from penstock.backends.sglang_params import check_params, sglang_arguments
from penstock.backends.sglang_process import SGLang, check_options, dead, start_sglang
from penstock.backends.sglang_weights import SGLangWeights
from penstock.backends.streamed import StreamedRequest
from penstock.errors import (
    EngineStateError,
    ExecutionError,
    PenstockError,
    RequestError,
    described,
    text_of,
)
from penstock.generation import Params
from penstock.sampling import SamplingParams
from penstock.scores import FloatArray
from penstock.values import text

ABORT_S = 1.0  # the longest that SGLang is given to hand out what an aborted request has


class SGLangEngine(HostedEngine):
    """Generates with SGLang: `model` is a model's folder or name.

    `options` are fields of SGLang's `ServerArgs` (`dtype`, `tp_size`, `mem_fraction_static`, ...), checked when the
    engine starts. Seeds need `enable_deterministic_inference=True`. SGLang starts its processes with "spawn": a script
    needs `if __name__ == "__main__":`. Raises `ConfigurationError` if SGLang is not installed, or for an option that
    this engine sets itself.
    """

    limit_name = "context_length"

    def __init__(self, model: str | os.PathLike[str], **options: Any) -> None:
        check_options(options)
        super().__init__("penstock-sglang", os.fspath(model))
        self._options = options
        self._sglang: SGLang | None = None
        self._adapters: SGLangAdapters | None = None
        self._aborts: set[asyncio.Task[None]] = set()

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, which two threads must not use at once; None before the engine has started."""
        return None if self._sglang is None else self._sglang.manager.tokenizer

    @property
    def _limit(self) -> int:
        return int(self._running.manager.context_len)

    @property
    def _defaults(self) -> Mapping[str, Any]:
        defaults: Mapping[str, Any] = self._running.manager.model_config.get_default_sampling_params()
        return defaults

    @property
    def _running(self) -> SGLang:
        """SGLang. Raises `EngineClosed` if one of its processes has ended."""
        assert self._sglang is not None, "the engine has not started"
        if not self._sglang.is_alive:
            raise dead()
        return self._sglang

    async def distributions(
        self, prompts: Prompt | Sequence[Prompt], completions: Completion | Sequence[Completion]
    ) -> list[FloatArray]:
        """The log probability of every token of the vocabulary in front of each token of a completion.

        float32 [R, vocab] for a completion of R tokens, under the model. Raises `RequestError`, and whatever awaiting a
        request raises.
        """
        scores = await self._score(prompts, completions, None, True, False)
        return [score.logits for score in scores if score.logits is not None]

    # Adapters.

    @property
    def adapters(self) -> list[str]:
        """The names of the loaded adapters."""
        return [] if self._adapters is None else self._adapters.names()

    async def load_adapter(self, name: str, source: object) -> None:
        """Load a LoRA adapter, a folder that peft wrote, for requests with `adapter=name`.

        Needs `enable_lora=True`, `max_lora_rank` and `lora_target_modules` among the options. A name that is loaded
        already is replaced: requests that run keep the old one to their end. Raises `WeightsError`, `RequestError`.
        """
        if not text("name", name):
            raise RequestError("an adapter needs a name: '' stands for none")
        await self._run(lambda: self._opened_adapters().load(name, source))

    async def unload_adapter(self, name: str) -> None:
        """Refuse new requests with an adapter, and forget it once those that run with it have ended.

        Raises `RequestError` for an unknown name.
        """
        name = text("name", name)
        await self._run(lambda: self._opened_adapters().unload(name))

    def adapter_generation(self, name: str) -> int:
        """A number that is new with every load of an adapter of this name; 0 while none is loaded."""
        return 0 if self._adapters is None else self._adapters.generation(name)

    def _opened_adapters(self) -> SGLangAdapters:
        assert self._adapters is not None, "the engine has not started"
        return self._adapters

    # Scores.

    def _check_logits(self) -> None:
        raise RequestError(
            "SGLang returns log probabilities, and no logits: use the native engine, or vLLM with "
            'logprobs_mode="raw_logits"'
        )

    def _new_scoring(self, ids: Sequence[int], params: Params, rows: bool, entropies: bool) -> Scoring:
        return Scoring.of(ids, params, are_logits=False, logits=rows, entropies=entropies, engine="SGLang")

    async def _forget_prefixes(self) -> None:
        result = await self._running.answer(self._running.manager.flush_cache())
        if not result.success:
            raise EngineStateError(f"SGLang forgets prefixes only while no request runs: {result.message}")

    # The connection.

    async def _open(self) -> None:
        self._sglang = await EngineStart(start_sglang, self.model, self._options).result()
        self._sglang.attach(self._fail_all)
        self._encoder = Encoder(self._sglang.manager.tokenizer)
        self._weights = SGLangWeights(self._sglang, self.model)
        self._adapters = SGLangAdapters(self._sglang)

    async def _close(self) -> None:
        if self._encoder is not None:
            self._encoder.close()
        if self._sglang is not None:
            self._sglang.detach()
            await to_the_end(self._sglang.close)

    def _fail_all(self) -> None:
        """End all requests, because a process of SGLang's has ended."""
        with self._lock:
            requests = list(self._requests.values())
        for request in requests:
            self._cancel(request, dead())

    # Requests.

    def _prepare(self, arguments: Arguments) -> tuple[HostedWork, int]:
        check_params(arguments.params)
        if arguments.params is None:
            return HostedWork(), 1
        params = plain_params(arguments.params)
        if params.seed is not None and not self._options.get("enable_deterministic_inference"):
            raise RequestError("SGLang ignores a seed: make the engine with enable_deterministic_inference=True")
        return HostedWork(), params.n

    async def _generate(self, request: StreamedRequest[HostedWork], ids: list[int], params: SamplingParams) -> None:
        vocab_size = int(self._running.manager.model_config.vocab_size)
        if max(ids) >= vocab_size:  # SGLang's process would fail
            raise RequestError(f"token id {max(ids)} is outside the model's vocabulary of {vocab_size}")
        indices = range(params.num_sequences)
        request.work.stream_ids = [uuid.uuid4().hex for _ in indices]  # SGLang aborts all that begin with an id
        reads = [asyncio.ensure_future(self._read(request, ids, params, index)) for index in indices]
        try:
            await asyncio.gather(*reads)
        finally:
            for read in reads:
                read.cancel()

    async def _read(
        self, request: StreamedRequest[HostedWork], ids: list[int], params: SamplingParams, index: int
    ) -> None:
        """Read the stream of one sample."""
        scoring = request.work.scoring
        completions = range(params.n) if params.num_sequences == 1 else (index,)
        stream = Stream(request, params, completions)
        chunks = await self._running.engine.async_generate(**self._arguments(request, ids, params, index))
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                meta = chunk["meta_info"]
                if index == 0 and meta.get("input_token_logprobs"):
                    if scoring is not None:
                        scoring.entries = PromptEntries.of(meta, len(ids))
                        scoring.weight_version = int(meta["weight_version"])
                    elif request.prompt_logprobs is None and params.prompt_logprobs is not None:
                        request.prompt_logprobs = [*prompt_logprobs(meta, params.prompt_logprobs)]
                self._publish(request, stream.add(chunk))

    def _arguments(
        self, request: StreamedRequest[HostedWork], ids: list[int], params: SamplingParams, index: int
    ) -> dict[str, Any]:
        """The arguments of SGLang's `async_generate`."""
        scoring, sampling = request.work.scoring, sglang_arguments(params, index)
        start = -1  # log probabilities of the output alone
        if scoring is not None:
            sampling["max_new_tokens"] = 0
            start = scoring.begin - 1
        elif params.prompt_logprobs is not None and index == 0:
            start = 0
        vocab_size = self._running.manager.model_config.vocab_size
        counts = [count for count in (params.logprobs, params.prompt_logprobs) if count is not None]
        return {
            "input_ids": list(ids),
            "sampling_params": sampling,
            "return_logprob": True,
            "logprob_start_len": start,
            "top_logprobs_num": max((vocab_size if count < 0 else count for count in counts), default=0),
            "stream": True,
            "rid": request.work.stream_ids[index],
            "priority": int(request.arguments.priority),
            "cache_salt": request.arguments.namespace or None,
            "lora_path": self._opened_adapters().own_name(request.arguments.adapter),
        }

    def _interrupt(self, request: StreamedRequest[HostedWork], task: asyncio.Task[None]) -> None:
        """Ask SGLang for what it still has, where it has begun the request; closing the streams would lose that."""
        if not request.transcripts or self._sglang is None or not self._sglang.is_alive:
            task.cancel()
            return
        for stream_id in request.work.stream_ids:
            self._sglang.manager.abort_request(stream_id)
        abort = asyncio.ensure_future(_cancel_later(task))
        self._aborts.add(abort)
        abort.add_done_callback(self._aborts.discard)

    def _error_of(self, error: BaseException) -> PenstockError:
        if isinstance(error, ValueError):
            return refusal(text_of(error), 400)
        return ExecutionError(f"SGLang failed: {described(error)}")


async def _cancel_later(task: asyncio.Task[None]) -> None:
    await asyncio.wait([task], timeout=ABORT_S)
    task.cancel()
