"""`Collector`: turns the scheduler's events for one request into transcripts and a final `RequestOutput`.

Owns the text state of every completion. Runs on the engine's thread, called by `OutputProcessor`; an exception here
ends only this request.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from dataclasses import replace
from operator import attrgetter

from penstock.api.transcript import Transcript
from penstock.engine.requests.ranking import likelihood, scores_of
from penstock.engine.text.stream import Text, TextDelta
from penstock.outputs import Logprob, RequestMetrics, RequestOutput
from penstock.sampling import SamplingParams
from penstock.scores import ScorePart
from penstock.sequence import FinishReason
from penstock.step import Event, TokenLogprobs

_LOGPROB, _SAMPLED = attrgetter("logprob"), attrgetter("sampled")
DecodeToken = Callable[[int], str | None]


class Collector:
    """The completions of one request. `texts` holds a fresh text stream for each generated completion.

    There are `SamplingParams.num_texts` of them; a single one serves all `n` completions. `streams` states whether
    deltas may be delivered before the end: not while candidates still compete. `stops` maps token ids that end a
    sequence to stop strings that the text never shows.
    """

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        texts: SequenceOf[Text],
        decode_token: DecodeToken,
        stops: Mapping[int, str] | None = None,
    ) -> None:
        self._request_id = request_id
        self._prompt = prompt
        self._prompt_token_ids = prompt_token_ids
        self._params = params
        self._decode_token = decode_token
        self._stops = stops or {}
        alike = range(params.n) if len(texts) == 1 else range(1)
        self._completions = [(text, [self._transcript(i + k) for k in alike]) for i, text in enumerate(texts)]
        self._prompt_logprobs: list[Mapping[int, Logprob] | None] | None = None
        self._num_cached_tokens = 0
        self._pooled: array[float] | None = None
        self._score_parts: list[ScorePart] = []
        self.streams = not params.is_ranked
        if params.prompt_logprobs is not None:
            self._prompt_logprobs = [None]

    @property
    def num_texts(self) -> int:
        """The number of texts collected; events of further sequences are ignored."""
        return len(self._completions)

    @property
    def done(self) -> bool:
        """Whether every completion has ended."""
        return all(transcripts[0].finish_reason is not None for _, transcripts in self._completions)

    def push(self, index: int, event: Event) -> SequenceOf[Transcript]:
        """Process one event. Returns the transcripts it extended; a stop string in the text may have ended them."""
        text, transcripts = self._completions[index]
        if index == 0 and (event.num_cached_tokens or event.prompt_logprobs or event.pooled or event.scores):
            self._record_prompt(event)
        new_text, stop, count = text.push(event.tokens if event.stop_token is None else self._visible(event))
        tokens, entries = event.tokens, event.logprobs
        if stop is not None:
            tokens, entries = tokens[:count], entries[:count]
        reason, last_text = event.reason, ""
        if stop is None and reason is not None:
            last_text, stop, _ = text.finish()
            last_text += self._stop_text(event) if stop is None else ""
        if len(entries) == 1:  # the usual case
            logprobs, sampled = (entries[0].logprob,), (entries[0].sampled,)
        else:
            logprobs, sampled = tuple(map(_LOGPROB, entries)), tuple(map(_SAMPLED, entries))
        for transcript in transcripts:
            transcript.add(new_text, tokens, logprobs, sampled, event.weight_version, event.weight_versions)
            if event.num_drafted_tokens:
                transcript.count_draft(event.num_drafted_tokens, min(event.num_accepted_tokens, len(tokens)))
            if transcript.logprobs is not None:
                transcript.logprobs += map(self._by_token, entries)
            if stop is not None:
                transcript.end(last_text, FinishReason.STOP.value, stop)
            elif reason is not None:
                transcript.end(last_text, reason.value, self._stop_reason(event))
        return transcripts

    def call_scorer(self) -> Future[list[float]] | None:
        """The scores of the candidates where they are more than likelihoods, computed on another thread; else None."""
        rank_by = self._params.rank_by
        if rank_by is None or (isinstance(rank_by, str) and rank_by != "consensus"):
            return None
        return scores_of(rank_by, [transcripts[0].completion() for _, transcripts in self._completions])

    def rank(self, scores: Iterable[float]) -> None:
        """Use these scores instead of likelihoods."""
        for (_, transcripts), score in zip(self._completions, scores, strict=True):
            for transcript in transcripts:
                transcript.score = score

    def chosen(self) -> list[Transcript]:
        """The completions to deliver: all, or the best `n` candidates, best first, if they are ranked."""
        every = [transcript for _, transcripts in self._completions for transcript in transcripts]
        if self.streams:
            return every
        for transcript in every:
            if transcript.score is None:
                transcript.score = likelihood(self._params, transcript.completion())
        best = sorted(every, key=lambda transcript: -(transcript.score or 0.0))[: self._params.n]
        for index, transcript in enumerate(best):
            transcript.index = index
        return best

    def output(self, metrics: RequestMetrics) -> RequestOutput:
        """The result so far."""
        return RequestOutput(
            request_id=self._request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_token_ids,
            outputs=[transcript.completion() for transcript in self.chosen()],
            finished=self.done,
            prompt_logprobs=self._prompt_logprobs,
            num_cached_tokens=self._num_cached_tokens,
            metrics=metrics,
            pooled=self._pooled,
            score_parts=self._score_parts,
        )

    def mark_stale(self, index: int | None) -> None:
        """The tokens of this completion (None: of all) to come attend to K/V of older weights."""
        for number, (_, transcripts) in enumerate(self._completions):
            for transcript in transcripts if index in (None, number) else ():
                transcript.stale_kv = True

    def restart_prompt(self) -> None:
        """Prompt logprobs and scores will be reported from the first one again."""
        self._score_parts = []
        if self._prompt_logprobs is not None:
            self._prompt_logprobs = [None]

    def close(self, reason: FinishReason) -> list[Transcript]:
        """End the remaining completions from outside, with the text held back; returns the transcripts to deliver."""
        closed: list[Transcript] = []
        for text, transcripts in self._completions:
            if transcripts[0].finish_reason is None:
                last_text, stop, _ = _finish_text(text)
                ending = reason if stop is None else FinishReason.STOP
                for transcript in transcripts:
                    transcript.end(last_text, ending.value, stop)
                closed += transcripts
        return closed if self.streams else self.chosen()

    def _transcript(self, index: int) -> Transcript:
        return Transcript(self._request_id, index, None if self._params.logprobs is None else [])

    def _record_prompt(self, event: Event) -> None:
        self._num_cached_tokens += event.num_cached_tokens
        self._pooled = event.pooled
        if event.scores is not None:
            if event.scores.begin == 0:
                self._score_parts = []
            self._score_parts.append(replace(event.scores, weight_version=event.weight_version))
        if event.prompt_logprobs and self._prompt_logprobs is not None:
            self._prompt_logprobs += map(self._by_token, event.prompt_logprobs)

    def _visible(self, event: Event) -> tuple[int, ...]:
        """The tokens whose text is shown: the stop token is included only on request."""
        return event.tokens if self._params.include_stop_str_in_output else event.tokens[:-1]

    def _stop_text(self, event: Event) -> str:
        """The stop string for which the stop token stands, if it is to be shown."""
        if event.stop_token is None or not self._params.include_stop_str_in_output:
            return ""
        return self._stops.get(event.stop_token, "")

    def _stop_reason(self, event: Event) -> int | str | None:
        if event.stop_token is None or event.stop_token in (self._params.stop_token_ids or ()):
            return event.stop_token
        return self._stops.get(event.stop_token)

    def _by_token(self, entry: TokenLogprobs) -> Mapping[int, Logprob]:
        decode = self._decode_token
        logprobs = {token: Logprob(logprob, rank, decode(token)) for token, logprob, rank in entry.top}
        logprobs[entry.token] = Logprob(entry.logprob, entry.rank, decode(entry.token), entry.sampled)
        return logprobs


def _finish_text(text: Text) -> TextDelta:
    try:
        return text.finish()
    except BaseException:  # perhaps the same error that ends the request
        return TextDelta("", None, 0)
