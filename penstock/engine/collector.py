"""`Collector`: turns the scheduler's events of one request into deltas and, at the end, its `RequestOutput`.

Owns the text state of every completion. Runs on the engine's thread; a fault here is the request's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from penstock.engine.textstream import TextStream
from penstock.outputs import CompletionOutput, Delta, Logprob, RequestMetrics, RequestOutput
from penstock.sampling import SamplingParams
from penstock.sequence import FinishReason
from penstock.step import Event, TokenLogprobs

DecodeToken = Callable[[int], str | None]


@dataclass(slots=True)
class _Completion:
    text: TextStream
    output: CompletionOutput
    parts: list[str] = field(default_factory=list)


class Collector:
    """Completions of one request. `streams` holds one fresh `TextStream` per candidate (n or best_of)."""

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        streams: list[TextStream],
        decode_token: DecodeToken,
    ) -> None:
        self._request_id = request_id
        self._prompt = prompt
        self._prompt_token_ids = prompt_token_ids
        self._params = params
        self._decode_token = decode_token
        self._completions = [_Completion(stream, CompletionOutput(index=i)) for i, stream in enumerate(streams)]
        self._prompt_logprobs: list[Mapping[int, Logprob] | None] | None = None
        self._num_cached_tokens = 0
        if params.prompt_logprobs is not None:
            self._prompt_logprobs = [None]
        if params.logprobs is not None:
            for completion in self._completions:
                completion.output.logprobs = []

    @property
    def done(self) -> bool:
        """Whether every completion has ended."""
        return all(c.output.finish_reason is not None for c in self._completions)

    def push(self, index: int, event: Event) -> Delta:
        """Take in one event. The delta's `finish_reason` may come from a stop string found in its text."""
        completion = self._completions[index]
        if event.prompt_logprobs and index == 0 and self._prompt_logprobs is not None:
            self._prompt_logprobs += [self._by_token(entry) for entry in event.prompt_logprobs]
        self._num_cached_tokens += event.num_cached_tokens if index == 0 else 0
        text, count, stop = self._text_of(completion, event)
        entries = event.logprobs[:count]
        mapped = tuple(map(self._by_token, entries)) if self._params.logprobs is not None else ()
        self._account(completion.output, event, count)
        if completion.output.logprobs is not None:
            completion.output.logprobs += mapped
        reason, stop_reason = self._ending(event, stop)
        if reason is not None and stop is None:
            text += completion.text.finish()
        completion.parts.append(text)
        completion.output.finish_reason, completion.output.stop_reason = reason, stop_reason
        return Delta(
            request_id=self._request_id,
            index=index,
            text=text,
            token_ids=event.tokens[:count],
            logprobs=mapped,
            token_logprobs=tuple(e.logprob for e in entries),
            finish_reason=reason,
            stop_reason=stop_reason,
        )

    @property
    def streams(self) -> bool:
        """Whether deltas may be shown as they come: not while candidates still compete (best_of > n)."""
        return len(self._completions) == self._params.n

    def replay(self) -> list[Delta]:
        """The chosen completions as one delta each, for readers that could not follow the candidates."""
        return [
            Delta(
                request_id=self._request_id,
                index=out.index,
                text=out.text,
                token_ids=tuple(out.token_ids),
                logprobs=tuple(out.logprobs or ()),
                token_logprobs=tuple(out.token_logprobs),
                finish_reason=out.finish_reason,
                stop_reason=out.stop_reason,
            )
            for out in self._chosen()
        ]

    def output(self, metrics: RequestMetrics) -> RequestOutput:
        """The result so far: the best `n` candidates when there are more, in order of likelihood."""
        self._join()
        return RequestOutput(
            request_id=self._request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_token_ids,
            outputs=self._chosen(),
            finished=self.done,
            prompt_logprobs=self._prompt_logprobs,
            num_cached_tokens=self._num_cached_tokens,
            metrics=metrics,
        )

    def close(self, reason: FinishReason) -> list[Delta]:
        """End what still runs from outside; the last deltas carry the text that was held back."""
        deltas = [self._close_one(c, reason.value) for c in self._completions if c.output.finish_reason is None]
        if self.streams:
            return deltas
        self._join()
        return self.replay()

    def _join(self) -> None:
        for completion in self._completions:
            completion.output.text = "".join(completion.parts)

    def _close_one(self, completion: _Completion, reason: str) -> Delta:
        try:
            text = completion.text.finish()
        except BaseException:  # the very fault, perhaps, that ends the request
            text = ""
        completion.parts.append(text)
        completion.output.finish_reason = reason
        return Delta(request_id=self._request_id, index=completion.output.index, text=text, finish_reason=reason)

    def _chosen(self) -> list[CompletionOutput]:
        outputs = [c.output for c in self._completions]
        if self.streams:
            return outputs
        chosen = sorted(outputs, key=lambda out: -out.cumulative_logprob)[: self._params.n]
        for index, output in enumerate(chosen):
            output.index = index
        return chosen

    def _text_of(self, completion: _Completion, event: Event) -> tuple[str, int, str | None]:
        """(safe text, tokens that count, stop string found). The text of a stopping token is not shown."""
        hide = event.stop_token is not None and not self._params.include_stop_str_in_output
        shown = event.tokens[:-1] if hide else event.tokens
        delta = completion.text.push(shown)
        if delta.stop is not None:
            return delta.text, delta.num_tokens, delta.stop
        return delta.text, len(event.tokens), None

    def _account(self, out: CompletionOutput, event: Event, count: int) -> None:
        out.token_ids += event.tokens[:count]
        out.weight_versions += [event.weight_version] * count
        for entry in event.logprobs[:count]:
            out.cumulative_logprob += entry.logprob
            out.token_logprobs.append(entry.logprob)
            out.sampled_logprobs.append(entry.sampled)

    def _ending(self, event: Event, stop: str | None) -> tuple[str | None, str | int | None]:
        if stop is not None:
            return FinishReason.STOP.value, stop
        if event.reason is None:
            return None, None
        asked_for = event.stop_token is not None and event.stop_token in (self._params.stop_token_ids or ())
        return event.reason.value, event.stop_token if asked_for else None

    def _by_token(self, entry: TokenLogprobs) -> Mapping[int, Logprob]:
        found = {token: Logprob(logprob, rank, self._decode_token(token)) for token, logprob, rank in entry.top}
        found[entry.token] = Logprob(entry.logprob, entry.rank, self._decode_token(entry.token), entry.sampled)
        return found
