"""A stand-in for SGLang: the modules that `penstock.backends` imports of it, and an `Engine` that counts up.

`tests/integration/backends/test_sglang_source.py` compares the signatures here with those of the real package. Where
SGLang has rules that matter here, it has them too: chunks repeat what came before, an abort hands out what is left, a
call into a dead process never returns, `shutdown` and the watchdog end more than they should.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from multiprocessing.connection import wait
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, Literal

import pytest

from tests.unit.backends.fake_vllm import Tokenizer

VOCAB_SIZE = 1000


@dataclass
class PauseGenerationReqInput:
    mode: Literal["abort", "retract", "in_place"] = "abort"


@dataclass
class ContinueGenerationReqInput:
    pass


@dataclass
class UpdateWeightFromDiskReqInput:
    model_path: str
    weight_version: str | None = None
    flush_cache: bool = True


@dataclass
class ServerArgs:
    """Some of SGLang's options."""

    model_path: str
    dtype: str = "auto"
    tp_size: int = 1
    dp_size: int = 1
    mem_fraction_static: float | None = None
    context_length: int | None = None
    enable_priority_scheduling: bool = False
    schedule_low_priority_values_first: bool = False
    priority_scheduling_preemption_threshold: int = 10
    retraction_policy: str = "length"
    grammar_backend: str | None = None
    constrained_json_disable_any_whitespace: bool = False
    enable_deterministic_inference: bool = False
    incremental_streaming_output: bool = False
    skip_tokenizer_init: bool = False
    weight_version: str = "default"
    enable_lora: bool | None = None
    max_lora_rank: int | None = None
    lora_target_modules: list[str] | None = None
    tokenizer_worker_num: int = 1
    detokenizer_worker_num: int = 1


class RWLock:
    """Requests hold it for reading."""

    def __init__(self) -> None:
        self.num_readers = 0

    @property
    def writer_lock(self) -> Any:
        return self._writing()

    @asynccontextmanager
    async def _writing(self) -> AsyncIterator[None]:
        while self.num_readers:  # noqa: ASYNC110 - polling is simple enough for a stand-in
            await asyncio.sleep(0.001)
        yield


