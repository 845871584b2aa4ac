"""`LLM`: the engine for scripts and notebooks. Blocks, returns all results at once, shows a progress bar.

A thin facade of `InferenceEngine`: it never schedules, samples or caches.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Unpack, overload

from penstock.api.blocking import entered, refuse_inside_update, run
from penstock.api.handle import RequestHandle
from penstock.api.logprob_report import LogprobReport
from penstock.api.prompt import Message, Prompt, as_batch
from penstock.api.protocols import Completion
from penstock.api.stats import EngineStats
from penstock.api.weights import SleepLevel, UpdateMode, WeightSource
from penstock.config import EngineSettings
from penstock.engine.inference import InferenceEngine
from penstock.errors import RequestError
from penstock.facades.engine_args import EngineArguments, engine_config
from penstock.generation import Params
from penstock.outputs import EmbeddingOutput, RequestOutput
from penstock.sampling import SamplingParams
from penstock.scores import DifferentiableScore, Score
from penstock.values import items

_DEFAULTS: EngineSettings = {
    "seed": 0,
    "max_batch_size": 256,
    "max_sequence_length": None,
    "gpu_memory_utilization": 0.9,
    "max_queue_size": 1_000_000,
    "batch_timeout_ms": 5.0,
}


class LLM:
    """Offline generation with one model, loaded by the constructor.

    Takes the keyword arguments of `EngineConfig`, and vLLM's names for them. Its defaults suit batches: seed 0, at most
    256 running sequences, the model's full length, 0.9 of the available memory, a practically unlimited queue. Raises
    `ConfigurationError` (a ValueError) for an invalid model or setting, `OutOfMemory` (a RuntimeError).
    """

    def __init__(self, model: object = None, tokenizer: object = None, **settings: Unpack[EngineArguments]) -> None:
        self.engine = InferenceEngine(model, tokenizer, engine_config(settings, _DEFAULTS))
        self.engine.start()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params | Sequence[Params] = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generate for one prompt or a list of prompts; results are in the order of the prompts.

        `sampling_params` is one object for all prompts, or a list with one for each. Cancels the remaining requests and
        raises the first failed request's error. Raises `EngineStateError` inside `with llm.updating():`, as do all
        calls that wait for requests.
        """
        refuse_inside_update(self.engine)
        batch = as_batch(prompts)
        params = _as_params(sampling_params, len(batch))
        handles = [self.engine.generate(prompt, p) for prompt, p in zip(batch, params, strict=True)]
        try:
            return [handle.result() for handle in _progress(handles, use_tqdm)]
        finally:
            for handle in handles:  # a kept exception would keep this frame, and with it the handles
                handle.cancel()

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        tools: Sequence[object] | None = None,
        documents: Sequence[object] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
    ) -> list[RequestOutput]:
        """Generate the reply to one conversation (a list of messages), or to each of several.

        The keywords are passed to the chat template; `chat_template_kwargs` are further variables of it
        (`enable_thinking`). A last message from the assistant is continued, unless `continue_final_message=False`.
        """
        several = isinstance(messages, list | tuple) and len(messages) > 0 and isinstance(messages[0], list)
        optional = {
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "chat_template_kwargs": chat_template_kwargs,
        }
        options = {name: value for name, value in optional.items() if value is not None}
        conversations = messages if several else [messages]
        prompts: list[Prompt] = [{"messages": conversation, **options} for conversation in conversations]
        return self.generate(prompts, sampling_params, use_tqdm)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: str = "mean",
        dimensions: int | None = None,
        normalize: bool = True,
    ) -> list[EmbeddingOutput]:
        """`InferenceEngine.embed`, which see; blocks until all prompts are embedded."""
        refuse_inside_update(self.engine)
        return run(self.engine.embed(prompts, pooling=pooling, dimensions=dimensions, normalize=normalize))

    def updating(self, mode: UpdateMode = "abort", *, stale_kv: bool = False) -> AbstractContextManager[None]:
        """`InferenceEngine.updating` for a `with` block: `with llm.updating(): optimizer.step()`."""
        return entered(self.engine.updating(mode, stale_kv=stale_kv), self.engine)

    def update_weights(self, source: WeightSource = None, *, mode: UpdateMode = "abort", stale_kv: bool = False) -> int:
        """`InferenceEngine.update_weights`, which see; blocks until the weights are in force."""
        return run(self.engine.update_weights(source, mode=mode, stale_kv=stale_kv))

    @property
    def weight_version(self) -> int:
        """The version of the weights that steps run with."""
        return self.engine.weight_version

    def pause(self, mode: UpdateMode = "abort") -> None:
        """`InferenceEngine.pause`; blocks until no step runs."""
        run(self.engine.pause(mode))

    def resume(self) -> None:
        """`InferenceEngine.resume`."""
        run(self.engine.resume())

    def sleep(self, level: SleepLevel = "all", *, mode: UpdateMode = "abort") -> None:
        """`InferenceEngine.sleep`; blocks until the memory is released."""
        run(self.engine.sleep(level, mode=mode))

    def wake(self) -> None:
        """`InferenceEngine.wake`; blocks until requests are served again."""
        run(self.engine.wake())

    @overload
    def score(
        self, prompts: Prompt | Sequence[Prompt], completions: Completion | Sequence[Completion], *,
        params: Params = None, logits: bool = False, entropies: bool = False, adapter: str = "",
        requires_grad: Literal[False] = False,
    ) -> list[Score]: ...  # fmt: skip

    @overload
    def score(
        self, prompts: Prompt | Sequence[Prompt], completions: Completion | Sequence[Completion], *,
        params: Params = None, requires_grad: Literal[True], values: Literal["module", "engine"] = "module",
        checkpoint_layers: bool = False,
    ) -> list[DifferentiableScore]: ...  # fmt: skip

    def score(
        self, prompts: Prompt | Sequence[Prompt], completions: Completion | Sequence[Completion], *,
        params: Params = None, logits: bool = False, entropies: bool = False, adapter: str = "",
        requires_grad: bool = False, values: Literal["module", "engine"] = "module", checkpoint_layers: bool = False,
    ) -> list[Score] | list[DifferentiableScore]:  # fmt: skip
        """`InferenceEngine.score`, which see; blocks until all completions are scored."""
        refuse_inside_update(self.engine)
        options: dict[str, Any] = {"params": params, "logits": logits, "entropies": entropies, "adapter": adapter}
        options |= {"requires_grad": requires_grad, "values": values, "checkpoint_layers": checkpoint_layers}
        scores: list[Score] | list[DifferentiableScore] = run(self.engine.score(prompts, completions, **options))
        return scores

    def check_logprobs(self, outputs: RequestOutput | Sequence[RequestOutput] | None = None) -> LogprobReport:
        """`InferenceEngine.check_logprobs`, which see; blocks until the module has computed."""
        return run(self.engine.check_logprobs(outputs))

    def get_tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The parameters recommended by the model's own generation config."""
        return self.engine.default_params()

    def get_stats(self) -> EngineStats:
        """The engine's statistics."""
        return self.engine.get_stats()

    def stop(self) -> None:
        """Free the model and its memory; also happens when the object is dropped."""
        self.engine.stop(0.0)


def _as_params(params: Params | Sequence[Params], count: int) -> list[Params]:
    if not isinstance(params, Sequence):
        return [params] * count
    listed = list(items("sampling_params", params))
    if len(listed) != count:
        raise RequestError(f"{len(listed)} sampling_params for {count} prompts: pass one for all, or one for each")
    return listed


def _progress(handles: list[RequestHandle], show: bool) -> Iterable[RequestHandle]:
    """A progress bar, on a terminal only: creating one sets the start method of `multiprocessing` globally."""
    if not show or sys.stderr is None or not sys.stderr.isatty():
        return handles
    from tqdm import tqdm

    return tqdm(handles, desc="Processed prompts", unit="req", dynamic_ncols=True)
