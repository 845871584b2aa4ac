"""What `InferenceModule` needs of an engine: `InferenceBackend`, and `EngineBackend`, which fills most of it.

An `EngineBackend` generates and scores with any engine that does; a subclass makes the engine. Never caches. May be
called from any number of threads, whose requests form one batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol, TypeVar

from penstock.api.blocking import blocking, entered, refuse_inside_update, run
from penstock.api.prompt import Prompt, as_batch
from penstock.api.protocols import Completion, Engine, PrefixCaching, Scorer, Templated, Trainable, WithAdapters
from penstock.api.weights import UpdateMode
from penstock.cache.responses import Unfreezable, frozen
from penstock.errors import RequestError
from penstock.outputs import RequestOutput
from penstock.sampling import SamplingParams
from penstock.scores import FloatArray
from penstock.training.parameters import ENGINE_OPTIONS, sampling_params, seeded
from penstock.training.results import GenerationResult, result_of
from penstock.values import items, text

T = TypeVar("T")
Prompts = Prompt | Sequence[Prompt]
Responses = Completion | Sequence[Completion]
RowScorer = Callable[[list[Prompt], list[Completion]], Awaitable[Sequence[FloatArray | None]]]
Tensor = Any  # a torch.Tensor; importing torch with the package would take seconds


class InferenceBackend(ABC):
    """Generates, and scores what was generated. Every method may be called from any thread."""

    @abstractmethod
    def generate(self, prompts: Prompts, **options: Any) -> GenerationResult:
        """Completions of one prompt or of a list of prompts. Blocks."""

    @abstractmethod
    def get_logits(self, prompts: Prompts, responses: Responses, *, return_mask: bool = False) -> Tensor:
        """Raw logits before each token of each response, float32 [responses, longest, vocab], 0.0 behind their ends.

        With `return_mask`, a pair of these and a bool tensor [responses, longest] that is True up to the ends.
        """

    @abstractmethod
    def get_logprobs(self, prompts: Prompts, responses: Responses, *, return_mask: bool = False) -> Tensor:
        """The log probability of each token of each response, float32 [responses, longest], as `get_logits`."""

    async def agenerate(self, prompts: Prompts, **options: Any) -> GenerationResult:
        """`generate` without blocking the event loop."""
        return await _on_thread(partial(self.generate, prompts, **options))

    async def aget_logits(self, prompts: Prompts, responses: Responses, *, return_mask: bool = False) -> Tensor:
        """`get_logits` without blocking the event loop."""
        return await _on_thread(partial(self.get_logits, prompts, responses, return_mask=return_mask))

    async def aget_logprobs(self, prompts: Prompts, responses: Responses, *, return_mask: bool = False) -> Tensor:
        """`get_logprobs` without blocking the event loop."""
        return await _on_thread(partial(self.get_logprobs, prompts, responses, return_mask=return_mask))

    @property
    def weight_version(self) -> int:
        """The number of weight updates so far; no result of one version is returned for another."""
        return 0

    def adapter_generation(self, name: str) -> int:
        """A number that is new with every load of this adapter; no result of one load is returned for another."""
        return 0

    def load_adapter(self, name: str, source: object) -> None:
        """Load a LoRA adapter, or replace it, from a folder or a live module. Blocks. Raises `RequestError`."""
        raise RequestError("this backend takes no adapters: use the huggingface backend")

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises `RequestError`."""
        raise RequestError("this backend takes no adapters: use the huggingface backend")

    @property
    def chat_template(self) -> str | None:
        """The tokenizer's chat template, if there is one."""
        return None

    def updating(self, mode: UpdateMode = "abort") -> AbstractContextManager[None]:
        """A `with` block in which the weights are changed in place. Raises `RequestError` where they cannot be."""
        raise RequestError("the weights of this backend cannot be changed in place")

    def clear_cache(self) -> None:
        """Reuse nothing that was computed so far."""
        return None

    def close(self) -> None:
        """Free the model."""
        return None


class ScoringEngine(Engine, Scorer, Protocol):
    """An engine that generates and scores."""


