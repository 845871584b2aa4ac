"""A stand-in for vLLM: the modules that `penstock.backends` imports of it, and an `AsyncLLM` that counts up.

Where vLLM has rules that matter here, it has them too: an abort hands out what is left, closing a stream loses it; a
call into a dead process never returns.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from enum import Enum
from importlib.machinery import ModuleSpec
from multiprocessing import get_context
from multiprocessing.connection import wait
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest


class VLLMClientError(Exception):
    pass


class GracefulHTTPError(Exception):
    pass


class EngineDeadError(Exception):
    pass


class RequestOutputKind(Enum):
    DELTA = 1


@dataclass
class FlatLogprobs:
    """`width` entries per position, of the token itself first."""

    logprobs: list[float]
    token_ids: list[int]
    width: int = 1

    @property
    def start_indices(self) -> list[int]:
        return list(range(0, len(self.logprobs), self.width))

    @property
    def end_indices(self) -> list[int]:
        return [start + self.width for start in self.start_indices]

    def __len__(self) -> int:
        return len(self.start_indices)


VOCAB_SIZE = 128


def logits_after(token: int) -> list[float]:
    """The logits after a token, of an engine that returns logits."""
    return [float((token * 7 + other * 3) % 11) for other in range(VOCAB_SIZE)]


def flat_logits(ids: list[int]) -> FlatLogprobs:
    """The logits in front of every token: that of the token itself, then those of the vocabulary."""
    flat = FlatLogprobs([], [], 1 + VOCAB_SIZE)
    for before, token in zip([0, *ids], ids, strict=False):
        row = logits_after(before)
        flat.logprobs += [row[token], *row]
        flat.token_ids += [token, *range(VOCAB_SIZE)]
    return flat


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `import vllm` find this module's classes."""
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.exceptions": {"VLLMClientError": VLLMClientError, "GracefulHTTPError": GracefulHTTPError},
        "vllm.sampling_params": {
            "SamplingParams": SimpleNamespace,
            "RequestOutputKind": RequestOutputKind,
            "StructuredOutputsParams": SimpleNamespace,
        },
        "vllm.config": {"StructuredOutputsConfig": SimpleNamespace},
        "vllm.engine": {},
        "vllm.engine.arg_utils": {"AsyncEngineArgs": AsyncEngineArgs},
        "vllm.v1": {},
        "vllm.v1.engine.async_llm": {"AsyncLLM": FakeLLM},
        "vllm.v1.engine": {},
        "vllm.v1.engine.exceptions": {"EngineDeadError": EngineDeadError},
    }
    for name, members in contents.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)


@dataclass
class AsyncEngineArgs:
    """Some of vLLM's options."""

    model: str
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None
    scheduling_policy: str = "fcfs"
    max_logprobs: int = 20
    logprobs_mode: str = "raw_logprobs"
    disable_log_stats: bool = False
    structured_outputs_config: Any = None


class Tokenizer:
    """One token per character."""

    chat_template = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(map(chr, ids))


@dataclass
class Call:
    """One call of `generate`."""

    prompt: dict[str, Any]
    params: Any
    request_id: str
    priority: int
    is_closed: bool = False


