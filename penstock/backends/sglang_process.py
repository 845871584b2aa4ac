"""`start_sglang`: makes SGLang's `Engine` and leaves the process as it was; `SGLang`: the engine while it runs.

Imports SGLang, which takes seconds, only when called, on a thread that is not the main one, so that SGLang can install
no signal handler. Called by `SGLangEngine`.
"""

from __future__ import annotations

import asyncio
import atexit
import inspect
import os
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

from penstock.backends.engine_options import check_installed, check_names
from penstock.backends.engine_start import Processes
from penstock.backends.process_state import restored_process
from penstock.backends.sglang_children import run_detokenizer, run_scheduler
from penstock.errors import ConfigurationError, EngineClosed, described, shown

T = TypeVar("T")
# A higher class preempts a lower one, as in the native engine; grammars are those of the native engine, and a model
# cannot go on with spaces between the parts of JSON.
DEFAULTS: Mapping[str, object] = {
    "priority_scheduling_preemption_threshold": 1,
    "retraction_policy": "priority",
    "grammar_backend": "llguidance",
    "constrained_json_disable_any_whitespace": True,
}
# What this engine relies on, with the reason.
FIXED: Mapping[str, tuple[object, str]] = {
    "enable_priority_scheduling": (True, "without it, SGLang ignores priorities"),
    "schedule_low_priority_values_first": (False, "a higher class is sent as a higher number"),
    "incremental_streaming_output": (False, "an aborted request would repeat its last token"),
    "skip_tokenizer_init": (False, "texts and stop strings need the tokenizer"),
    "weight_version": ("0", "versions are counted here"),
    "dp_size": (1, "the failure of a replica would end this process: make several engines"),
    "tokenizer_worker_num": (1, "requests are tokenized here"),
    "detokenizer_worker_num": (1, "the failure of one would end this process"),
}
# Log probabilities are then the model's, before the temperature. Read by SGLang's processes.
_RAW_LOGPROBS = "SGLANG_RETURN_ORIGINAL_LOGPROB"


def check_options(options: Mapping[str, object]) -> None:
    """Raise `PackageMissing` without SGLang, `ConfigurationError` for options with which this engine would be wrong."""
    check_installed(
        "sglang",
        "SGLang is not installed: pip install sglang, in an environment of its own if its requirements conflict with "
        "yours",
    )
    if "model_path" in options:
        raise ConfigurationError("model_path is the first argument of this engine: leave it out of the options")
    for name, (value, reason) in FIXED.items():
        if options.get(name, value) != value:
            raise ConfigurationError(f"{name}={shown(options[name])} cannot be changed: {reason}")


def dead() -> EngineClosed:
    """The error of everything that waits for a process that has ended."""
    return EngineClosed("a process of SGLang ended: see its messages above, and make a new engine")


class SGLang:
    """A running `Engine` and its processes. All but `close` is called on the event loop that `attach` was called on."""

    def __init__(self, engine: Any, processes: Processes) -> None:
        self.engine = engine
        self.manager = engine.tokenizer_manager  # of which pausing and aborting are methods
        self._processes = processes
        self._death: asyncio.Future[None] | None = None
        self._handling: asyncio.Task[None] | None = None

    def attach(self, on_death: Callable[[], None]) -> None:
        """Handle what the processes send; `on_death` is called once, as soon as one of them ends.

        SGLang would do so by itself, in a task that ends the program where it fails.
        """
        loop = asyncio.get_running_loop()
        self._death = loop.create_future()
        self._death.add_done_callback(lambda death: None if death.cancelled() else on_death())
        self.manager.event_loop = loop
        self._handling = loop.create_task(self.manager.handle_loop())
        self._handling.add_done_callback(self._end_handling)
        for process in self._processes:
            loop.add_reader(process.sentinel, self._die)

    @property
    def is_alive(self) -> bool:
        """Whether all processes run."""
        return self._death is not None and not self._death.done()

    async def answer(self, call: Coroutine[Any, Any, T]) -> T:
        """The result of a call that the processes answer. Raises `EngineClosed` if one ends: SGLang would wait on."""
        assert self._death is not None
        task = asyncio.ensure_future(call)
        try:
            either: list[asyncio.Future[Any]] = [task, self._death]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise dead()
            return task.result()
        finally:
            task.cancel()

    def detach(self) -> None:
        """Expect nothing more of the processes."""
        self._ignore_processes()
        for future in (self._death, self._handling):
            if future is not None:
                future.cancel()

    def close(self) -> None:
        """End the processes. Happens when the program exits, too."""
        atexit.unregister(self.engine.shutdown)
        self.engine.send_to_rpc.close(linger=0)
        self.engine.shutdown()

    def _end_handling(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            task.get_loop().call_exception_handler(
                {"message": "SGLang's outputs cannot be handled", "exception": task.exception()}
            )
        self._die()

    def _die(self) -> None:
        self._ignore_processes()
        if self._death is not None and not self._death.done():
            self._death.set_result(None)

    def _ignore_processes(self) -> None:
        for process in self._processes:
            asyncio.get_running_loop().remove_reader(process.sentinel)


def start_sglang(processes: Processes, model: str, options: Mapping[str, object]) -> SGLang:
    """An `Engine` for a model, with its `processes`. `options` are fields of SGLang's `ServerArgs`.

    Called on a thread without an event loop. Raises `ConfigurationError`.
    """
    with restored_process(), processes.recorded():
        from sglang.srt.server_args import ServerArgs

        check_names("SGLang", options, inspect.signature(ServerArgs).parameters)
        fixed = {name: value for name, (value, _) in FIXED.items()}
        os.environ[_RAW_LOGPROBS] = "1"
        try:
            engine = _new_engine({**DEFAULTS, **options, **fixed, "model_path": model}, processes)
        except Exception as error:
            processes.end()
            raise ConfigurationError(f"SGLang cannot start {model}: {described(error)}") from error
        return SGLang(engine, processes)


def _new_engine(options: Mapping[str, object], processes: Processes) -> Any:
    """The `Engine`, whose processes are `processes`."""
    from sglang.srt.entrypoints import engine as sglang_engine

    class ContainedEngine(sglang_engine.Engine):  # type: ignore[misc]
        run_scheduler_process_func = staticmethod(run_scheduler)
        run_detokenizer_process_func = staticmethod(run_detokenizer)

        def shutdown(self) -> None:  # SGLang's own ends all children of the program
            processes.end()

    configure_logger = sglang_engine.configure_logger
    sglang_engine.configure_logger = lambda *_, **__: None  # it would replace the handlers of the root logger
    try:
        engine = ContainedEngine(**options)
    finally:
        sglang_engine.configure_logger = configure_logger
    engine.tokenizer_manager._subprocess_watchdog.stop()  # it ends the program when a process ends
    engine.loop.close()  # of this thread, for the calls that block
    asyncio.set_event_loop(None)
    return engine
