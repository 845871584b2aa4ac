"""`LLM`: the engine for scripts and notebooks. Blocks, returns everything at once, shows a progress bar.

A thin face over `InferenceEngine`: it owns no scheduling, sampling or caching.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from penstock.api.handle import RequestHandle
from penstock.api.prompt import Prompt
from penstock.engine.inference import InferenceEngine
from penstock.errors import RequestError, described
from penstock.facades.engine_args import engine_config
from penstock.generation import Params
from penstock.outputs import RequestOutput
from penstock.sampling import SamplingParams
from penstock.values import items, plain

_DEFAULTS = {
    "seed": 0,
    "max_batch_size": 256,
    "max_sequence_length": None,
    "gpu_memory_utilization": 0.9,
    "max_queue_size": 1_000_000,
    "batch_timeout_ms": 5.0,
}


class LLM:
    """Offline generation with one model; loads it at once.

    Takes the keyword arguments of `EngineConfig`, and vLLM's names for them. Its own defaults suit batches: seed 0, 256
    sequences at once, the model's full length, 0.9 of the memory that is there, a queue without practical limit.
    Raises `ConfigurationError` (a ValueError) for a bad model or setting, `OutOfMemory` (a RuntimeError).
    """

    def __init__(self, model: Any = None, tokenizer: Any = None, **settings: Any) -> None:
        self.engine = InferenceEngine(model, tokenizer, engine_config(settings, _DEFAULTS))
        self.engine.start()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params | Sequence[Params] = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generate for one prompt or a list of them; results in the order of the prompts.

        `sampling_params` is one for all, or a list with one for each. Raises the first request's error after
        cancelling the rest.
        """
        batch = _as_batch(prompts)
        params = _as_params(sampling_params, len(batch))
        handles = [self.engine.generate(prompt, p) for prompt, p in zip(batch, params, strict=True)]
        try:
            return [handle.result() for handle in _progress(handles, use_tqdm)]
        finally:
            for handle in handles:  # whoever keeps the exception keeps this frame, and with it the handles
                handle.cancel()

    def chat(self, messages: Any, sampling_params: Params = None, use_tqdm: bool = True) -> list[RequestOutput]:
        """Generate the reply to a conversation (a list of messages), or to each of several."""
        several = isinstance(messages, list | tuple) and len(messages) > 0 and isinstance(messages[0], list)
        return self.generate(messages if several else [messages], sampling_params, use_tqdm)

    def get_tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's own generation config recommends."""
        return self.engine.default_params()

    def get_stats(self) -> dict[str, Any]:
        """The engine's figures."""
        return self.engine.get_stats()

    def stop(self) -> None:
        """Free the model and its memory; also happens when the object is dropped."""
        self.engine.stop(0.0)


def _as_batch(prompts: Any) -> list[Prompt]:
    """One prompt or many: a string, a mapping, token ids or one conversation is a single prompt."""
    try:
        return [prompts] if _is_single(prompts) else list(prompts)
    except Exception as error:
        raise RequestError(f"prompts must be a prompt or a list of them ({described(error)})") from error


def _is_single(prompts: Any) -> bool:
    if prompts is None or isinstance(prompts, str | bytes | dict):
        return True
    first = plain(prompts[0]) if len(prompts) > 0 else None
    return isinstance(first, int) or (isinstance(first, dict) and "role" in first)


def _as_params(params: Any, count: int) -> list[Params]:
    if isinstance(params, Sequence):
        each = list(items("sampling_params", params))
        if len(each) != count:
            raise RequestError(f"{len(each)} sampling_params for {count} prompts: pass one for all, or one for each")
        return each
    return [params] * count


def _progress(handles: list[RequestHandle], show: bool) -> Iterable[RequestHandle]:
    """A bar on a terminal only: making one sets the start method of `multiprocessing` for the whole program."""
    if not show or sys.stderr is None or not sys.stderr.isatty():
        return handles
    from tqdm import tqdm

    return tqdm(handles, desc="Processed prompts", unit="req", dynamic_ncols=True)
