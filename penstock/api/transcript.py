"""`Transcript`: the growing record of one completion, and how much of it the reader has taken.

Append-only; written on the engine's thread. A delta is built when a reader takes it, so untaken deltas merge at no
cost. Only the channel calls `show` and `take`, under its lock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from penstock.outputs import CompletionOutput, Delta, Logprob

# Number of visible tokens and texts, and the visible finish and stop reason, if any.
_Mark = tuple[int, int, str | None, str | int | None]


class Transcript:
    """The text is `texts` joined. `logprobs`, one mapping per token, is None unless the request asked for them."""

    __slots__ = (
        "_shown",
        "_taken",
        "finish_reason",
        "index",
        "logprobs",
        "num_accepted_tokens",
        "num_drafted_tokens",
        "request_id",
        "sampled_logprobs",
        "score",
        "stale_kv",
        "stop_reason",
        "texts",
        "token_ids",
        "token_logprobs",
        "weight_versions",
    )

    def __init__(self, request_id: str, index: int = 0, logprobs: list[Mapping[int, Logprob]] | None = None) -> None:
        self.request_id = request_id
        self.index = index
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.token_logprobs: list[float] = []
        self.sampled_logprobs: list[float] = []
        self.weight_versions: list[int] = []
        self.num_drafted_tokens = self.num_accepted_tokens = 0
        self.logprobs = logprobs
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.stale_kv = False  # set by an update that keeps K/V
        self.score: float | None = None  # set when the completions are ranked
        self._shown: _Mark = (0, 0, None, None)
        self._taken = (0, 0)

    def add(
        self,
        text: str,
        tokens: Sequence[int],
        logprobs: Iterable[float] = (),
        sampled_logprobs: Iterable[float] = (),
        weight_version: int = 0,
        weight_versions: Sequence[int] = (),
    ) -> None:
        """Append final text, accepted tokens, and their log probabilities: under the model, and as sampled.

        `weight_versions`, one per token or more, take precedence over the one `weight_version` of all.
        """
        if text:
            self.texts.append(text)
        self.token_ids += tokens
        self.weight_versions += weight_versions[: len(tokens)] or [weight_version] * len(tokens)
        self.token_logprobs += logprobs
        self.sampled_logprobs += sampled_logprobs

    def count_draft(self, drafted: int, accepted: int) -> None:
        """Count `drafted` draft tokens, of which `accepted` are among the tokens."""
        self.num_drafted_tokens += drafted
        self.num_accepted_tokens += accepted

    def end(self, text: str, reason: str, stop_reason: str | int | None = None) -> None:
        """Append the last text, and record why the completion ended."""
        self.texts.append(text)
        self.finish_reason, self.stop_reason = reason, stop_reason

    def show(self) -> None:
        """Make everything written so far visible to readers."""
        self._shown = (len(self.token_ids), len(self.texts), self.finish_reason, self.stop_reason)

    def take(self) -> Delta:
        """Everything made visible since the last call."""
        (ids, texts), (ids_end, texts_end, finish_reason, stop_reason) = self._taken, self._shown
        self._taken = (ids_end, texts_end)
        return Delta(
            self.request_id,
            self.index,
            "".join(self.texts[texts:texts_end]),
            tuple(self.token_ids[ids:ids_end]),
            () if self.logprobs is None else tuple(self.logprobs[ids:ids_end]),
            tuple(self.token_logprobs[ids:ids_end]),
            finish_reason,
            stop_reason,
            tuple(self.weight_versions[ids:ids_end]),
        )

    def completion(self) -> CompletionOutput:
        """The whole completion; the lists are copies."""
        return CompletionOutput(
            index=self.index,
            text="".join(self.texts),
            token_ids=list(self.token_ids),
            cumulative_logprob=sum(self.token_logprobs, 0.0),
            logprobs=None if self.logprobs is None else list(self.logprobs),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            token_logprobs=list(self.token_logprobs),
            sampled_logprobs=list(self.sampled_logprobs),
            weight_versions=list(self.weight_versions),
            stale_kv=self.stale_kv,
            score=self.score,
            num_drafted_tokens=self.num_drafted_tokens,
            num_accepted_tokens=self.num_accepted_tokens,
        )