class FakeLLM:
    """`step` is awaited before every token; `reload` is called by `collective_rpc`. `made`: those made from options.

    `num_processes`: how many processes one starts; with `never_ready` it waits for them until one of them has ended.
    """

    made: ClassVar[list[FakeLLM]] = []
    num_processes: ClassVar[int] = 0
    never_ready: ClassVar[bool] = False

    def __init__(
        self,
        step: Callable[[], Any] | None = None,
        reload: Callable[[str], None] = lambda path: None,
        logprobs_mode: str = "raw_logprobs",
        policy: str = "priority",
        model: str = "fake",
    ) -> None:
        self.model_config = SimpleNamespace(
            model=model, max_model_len=2000, logprobs_mode=logprobs_mode, get_diff_sampling_param=lambda: {"top_k": 7}
        )
        self.scheduler_config = SimpleNamespace(policy=policy)
        self.calls: list[Call] = []
        self.log: list[Any] = []  # of what is not a request
        self.arguments: AsyncEngineArgs | None = None
        self.errored = False
        self.paused, self.resumed = threading.Event(), threading.Event()
        self.is_shut_down = False
        self._step = step or (lambda: asyncio.sleep(0.001))
        self._reload = reload
        self._queues: dict[str, list[Any]] = {}
        self._death = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None  # of the requests

    @classmethod
    def from_engine_args(cls, arguments: AsyncEngineArgs) -> FakeLLM:
        processes = [get_context("spawn").Process(target=time.sleep, args=(600,)) for _ in range(cls.num_processes)]
        for process in processes:
            process.start()
        if cls.never_ready:
            wait([process.sentinel for process in processes])
            raise RuntimeError("Engine core initialization failed")
        llm = cls(logprobs_mode=arguments.logprobs_mode, model=arguments.model)
        llm.arguments = arguments
        cls.made.append(llm)
        return llm

    def get_tokenizer(self) -> Tokenizer:
        return Tokenizer()

    async def generate(
        self, prompt: dict[str, Any], params: Any, request_id: str, *, priority: int = 0
    ) -> AsyncIterator[Any]:
        self._loop = asyncio.get_running_loop()
        call = Call(prompt, params, request_id, priority)
        self.calls.append(call)
        ids = prompt["prompt_token_ids"]
        if max(ids) > 10**6:
            raise VLLMClientError(f"token id {max(ids)} is out of the vocabulary")
        has_logits = self.model_config.logprobs_mode == "raw_logits"
        own = flat_logits(ids) if has_logits else FlatLogprobs([-float(token) for token in ids], ids)
        entries = None if params.prompt_logprobs is None else own
        left: list[Any] = []
        self._queues[request_id] = left
        try:
            for place in range(params.max_tokens):
                step, death = asyncio.ensure_future(self._step()), asyncio.ensure_future(self._death.wait())
                try:
                    await asyncio.wait([step, death], return_when=asyncio.FIRST_COMPLETED)
                finally:
                    step.cancel()
                    death.cancel()
                if self.errored:
                    raise EngineDeadError
                is_last = place == params.max_tokens - 1
                choices = [choice(index, params, [place + index], is_last) for index in range(params.n)]
                if left:
                    choices = [choice(index, params, [place + index, 99], "abort") for index in range(params.n)]
                yield SimpleNamespace(outputs=choices, prompt_logprobs=None if place else entries, num_cached_tokens=0)
                if left:
                    return
        finally:
            call.is_closed = True
            self._queues.pop(request_id, None)

    async def abort(self, request_id: str) -> None:
        if request_id in self._queues:
            self._queues[request_id].append("abort")

    def die(self) -> None:
        """The engine's process ends. Called on any thread, once a request runs."""
        self.errored = True
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._death.set)

    async def collective_rpc(self, method: str, kwargs: dict[str, str]) -> None:
        self.log.append((method, kwargs["weights_path"]))
        if self.errored:
            await asyncio.Event().wait()
        self._reload(kwargs["weights_path"])

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        if self.errored:
            raise EngineDeadError
        self.log.append(("pause", mode, clear_cache))
        self.paused.set()
        if mode == "wait":
            while self._queues:  # noqa: ASYNC110 - polling is simple enough for a stand-in
                await asyncio.sleep(0.001)
        if self.errored:
            await asyncio.Event().wait()

    async def resume_generation(self) -> None:
        self.log.append("resume")
        self.resumed.set()

    async def reset_prefix_cache(self) -> None:
        self.log.append("reset")

    async def update_weight_version(self, version: str) -> None:
        self.log.append(("version", version))

    def shutdown(self, timeout: float | None = None) -> None:
        if self.is_shut_down:
            raise TypeError("'NoneType' object is not callable")  # its modules are empty when the interpreter exits
        self.is_shut_down = True

    def __del__(self) -> None:
        if self.arguments is not None:
            self.shutdown()


def choice(index: int, params: Any, tokens: list[int], end: bool | str) -> SimpleNamespace:
    """What is new of a completion; every token has the log probability of -1 and another one is likelier."""
    entry = SimpleNamespace(logprob=-1.0, rank=2, decoded_token="a")
    likelier = {500: SimpleNamespace(logprob=-0.5, rank=1, decoded_token="b")} if params.logprobs else {}
    return SimpleNamespace(
        index=index,
        text="".join(f" {token}" for token in tokens),
        token_ids=tokens,
        logprobs=None if params.logprobs is None else [{token: entry, **likelier} for token in tokens],
        finish_reason=end if isinstance(end, str) else "length" if end else None,
        stop_reason=None,
    )
