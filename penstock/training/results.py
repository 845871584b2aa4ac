"""`GenerationResult`: what `InferenceModule.generate` returns, a row for each completion.

Plain lists and numpy arrays: no tensors, no reference to the engine. Made by backends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from penstock.outputs import RequestOutput
from penstock.scores import FloatArray


class GenerationMetadata(TypedDict, total=False):
    """What else is known of each row. `sampled_logprobs` are those of the distribution that was sampled."""

    prompt_token_ids: list[list[int]]
    finish_reasons: list[str | None]
    stop_reasons: list[str | int | None]
    sampled_logprobs: list[FloatArray]
    weight_versions: list[list[int]]
    num_cached_tokens: list[int]


@dataclass(slots=True, eq=False)
class GenerationResult:
    """Completions, row by row: all samples of the first prompt, then all of the second.

    `token_ids` are the sampled ids alone, the one that ended the row included, never padding. `logprobs` and `logits`
    are None unless they were requested; then row i has float32 arrays of shape (len(token_ids[i]),) and
    (len(token_ids[i]), vocab) with the model's own values: before temperature, filters and rules.
    """

    texts: list[str]
    token_ids: list[list[int]]
    logprobs: list[FloatArray] | None = None
    logits: list[FloatArray] | None = None
    metadata: GenerationMetadata = field(default_factory=GenerationMetadata)

    @property
    def lengths(self) -> list[int]:
        """The number of tokens in each row."""
        return list(map(len, self.token_ids))

    def __len__(self) -> int:
        return len(self.texts)

    def copy(self) -> GenerationResult:
        """The same values in lists and arrays of their own."""
        metadata: GenerationMetadata = {
            "prompt_token_ids": [ids.copy() for ids in self.metadata.get("prompt_token_ids", [])],
            "finish_reasons": [*self.metadata.get("finish_reasons", [])],
            "stop_reasons": [*self.metadata.get("stop_reasons", [])],
            "sampled_logprobs": [values.copy() for values in self.metadata.get("sampled_logprobs", [])],
            "weight_versions": [versions.copy() for versions in self.metadata.get("weight_versions", [])],
            "num_cached_tokens": [*self.metadata.get("num_cached_tokens", [])],
        }
        return GenerationResult(
            texts=[*self.texts],
            token_ids=[ids.copy() for ids in self.token_ids],
            logprobs=None if self.logprobs is None else [values.copy() for values in self.logprobs],
            logits=None if self.logits is None else [values.copy() for values in self.logits],
            metadata=metadata,
        )


def result_of(outputs: Sequence[RequestOutput], *, with_logprobs: bool) -> GenerationResult:
    """The result of one request per prompt."""
    rows = [(output, completion) for output in outputs for completion in output.outputs]
    completions = [completion for _, completion in rows]
    return GenerationResult(
        texts=[completion.text for completion in completions],
        token_ids=[list(completion.token_ids) for completion in completions],
        logprobs=[_float_array(completion.token_logprobs) for completion in completions] if with_logprobs else None,
        metadata={
            "prompt_token_ids": [list(output.prompt_token_ids) for output, _ in rows],
            "finish_reasons": [completion.finish_reason for completion in completions],
            "stop_reasons": [completion.stop_reason for completion in completions],
            "sampled_logprobs": [_float_array(completion.sampled_logprobs) for completion in completions],
            "weight_versions": [list(completion.weight_versions) for completion in completions],
            "num_cached_tokens": [output.num_cached_tokens for output, _ in rows],
        },
    )


def _float_array(values: Sequence[float]) -> FloatArray:
    """Numbers as a float32 array."""
    import numpy as np

    return np.array(values, dtype=np.float32)
