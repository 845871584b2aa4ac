"""`embed`: the embeddings of prompts, each as a request of an engine that generates nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock.api.prompt import Prompt, as_batch
from penstock.api.protocols import WithAdapters
from penstock.engine.requests.batch import Batch, BatchOptions
from penstock.errors import ExecutionError, RequestError
from penstock.outputs import EmbeddingOutput, RequestOutput
from penstock.pooling import PoolingParams
from penstock.values import flag, integer


@dataclass(frozen=True, slots=True)
class Embedding:
    """How to make an embedding of a pooled hidden state, and the options of its requests.

    Raises `RequestError` naming the invalid value.
    """

    pooling: str
    dimensions: int | None
    normalize: bool
    options: BatchOptions
    params: PoolingParams = field(init=False)

    def __post_init__(self) -> None:
        if self.dimensions is not None:
            object.__setattr__(self, "dimensions", integer("dimensions", self.dimensions, 1, rule="an integer >= 1"))
        object.__setattr__(self, "normalize", flag("normalize", self.normalize))
        object.__setattr__(self, "params", PoolingParams(pooling=self.pooling))

    def check_size(self, hidden_size: int) -> None:
        """Raise `RequestError` where a model with hidden states of this size cannot give such embeddings."""
        if not hidden_size:
            raise RequestError("this model gives no embeddings: it has no hidden states")
        if self.dimensions is not None and self.dimensions > hidden_size:
            text = f"dimensions={self.dimensions} is more than the {hidden_size} that this model has"
            raise RequestError(text, parameter="dimensions")

    def output(self, output: RequestOutput) -> EmbeddingOutput:
        """The result of one prompt."""
        if output.pooled is None:
            raise ExecutionError("this model gives no embeddings: its runner pooled nothing")
        vector = list(output.pooled[: self.dimensions])
        if self.normalize:
            length = math.sqrt(math.fsum(value * value for value in vector))
            vector = [value / length for value in vector] if length else vector
        return EmbeddingOutput(vector, output.prompt_token_ids, output.num_cached_tokens)


async def embed(
    engine: WithAdapters, prompts: Prompt | Sequence[Prompt], embedding: Embedding
) -> list[EmbeddingOutput]:
    """`InferenceEngine.embed`. Raises the first error, after which nothing runs on."""
    with Batch(engine, embedding.options) as batch:
        for prompt in as_batch(prompts):
            # The warning for a bare string, which a model for chats rarely continues as meant, does not apply.
            given = {"prompt": prompt} if isinstance(prompt, str) and prompt else prompt
            await batch.submit(given, embedding.params)
        return [embedding.output(await handle) for handle in batch.handles]
