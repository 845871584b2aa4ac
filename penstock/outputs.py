"""What a caller receives: a `Delta` while the request runs, a `RequestOutput` when it has ended.

Plain records without behaviour except views of themselves; no tensors, no references to the engine. Built by engines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from penstock.scores import ScorePart


@dataclass(frozen=True, slots=True)
class Logprob:
    """The log probability of a token under the model, its rank from 1, and its text."""

    logprob: float
    rank: int
    decoded_token: str | None = None
    sampled_logprob: float | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new since the last delta: text, tokens and, in the last one, the finish reason.

    `index` is the number of the completion (n > 1). `weight_versions` holds, for each token, the version of the weights
    that it was sampled with. Text is held back while it could become part of a stop string or is
    an incomplete character, so `text` may be shorter than the decoded `token_ids`; the joined texts are exact.
    """

    request_id: str
    index: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Mapping[int, Logprob], ...] = ()
    token_logprobs: tuple[float, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    weight_versions: tuple[int, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether this is the last delta of the completion."""
        return self.finish_reason is not None


@dataclass(slots=True)
class CompletionOutput:
    """One completion. `logprobs[i]` maps token id to `Logprob` at output position i.

    `token_logprobs` are the log probabilities of the chosen tokens under the model, `sampled_logprobs` those under the
    distribution actually sampled, `weight_versions` the versions of the weights that the tokens were sampled with; all
    are always present, one per token. `stale_kv` says that tokens attended to keys and values of older weights, because
    an update was made with `stale_kv=True`. `cumulative_logprob` is the sum of `token_logprobs`.
    `score` is the value by which completions were ranked, if they were (`best_of`, `rank_by`, beam search); higher is
    better. With speculation, `num_drafted_tokens` counts draft tokens and `num_accepted_tokens` those accepted.
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
    stale_kv: bool = False
    score: float | None = None
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Times of a request's events in seconds after its arrival; None for events that did not happen."""

    queued_s: float | None = None
    first_token_s: float | None = None
    total_s: float | None = None


@dataclass(slots=True)
class RequestOutput:
    """The result of a request so far. `finished`: whether it is complete. `error`: what ended it early, if anything.

    In place of a completion, `pooled` is the pooled hidden state of the prompt, or `score_parts` are the scores of its
    end, where those were requested.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    prompt_logprobs: list[Mapping[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    error: str | None = None
    pooled: Sequence[float] | None = None
    score_parts: list[ScorePart] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The text of the first completion."""
        return self.outputs[0].text

    @property
    def generated_ids(self) -> list[int]:
        """The token ids of the first completion."""
        return self.outputs[0].token_ids

    @property
    def output_ids(self) -> list[list[int]]:
        """One row per completion: the prompt's ids and the generated ids."""
        return [self.prompt_token_ids + out.token_ids for out in self.outputs]


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """The embedding of one prompt: its pooled hidden state, cut to the requested dimensions and normalized."""

    embedding: list[float]
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