class TokenizerManager:
    """`log` has what is not a request; `step` is awaited before every token."""

    def __init__(self, server_args: ServerArgs) -> None:
        self.tokenizer = Tokenizer()
        self.context_len = server_args.context_length or 2000
        self.model_config = SimpleNamespace(
            vocab_size=VOCAB_SIZE, get_default_sampling_params=lambda: {"top_k": 7, "temperature": 0.5}
        )
        self.model_update_lock = RWLock()
        self.event_loop: asyncio.AbstractEventLoop | None = None
        self.weight_version = server_args.weight_version
        self._subprocess_watchdog = SimpleNamespace(stop=lambda: self.log.append("watchdog stopped"))
        self.log: list[Any] = []
        self.calls: list[dict[str, Any]] = []
        self.closed: list[str] = []
        self.step: Callable[[], Any] = lambda: asyncio.sleep(0.001)
        self.load: Callable[[str], bool] = lambda path: True
        self.is_idle = True
        self._aborted: set[str] = set()
        self._resumed: asyncio.Event | None = None

    async def handle_loop(self) -> None:
        await asyncio.Event().wait()

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        self._aborted |= {call["rid"] for call in self.calls} if abort_all else {rid}

    async def pause_generation(self, obj: PauseGenerationReqInput) -> None:
        self.log.append(("pause", obj.mode))
        if obj.mode == "abort":
            self.abort_request(abort_all=True)
        self._resumed = asyncio.Event()

    async def continue_generation(self, obj: ContinueGenerationReqInput) -> None:
        self.log.append("continue")
        if self._resumed is not None:
            self._resumed.set()
            self._resumed = None

    async def update_weights_from_disk(
        self, obj: UpdateWeightFromDiskReqInput, request: Any = None
    ) -> tuple[bool, str, int]:
        self.log.append(("load", obj.model_path, obj.weight_version))
        if not self.load(obj.model_path):
            return False, "no such layer", 0
        assert obj.weight_version is not None
        self.weight_version = obj.weight_version
        return True, "", 0

    async def flush_cache(self, timeout_s: float | None = None) -> Any:
        self.log.append("flush")
        return SimpleNamespace(success=self.is_idle, message="" if self.is_idle else "2 requests are running")

    async def generate_request(self, call: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        if max(call["input_ids"]) == 13:
            raise ValueError("an unlucky token")
        self.calls.append(call)
        self.model_update_lock.num_readers += 1
        try:
            async for chunk in self._count(call):
                yield chunk
        finally:
            self.model_update_lock.num_readers -= 1
            self.closed.append(call["rid"])

    async def _count(self, call: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        params, ids, meta = call["sampling_params"], list[int](), {"finish_reason": None, "cached_tokens": 3}
        meta |= {"weight_version": "0", "output_token_logprobs": [], "output_top_logprobs": []} | prompt_entries(call)
        spans: list[dict[str, Any]] = []
        if refused := params.get("regex") == "(" or (params.get("stop") or [""])[0] == "overload":
            words, status = ("invalid grammar", 400) if params.get("regex") else ("The request queue is full.", 503)
            reason = {"type": "abort", "message": words, "status_code": status}
            yield {"text": "", "output_ids": [], "meta_info": meta | {"finish_reason": reason}}
        if not params["max_new_tokens"]:
            yield {"text": "", "output_ids": [], "meta_info": meta | {"finish_reason": {"type": "length", "length": 0}}}
        for place in () if refused else range(params["max_new_tokens"]):
            await self.step()
            while self._resumed is not None:
                await self._resumed.wait()
            is_aborted = call["rid"] in self._aborted
            ids += [place, 99] if is_aborted else [place]
            spans.append({"version": self.weight_version, "start": place, "end": len(ids)})
            for token in ids[place:]:
                meta["output_token_logprobs"].append((-1.0, token, None))
                meta["output_top_logprobs"].append([(-0.5, 500, None), (-1.0, token, None)])
            is_last = place == params["max_new_tokens"] - 1
            reason = {"type": "length", "length": len(ids)} if is_last else None
            reason = {"type": "abort", "message": "Aborted", "status_code": None} if is_aborted else reason
            more = {"weight_versions": spans} if len({span["version"] for span in spans}) > 1 else {}
            own = {"weight_version": self.weight_version, "finish_reason": reason}
            text = "".join(f" {token}" for token in ids)
            yield {"text": text, "output_ids": ids, "meta_info": {**meta, **own, **more}}
            if is_aborted:
                return


def prompt_entries(call: dict[str, Any]) -> dict[str, Any]:
    """The log probability of a token is its negative number; of those of the whole vocabulary, it is all the same."""
    start = call["logprob_start_len"]
    if start < 0:
        return {}
    own = [(None if place == start else -float(token), token, None) for place, token in enumerate(call["input_ids"])]
    count = call["top_logprobs_num"]
    row = [(-1.0 / (1 + token), token, None) for token in range(count)]
    tops = [None] + [row] * (len(own) - start - 1)
    return {"input_token_logprobs": own[start:]} | ({"input_top_logprobs": tops} if count else {})


def run_scheduler_process(*arguments: Any) -> None:
    pass


def run_detokenizer_process(*arguments: Any) -> None:
    pass


def configure_logger(server_args: Any, prefix: str = "") -> None:
    logging.basicConfig(level="ERROR", force=True)


class Engine:
    """`made`: all that were made; `num_processes`: how many processes an engine starts.

    With `never_ready` it waits for them until one of them has ended.
    """

    made: ClassVar[list[Engine]] = []
    num_processes: ClassVar[int] = 0
    never_ready: ClassVar[bool] = False
    fault: ClassVar[str] = ""
    run_scheduler_process_func: Any = staticmethod(run_scheduler_process)
    run_detokenizer_process_func: Any = staticmethod(run_detokenizer_process)

    def __init__(self, **kwargs: Any) -> None:
        self.server_args = ServerArgs(**kwargs)
        atexit.register(self.shutdown)
        sys.modules["sglang.srt.entrypoints.engine"].configure_logger(self.server_args)  # type: ignore[attr-defined]
        multiprocessing.set_start_method("spawn", force=True)
        os.environ["SGLANG_RUN_ID"] = "fake"
        self.environment = dict(os.environ)
        self._launch_scheduler_processes(self.server_args, None, self.run_scheduler_process_func)
        self._launch_detokenizer_subprocesses(
            server_args=self.server_args,
            port_args=None,
            run_detokenizer_process_func=self.run_detokenizer_process_func,
        )
        if self.fault:
            raise RuntimeError(self.fault)
        self.tokenizer_manager = TokenizerManager(self.server_args)
        self.send_to_rpc = SimpleNamespace(close=lambda linger=None: None)
        self.loop = asyncio.new_event_loop()
        asyncio.set_event_loop(self.loop)
        self.made.append(self)

    @classmethod
    def _launch_scheduler_processes(
        cls, server_args: Any, port_args: Any, run_scheduler_process_func: Any, *, placement_group: Any = None
    ) -> tuple[Any, list[Any]]:
        context = multiprocessing.get_context("spawn")
        processes = [context.Process(target=time.sleep, args=(60,)) for _ in range(cls.num_processes)]
        for process in processes:
            process.start()
        if cls.never_ready:
            wait([process.sentinel for process in processes])
            raise RuntimeError("scheduler died")
        return None, processes

    @classmethod
    def _launch_detokenizer_subprocesses(
        cls, server_args: Any, port_args: Any, run_detokenizer_process_func: Any
    ) -> tuple[list[Any], list[str]]:
        return [], []

    async def async_generate(
        self,
        prompt: str | None = None,
        sampling_params: dict[str, Any] | None = None,
        input_ids: list[int] | None = None,
        return_logprob: bool = False,
        logprob_start_len: int | None = None,
        top_logprobs_num: int | None = None,
        stream: bool = False,
        lora_path: str | None = None,
        rid: str | None = None,
        priority: int | None = None,
        *,
        cache_salt: str | None = None,
    ) -> Any:
        call = {name: value for name, value in locals().items() if name != "self"}
        return self.tokenizer_manager.generate_request(call)

    async def async_load_lora_adapter(self, lora_name: str, lora_path: str, pinned: bool = False) -> Any:
        self.tokenizer_manager.log.append(("load", lora_name, lora_path))
        is_known = self.server_args.enable_lora
        return SimpleNamespace(success=is_known, error_message=None if is_known else "LoRA is not enabled")

    async def async_unload_lora_adapter(self, lora_name: str) -> Any:
        manager = self.tokenizer_manager
        calls = [call for call in manager.calls if call["lora_path"] == lora_name]
        while any(call["rid"] not in manager.closed for call in calls):  # noqa: ASYNC110 - simple enough here
            await asyncio.sleep(0.001)
        manager.log.append(("unload", lora_name))
        return SimpleNamespace(success=True, error_message=None)

    def shutdown(self) -> None:
        raise AssertionError("it would end all children of the program")


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `import sglang` find this module's classes."""
    Engine.made.clear()
    contents: dict[str, dict[str, Any]] = {
        "sglang": {},
        "sglang.srt": {},
        "sglang.srt.entrypoints": {},
        "sglang.srt.entrypoints.engine": {"Engine": Engine, "configure_logger": configure_logger},
        "sglang.srt.managers": {},
        "sglang.srt.managers.io_struct": {
            "PauseGenerationReqInput": PauseGenerationReqInput,
            "ContinueGenerationReqInput": ContinueGenerationReqInput,
            "UpdateWeightFromDiskReqInput": UpdateWeightFromDiskReqInput,
        },
        "sglang.srt.managers.scheduler": {"run_scheduler_process": run_scheduler_process},
        "sglang.srt.managers.detokenizer_manager": {"run_detokenizer_process": run_detokenizer_process},
        "sglang.srt.server_args": {"ServerArgs": ServerArgs},
    }
    for name, members in contents.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            parent, _, child = name.rpartition(".")
            monkeypatch.setattr(sys.modules[parent], child, module, raising=False)
