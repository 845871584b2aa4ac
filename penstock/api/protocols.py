"""The capabilities of an engine, one protocol each; `Forking` stands beside the handle that uses it.

An engine implements only the protocols of what it can do. Code that makes no engine is written against them.
`penstock.testing.contract` tests any `Engine`; `tests/unit/testing/echo.py` is a small one to start from.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

from penstock.api.handle import RequestHandle
from penstock.api.prompt import Prompt
from penstock.api.weights import SleepLevel, UpdateMode, WeightSource
from penstock.generation import Params
from penstock.outputs import Delta, EmbeddingOutput
from penstock.sampling import RequestPriority, SamplingParams
from penstock.scores import Score

Callback = Callable[[Delta], Awaitable[None] | None]
Completion = str | Sequence[int]  # a text without special tokens, or token ids


class Engine(Protocol):
    """Generates text for many callers at once."""

    def generate(
        self,
        prompt: Prompt,
        params: Params = None,
        *,
        request_id: str | None = None,
        priority: RequestPriority = RequestPriority.NORMAL,
        deadline: float | None = None,
        ttft_deadline: float | None = None,
        namespace: str = "",
        callback: Callback | None = None,
    ) -> RequestHandle:
        """Submit a request at once, from any thread or event loop; await the handle, or iterate over it.

        Raises `RequestError`, `EngineOverloaded`, `EngineClosed`.
        """
        ...

    def abort(self, request_id: str) -> None:
        """End a request; unknown and ended ids are ignored."""
        ...

    def start(self) -> None:
        """Start serving; blocks until ready."""
        ...

    def stop(self, drain: float = 30.0) -> None:
        """Serve accepted requests for at most `drain` seconds, abort the others, free all resources."""
        ...

    def get_stats(self) -> Mapping[str, object]:
        """Statistics of the engine so far."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@runtime_checkable
class Tokenizing(Protocol):
    """An engine that encodes and decodes as its requests do."""

    async def tokenize(self, prompt: Prompt, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a prompt. Raises `RequestError`."""
        ...

    async def detokenize(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids. Raises `RequestError`."""
        ...


@runtime_checkable
class Rendering(Protocol):
    """An engine that tells the text of a prompt before it is encoded."""

    async def render(self, prompt: Prompt) -> str:
        """The text of a string or of chat messages, for which the chat template writes it. Raises `RequestError`."""
        ...


@runtime_checkable
class Templated(Protocol):
    """An engine whose tokenizer has a chat template."""

    @property
    def tokenizer(self) -> object:
        """The tokenizer, which two threads must not use at once; None before the model is loaded."""
        ...


@runtime_checkable
class WithDefaults(Protocol):
    """An engine whose model brings parameters of its own."""

    def default_params(self, max_tokens: int | None = None) -> SamplingParams:
        """The parameters of a request without any. Loads the model."""
        ...


@runtime_checkable
class PrefixCaching(Protocol):
    """An engine that reuses the K/V of shared prefixes."""

    def reset_prefix_cache(self) -> None:
        """Reuse nothing computed so far."""
        ...


@runtime_checkable
class Embedder(Protocol):
    """Returns the embeddings of prompts."""

    async def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: str = "mean",
        dimensions: int | None = None,
        normalize: bool = True,
        namespace: str = "",
        adapter: str = "",
        priority: RequestPriority = RequestPriority.NORMAL,
        deadline: float | None = None,
    ) -> list[EmbeddingOutput]:
        """The embedding of each prompt (one, or a list): hidden states after the last norm, pooled.

        `pooling` is "mean" or "last" (the last token's). `dimensions` keeps that many leading numbers; `normalize` then
        divides by the length of the vector. `adapter` is for engines `WithAdapters`. Raises `RequestError`, and
        whatever awaiting a request raises.
        """
        ...


@runtime_checkable
class Scorer(Protocol):
    """Returns the log probabilities of given completions."""

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
        """The log probability of each token of a completion after its prompt, for one pair or many.

        With the `params` of a request, also under the distribution that such a request samples from. `logits` and
        `entropies` request these. Raises `RequestError`, and whatever awaiting a request raises.
        """
        ...


@runtime_checkable
class Trainable(Protocol):
    """An engine whose weights can change while it serves.

    `mode` says what becomes of requests: "abort" ends them with what they have, "wait" lets those that have started
    end first, "keep" lets those that run go on, under the new weights. An order that does not fit the engine's state
    raises `EngineStateError`.
    """

    @property
    def weight_version(self) -> int:
        """How often the weights have changed; every token has the version that it was sampled with."""
        ...

    def updating(self, mode: UpdateMode = "abort", *, stale_kv: bool = False) -> AbstractAsyncContextManager[None]:
        """A block in which the owner of the weights changes them, while no step runs."""
        ...

    async def update_weights(
        self, source: WeightSource = None, *, mode: UpdateMode = "abort", stale_kv: bool = False
    ) -> int:
        """Give the model new weights; returns the new version. Raises `WeightsError`."""
        ...

    async def pause(self, mode: UpdateMode = "abort") -> None:
        """Run no step until `resume()`."""
        ...

    async def resume(self) -> None:
        """Let the steps go on after `pause()`."""
        ...

    async def sleep(self, level: SleepLevel = "all", *, mode: UpdateMode = "abort") -> None:
        """Run no step until `wake()`, and release memory."""
        ...

    async def wake(self) -> None:
        """Take back what `sleep()` released."""
        ...


@runtime_checkable
class WithAdapters(Engine, Protocol):
    """An engine that serves several LoRA adapters beside its model: requests choose one with `adapter=name`."""

    def generate(
        self, prompt: Prompt, params: Params = None, *, request_id: str | None = None,
        priority: RequestPriority = RequestPriority.NORMAL, deadline: float | None = None,
        ttft_deadline: float | None = None, namespace: str = "", adapter: str = "", callback: Callback | None = None,
    ) -> RequestHandle:  # fmt: skip
        """As `Engine.generate`, with the adapter of that name; "" is none."""
        ...

    @property
    def adapters(self) -> list[str]:
        """The names of the loaded adapters."""
        ...

    async def load_adapter(self, name: str, source: object) -> None:
        """Load an adapter, or replace it, from a folder or a live module. Raises `WeightsError`."""
        ...

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter, after the requests that run with it. Raises `RequestError` for an unknown name."""
        ...

    def adapter_generation(self, name: str) -> int:
        """A number that is new with every load of an adapter of this name; 0 while none is loaded."""
        ...
