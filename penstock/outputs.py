"""What a caller gets back: `Delta` while a request runs, `RequestOutput` when it is done.

Plain records without behaviour beyond views of themselves; no tensors, no references into the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log probability under the model, its 1-based rank, and its text."""

    logprob: float
    rank: int
    decoded_token: str | None = None
    sampled_logprob: float | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """What became known since the last delta: new text, new tokens, and, on the last one, why it ended.

    `index` tells the n > 1 completions apart. Text is held back while it could become part of a stop string or half
    a character, so `text` may be shorter than what `token_ids` decode to; joined, the texts are exact.
    """

    request_id: str
    index: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Mapping[int, Logprob], ...] = ()
    token_logprobs: tuple[float, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    @property
    def finished(self) -> bool:
        """Whether this is the completion's last delta."""
        return self.finish_reason is not None


@dataclass(slots=True)
class CompletionOutput:
    """One completion. `logprobs[i]` maps token id to `Logprob` at output position i.

    `token_logprobs` are the chosen tokens' log probabilities under the model, `sampled_logprobs` those under the
    distribution really sampled; both always there, one per token. `cumulative_logprob` sums the first. `score` is what
    completions were ranked by, if they were (`best_of`, `rank_by`, beam search): the higher, the better. With
    speculation, `num_drafted_tokens` were guessed for it and `num_accepted_tokens` of them were right.
    """

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    logprobs: list[Mapping[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_logprobs: list[float] = field(default_factory=list)
    sampled_logprobs: list[float] = field(default_factory=list)
    weight_versions: list[int] = field(default_factory=list)
    score: float | None = None
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """When things happened to a request, in seconds; None where it did not come to that."""

    queued_s: float | None = None
    first_token_s: float | None = None
    total_s: float | None = None


@dataclass(slots=True)
class RequestOutput:
    """A request's result so far; `finished` says whether it is complete, `error` what ended it early, if anything."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    prompt_logprobs: list[Mapping[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    error: str | None = None

    @property
    def text(self) -> str:
        """Text of the first completion."""
        return self.outputs[0].text

    @property
    def generated_ids(self) -> list[int]:
        """Token ids of the first completion."""
        return self.outputs[0].token_ids

    @property
    def output_ids(self) -> list[list[int]]:
        """One row per completion: prompt and generated ids."""
        return [self.prompt_token_ids + out.token_ids for out in self.outputs]