class EngineBackend(InferenceBackend):
    """A backend over `engine`."""

    def __init__(self, engine: ScoringEngine) -> None:
        self.engine = engine

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, which two threads must not use at once; None if the engine has none."""
        return self.engine.tokenizer if isinstance(self.engine, Templated) else None

    @property
    def device(self) -> str:
        """The device of the tensors that are returned."""
        return "cpu"

    async def agenerate(
        self,
        prompts: Prompts,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = -1,
        do_sample: bool = True,
        num_return_sequences: int = 1,
        return_logits: bool = False,
        return_logprobs: bool = False,
        **options: Any,
    ) -> GenerationResult:
        """Completions of one prompt or of a list of prompts, `num_return_sequences` of each; `generate` blocks.

        `do_sample=False` and `temperature=0` are greedy. `options` are further fields of `SamplingParams`, such as
        `stop`, `seed` and `min_p`, and `priority`, `deadline`, `namespace` and `adapter` of `Engine.generate`. Equal
        prompts of one call are sampled independently, with a seed too. Raises `TypeError` for unknown options,
        `RequestError`, and whatever awaiting a request raises.
        """
        engine_options = {name: options.pop(name) for name in ENGINE_OPTIONS & options.keys()}
        adapter = self._adapter_options(engine_options.pop("adapter", ""))
        engine_options |= adapter
        length, count = max_new_tokens, num_return_sequences
        params = sampling_params(length, temperature, top_p, top_k, do_sample, count, **options)
        result = result_of(await self._outputs(prompts, params, engine_options), with_logprobs=return_logprobs)
        if return_logprobs and any(map(len, result.token_ids)) and not any(map(len, result.logprobs or [])):
            # An engine that returns logits returns no log probabilities beside its tokens.
            result.logprobs = await self.ascore(*_pairs(result), logits=False, **adapter)
        if return_logits:
            result.logits = await self.ascore(*_pairs(result), logits=True, **adapter)
        return result

    async def aget_logits(
        self, prompts: Prompts, responses: Responses, *, return_mask: bool = False, adapter: str = ""
    ) -> Tensor:
        """`get_logits`, which blocks."""
        return self._tensor(await self.ascore(prompts, responses, logits=True, adapter=adapter), return_mask)

    async def aget_logprobs(
        self, prompts: Prompts, responses: Responses, *, return_mask: bool = False, adapter: str = ""
    ) -> Tensor:
        """`get_logprobs`, which blocks."""
        return self._tensor(await self.ascore(prompts, responses, logits=False, adapter=adapter), return_mask)

    async def ascore(
        self, prompts: Prompts, responses: Responses, *, logits: bool, adapter: str = ""
    ) -> list[FloatArray | None]:
        """The raw logits [R, vocab] or log probabilities [R] of each response of R tokens; None for an empty one."""
        refuse_inside_update(self.engine)
        options: Any = {"logits": logits} | self._adapter_options(adapter)

        async def score(batch: list[Prompt], completions: list[Completion]) -> Sequence[FloatArray | None]:
            scores = await self.engine.score(batch, completions, **options)
            return [score.logits if logits else score.logprobs for score in scores]

        return await self._rows(prompts, responses, score)

    async def _rows(self, prompts: Prompts, responses: Responses, score: RowScorer) -> list[FloatArray | None]:
        """What `score` returns of all responses that are not empty."""
        batch, completions = as_batch(prompts), as_responses(responses)
        if len(batch) != len(completions):
            raise RequestError(f"{len(completions)} responses for {len(batch)} prompts: pass one for each")
        numbers = [number for number, completion in enumerate(completions) if len(completion) > 0]
        rows: list[FloatArray | None] = [None] * len(batch)
        if numbers:
            scored = [batch[i] for i in numbers], [completions[i] for i in numbers]
            for number, row in zip(numbers, await score(*scored), strict=True):
                rows[number] = row
        return rows

    async def adistributions(self, prompts: Prompts, responses: Responses) -> list[FloatArray | None]:
        """[R, vocab] for each response of R tokens, whose softmax is the model's distribution; None for an empty one.

        The logits, unless the engine has log probabilities only.
        """
        return await self.ascore(prompts, responses, logits=True)

    async def ascore_with_gradients(self, prompts: Prompts, responses: Responses, *, logits: bool) -> list[Tensor]:
        """`ascore` as tensors with gradients; an empty response has an empty one.

        Raises `RequestError` where there are none.
        """
        raise RequestError("this engine computes no gradients: use the huggingface backend, in one process")

    # mypy expects `self` to be of the base class.
    generate = blocking(agenerate)  # type: ignore[arg-type]
    get_logits = blocking(aget_logits)  # type: ignore[arg-type]
    get_logprobs = blocking(aget_logprobs)  # type: ignore[arg-type]

    @property
    def weight_version(self) -> int:
        return int(getattr(self.engine, "weight_version", 0))

    @property
    def chat_template(self) -> str | None:
        template = getattr(self.tokenizer, "chat_template", None)
        return template if isinstance(template, str) else None

    def adapter_generation(self, name: str) -> int:
        return self.engine.adapter_generation(name) if isinstance(self.engine, WithAdapters) else 0

    def load_adapter(self, name: str, source: object) -> None:
        if not isinstance(self.engine, WithAdapters):
            return super().load_adapter(name, source)
        return run(self.engine.load_adapter(name, source))

    def unload_adapter(self, name: str) -> None:
        if not isinstance(self.engine, WithAdapters):
            return super().unload_adapter(name)
        return run(self.engine.unload_adapter(name))

    def updating(self, mode: UpdateMode = "abort") -> AbstractContextManager[None]:
        if not isinstance(self.engine, Trainable):
            return super().updating(mode)
        return entered(self.engine.updating(mode), self.engine)

    def clear_cache(self) -> None:
        if isinstance(self.engine, PrefixCaching):
            self.engine.reset_prefix_cache()

    def close(self) -> None:
        self.engine.stop(0.0)

    async def _outputs(
        self, prompts: Prompts, params: SamplingParams, engine_options: dict[str, Any]
    ) -> list[RequestOutput]:
        """The output of each prompt. If one fails or the caller is cancelled, none runs on."""
        refuse_inside_update(self.engine)
        batch = as_batch(prompts)
        all_params = [seeded(params, ordinal) for ordinal in _ordinals(batch)]
        handles = [self.engine.generate(*pair, **engine_options) for pair in zip(batch, all_params, strict=True)]
        try:
            return [await handle for handle in handles]
        finally:
            for handle in handles:
                handle.cancel()

    def _adapter_options(self, adapter: str) -> dict[str, str]:
        """The adapter as an option of requests; none for "". Raises `RequestError` where the engine takes none."""
        if not text("adapter", adapter):
            return {}
        if not isinstance(self.engine, WithAdapters):
            raise RequestError("this engine takes no adapters: use the huggingface backend, or leave adapter out")
        return {"adapter": adapter}

    def _tensor(self, rows: list[FloatArray | None], return_mask: bool) -> Tensor:
        from penstock.training.tensors import padded

        values, mask = padded(rows, self.device)
        return (values, mask) if return_mask else values


async def _on_thread(function: Callable[[], T]) -> T:
    """The result of a function that blocks."""
    from anyio import to_thread  # imported here, because the native engine needs no thread

    return await to_thread.run_sync(function)


def _pairs(result: GenerationResult) -> tuple[list[list[int]], list[list[int]]]:
    """The ids of the prompt and of the response of each row of a result."""
    return result.metadata["prompt_token_ids"], result.token_ids


def _ordinals(prompts: Sequence[Prompt]) -> list[int]:
    """For each prompt, how many equal ones stand before it."""
    counts: Counter[Hashable] = Counter()
    ordinals = []
    for prompt in prompts:
        try:
            key = frozen(prompt)
        except Unfreezable:
            key = object()
        ordinals.append(counts[key])
        counts[key] += 1
    return ordinals


def as_responses(responses: Responses) -> list[Completion]:
    """The responses as a list: a text, or token ids, are a single one."""
    if isinstance(responses, str):
        return [responses]
    listed = list(items("responses", responses))
    is_single = bool(listed) and not hasattr(listed[0], "__len__")
    return [listed] if is_single else listed
