"""`embed`: the embeddings of prompts, each as a request of an engine that generates nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock.api.handle import RequestHandle
from penstock.api.prompt import Prompt, as_batch
from penstock.api.protocols import Engine
from penstock.errors import EngineOverloaded, ExecutionError, RequestError
from penstock.outputs import EmbeddingOutput, RequestOutput
from penstock.pooling import PoolingParams
from penstock.sampling import RequestPriority
from penstock.values import flag, integer, real


@dataclass(frozen=True, slots=True)
class Embedding:
    """How to make an embedding of a pooled hidden state, and the options of its requests.

    Raises `RequestError` naming the invalid value.
    """

    pooling: str
    dimensions: int | None
    normalize: bool
    namespace: str
    priority: RequestPriority
    deadline: float | None
    params: PoolingParams = field(init=False)

    def __post_init__(self) -> None:
        if self.dimensions is not None:
            object.__setattr__(self, "dimensions", integer("dimensions", self.dimensions, 1, rule="an integer >= 1"))
        object.__setattr__(self, "normalize", flag("normalize", self.normalize))
        if self.deadline is not None:
            deadline = real("deadline", self.deadline, -math.inf, math.inf, "seconds from now")
            object.__setattr__(self, "deadline", deadline)
        object.__setattr__(self, "params", PoolingParams(pooling=self.pooling))

    def check_size(self, hidden_size: int) -> None:
        """Raise `RequestError` where a model with hidden states of this size cannot give such embeddings."""
        if not hidden_size:
            raise RequestError("this model gives no embeddings: it has no hidden states")
        if self.dimensions is not None and self.dimensions > hidden_size:
            raise RequestError(f"dimensions={self.dimensions} is more than the {hidden_size} that this model has")

    def output(self, output: RequestOutput) -> EmbeddingOutput:
        """The result of one prompt."""
        if output.pooled is None:
            raise ExecutionError("this model gives no embeddings: its runner pooled nothing")
        vector = list(output.pooled[: self.dimensions])
        if self.normalize:
            length = math.sqrt(math.fsum(value * value for value in vector))
            vector = [value / length for value in vector] if length else vector
        return EmbeddingOutput(vector, output.prompt_token_ids, output.num_cached_tokens)


async def embed(engine: Engine, prompts: Prompt | Sequence[Prompt], embedding: Embedding) -> list[EmbeddingOutput]:
    """`InferenceEngine.embed`. A batch that is longer than the queue waits for its own earlier prompts.

    Raises the first error, after which nothing runs on.
    """
    handles: list[RequestHandle] = []
    begin = time.monotonic()
    try:
        for prompt in as_batch(prompts):
            handles.append(await _submitted(engine, prompt, embedding, begin, handles))
        return [embedding.output(await handle) for handle in handles]
    finally:
        for handle in handles:
            handle.cancel()


async def _submitted(
    engine: Engine, prompt: Prompt, embedding: Embedding, begin: float, earlier: Sequence[RequestHandle]
) -> RequestHandle:
    # The warning for a bare string, which a model for chats rarely continues as meant, does not apply.
    given = {"prompt": prompt} if isinstance(prompt, str) and prompt else prompt
    deadline = embedding.deadline
    for running in (*(handle for handle in earlier if not handle.done()), None):
        try:
            return engine.generate(
                *(given, embedding.params),
                namespace=embedding.namespace,
                priority=embedding.priority,
                deadline=None if deadline is None else deadline - (time.monotonic() - begin),
            )
        except EngineOverloaded:
            if running is None:
                raise
            await running
    raise AssertionError("the loop ends with None")
