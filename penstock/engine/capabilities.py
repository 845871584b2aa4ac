"""`Capabilities`: what the native engine does besides generating: score, check, embed, encode and decode.

Scores and embeddings are requests of `generate`; texts are encoded by the tokenizer pool. Holds no state. The base of
`InferenceEngine` and `ReplicatedEngine`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, overload

from penstock.api.logprob_report import LogprobReport
from penstock.api.prompt import Prompt, PromptInput, read_prompt
from penstock.api.protocols import Completion
from penstock.api.waiting import result_of
from penstock.engine.assembly import Parts
from penstock.engine.observe.metrics import Metrics
from penstock.engine.requests.batch import BatchOptions
from penstock.engine.requests.embedding import Embedding, embed
from penstock.engine.requests.gradients import (
    GradientOptions,
    ReadableEngine,
    refuse_without_effect,
    score_with_gradients,
)
from penstock.engine.requests.logprob_check import check_logprobs, rollouts_of
from penstock.engine.requests.scoring import Wishes, read_pairs, score
from penstock.engine.text.tokenizer_pool import decode_ids, encode_ids, prompt_text
from penstock.errors import RequestError
from penstock.generation import Params
from penstock.models.protocol import ModelRunner
from penstock.outputs import EmbeddingOutput, RequestOutput
from penstock.sampling import RequestPriority
from penstock.scores import DifferentiableScore, Score
from penstock.values import flag, token_ids

Prompts = Prompt | Sequence[Prompt]
Completions = Completion | Sequence[Completion]


class _Loading(ReadableEngine, Protocol):
    """An engine that loads its model when it is first used."""

    _metrics: Metrics

    async def _loaded_soon(self) -> Parts: ...

    async def _trained_runner(self) -> ModelRunner: ...


class Capabilities:
    """Methods of `InferenceEngine` and `ReplicatedEngine`."""

    async def _trained_runner(self: _Loading) -> ModelRunner:
        """What computes gradients, if anything does."""
        return (await self._loaded_soon()).runner

    @overload
    async def score(
        self: _Loading, prompts: Prompts, completions: Completions, *, params: Params = None, logits: bool = False,
        entropies: bool = False, namespace: str = "", adapter: str = "",
        priority: RequestPriority = RequestPriority.NORMAL, deadline: float | None = None,
        requires_grad: Literal[False] = False,
    ) -> list[Score]: ...  # fmt: skip

    @overload
    async def score(
        self: _Loading, prompts: Prompts, completions: Completions, *, params: Params = None,
        requires_grad: Literal[True], values: Literal["module", "engine"] = "module", checkpoint_layers: bool = False,
    ) -> list[DifferentiableScore]: ...  # fmt: skip

    async def score(
        self: _Loading, prompts: Prompts, completions: Completions, *, params: Params = None, logits: bool = False,
        entropies: bool = False, namespace: str = "", adapter: str = "",
        priority: RequestPriority = RequestPriority.NORMAL, deadline: float | None = None, requires_grad: bool = False,
        values: Literal["module", "engine"] = "module", checkpoint_layers: bool = False,
    ) -> list[Score] | list[DifferentiableScore]:  # fmt: skip
        """The log probability of each token of a completion (a string or ids) after its prompt, for one pair or many.

        Runs in the same steps as generation, computes no logits for the prompt, and finds its K/V in the cache. A
        completion's text is encoded by itself, without special tokens. A pair may be as long as the model allows. With
        the `params` of a request, `Score.tempered` has the log probabilities under what such a request samples from.
        `logits` and `entropies` request these. `deadline` is in seconds from now, effective once the model is loaded.
        Pairs beyond the size of the queue wait for the earlier ones. Raises `RequestError` (for an empty completion
        too), and whatever awaiting a request raises: the first error, after which nothing runs on.

        With `requires_grad`, the scores are tensors whose `backward()` fills the gradients of the live module that the
        engine borrows, computed outside the engine's steps, a shared prompt once; `params` may then hold a temperature
        alone. `values="engine"` gives the tensors the values that the engine scores, so that the ratio to them is
        exactly 1. `checkpoint_layers` saves the memory of activations. Raises `ConfigurationError` where there is no
        live module, `EngineStateError` where weights are updated meanwhile.
        """
        pairs, wishes = read_pairs(prompts, completions), Wishes(params, logits, entropies)
        options = BatchOptions(namespace, priority, deadline, adapter)
        wishes.scoring_params(1)  # refuses what cannot be applied before the model is loaded
        gradients = _gradient_options(requires_grad, adapter, params, values, checkpoint_layers)

        async def encode(prompt: PromptInput, add_special_tokens: bool) -> list[int]:
            pool = (await self._loaded_soon()).pool
            return await result_of(pool.submit(encode_ids, prompt, add_special_tokens))

        if gradients is not None:
            refuse_without_effect(wishes, options)
            return await score_with_gradients(self, await self._trained_runner(), pairs, gradients, encode)
        return await score(self, pairs, wishes, options, encode)

    async def check_logprobs(
        self: _Loading, outputs: RequestOutput | Sequence[RequestOutput] | None = None
    ) -> LogprobReport:
        """How far log probabilities of finished requests are from those that the live module computes now.

        Checks `outputs`, which may be partial, or the latest requests that finished, of which the engine keeps
        `EngineConfig.kept_outputs`; leave out requests with an adapter, which the module does not compute. It runs as
        in eval mode, beside the engine's steps. Only tokens of the present `weight_version` are compared; the report
        counts the others. Raises `RequestError` where there is nothing to compare, `ConfigurationError` where there is
        no live module, `EngineStateError` where weights are updated meanwhile.
        """
        rollouts = [] if outputs is None else rollouts_of(outputs)
        runner = await self._trained_runner()
        return await check_logprobs(self, runner, self._metrics.finished.rollouts() if outputs is None else rollouts)

    async def embed(
        self: _Loading,
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

        Runs in the same steps as generation. `pooling` is "mean" or "last" (the last token's); a mean computes every
        position of its prompt, cached or not. `dimensions` keeps that many leading numbers; `normalize` then divides by
        the length of the vector. `deadline` is in seconds from now, effective once the model is loaded. Prompts beyond
        the size of the queue wait for the earlier ones. Raises `RequestError`, and whatever awaiting a request raises.
        """
        embedding = Embedding(pooling, dimensions, normalize, BatchOptions(namespace, priority, deadline, adapter))
        embedding.check_size((await self._loaded_soon()).runner.spec.hidden_size)
        return await embed(self, prompts, embedding)

    async def tokenize(self: _Loading, prompt: Prompt, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids that `generate` computes for a prompt. Loads the model. Raises `RequestError`."""
        pool = (await self._loaded_soon()).pool
        return await result_of(pool.submit(encode_ids, read_prompt(prompt), add_special_tokens))

    async def render(self: _Loading, prompt: Prompt) -> str:
        """The text of a string or of chat messages, for which the chat template writes it. Raises `RequestError`."""
        pool = (await self._loaded_soon()).pool
        return await result_of(pool.submit(prompt_text, read_prompt(prompt)))

    async def detokenize(self: _Loading, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids. Loads the model. Raises `RequestError`."""
        pool = (await self._loaded_soon()).pool
        return await result_of(pool.submit(decode_ids, token_ids("ids", ids), skip_special_tokens))


def _gradient_options(
    requires_grad: bool, adapter: str, params: Params, values: Literal["module", "engine"], checkpoint_layers: bool
) -> GradientOptions | None:
    if not flag("requires_grad", requires_grad):
        return None
    if adapter:
        raise RequestError(
            "gradients run through the live module, and not through copies that load_adapter made: lend the engine the "
            "peft module whose adapter is trained, and leave adapter out"
        )
    return GradientOptions(params, values, checkpoint_layers)
