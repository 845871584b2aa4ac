"""`Fork`: requests that go on from what another one has generated, sharing its K/V.

Owns where they branch off, which is the same for all of them, and what they inherit. Made on the caller's thread; the
engine's thread finds the point, once, and hands it to every request. Called by `InferenceEngine` and `EngineCore`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

from penstock.engine.channel import Channel, RequestStatus
from penstock.engine.door import Door
from penstock.engine.request import Request
from penstock.errors import EngineOverloaded, RequestError, described
from penstock.processors import after
from penstock.sampling import SamplingParams
from penstock.sequence import Sequence, Status
from penstock.values import integer, token_ids

_LONG_S = 60.0  # advice where waiting does not help
_ENDED = "request {} has ended: fork it while it runs, or generate() from its output_ids"
_NOT_BEGUN = "request {} has no tokens yet: fork it after its first delta"


class Point(NamedTuple):
    """Where forks branch off: prompt and text of each, and what its sequence would do from there on."""

    origin: Request
    sequence: Sequence
    text: str | None
    tokens: list[int]
    params: SamplingParams | None


class Fork:
    """Branches of completion `index` of a request, after its first `at` tokens (None: all that it has by then).

    `append` are token ids that follow there. Raises `RequestError` for what is none.
    """

    def __init__(self, origin_id: str, *, index: int, at: int | None, append: SequenceOf[int]) -> None:
        self.origin_id = origin_id
        self._index = integer("index", index, 0, rule="the number of a completion, an integer >= 0")
        self._at = None if at is None else integer("at", at, 0, rule="a number of tokens, an integer >= 0, or None")
        self._append = list(token_ids("append", append))
        self._point: Point | None = None

    def prepare(self, request: Request, origin: Request | None, door: Door) -> None:
        """Make a request one of the branches. Raises `RequestError` where there is nothing to branch off from."""
        if self._point is None:
            self._point = self._find(origin, door)
        point = self._point
        request.prompt = {"prompt": point.text, "prompt_token_ids": point.tokens}
        request.params = point.params if request.params is None else request.params
        request.seed, request.sample_indices = point.sequence.seed, point.origin.sample_indices
        request.origin, request.namespace = point.sequence, point.origin.namespace
        request.priority, request.deadline = point.origin.priority, point.origin.deadline
        if request.params is None:
            raise RequestError(
                f"nothing is left of request {self.origin_id}'s max_tokens after {len(point.tokens)} tokens: "
                "give the fork params of its own"
            )

    def _find(self, origin: Request | None, door: Door) -> Point:
        if origin is None:
            raise RequestError(_ENDED.format(self.origin_id))
        if origin.search is not None:
            raise RequestError(f"request {self.origin_id} is a beam search: fork one that samples")
        seq = self._completion(origin)
        at = seq.num_generated if self._at is None else self._at
        said = [*seq.tokens[seq.prompt_len : seq.prompt_len + at], *self._append]
        tokens = [*seq.tokens[: seq.prompt_len], *said]
        try:
            text = door.continued(origin.channel.prompt, said, seq.params)
        except BaseException as error:  # a tokenizer's panic is no `Exception`
            raise RequestError(f"the tokens of the fork could not be turned into text: {described(error)}") from error
        return Point(origin, seq, text, tokens, _inherited(seq, at, len(tokens)))

    def _completion(self, origin: Request) -> Sequence:
        """The sequence to branch off from, which has at least `at` tokens."""
        assert origin.collector is not None or not origin.sequences
        if not origin.sequences or not origin.sequences[0].num_generated:
            raise RequestError(_NOT_BEGUN.format(self.origin_id))
        alike = len(origin.sequences) == 1  # greedy completions are computed once
        if not 0 <= self._index < (origin.sequences[0].params.n if alike else len(origin.sequences)):
            raise RequestError(f"request {self.origin_id} has no completion {self._index}")
        seq = origin.sequences[0 if alike else self._index]
        if seq.status is Status.FINISHED:
            raise RequestError(f"completion {self._index} of request {self.origin_id} has ended: fork one that runs")
        if self._at is not None and not 0 <= self._at <= seq.num_generated:
            raise RequestError(f"at={self._at} is not among the {seq.num_generated} tokens generated until now")
        return seq


def _inherited(seq: Sequence, at: int, length: int) -> SamplingParams | None:
    """The parameters of a sequence for what is left of it; None when that is nothing."""
    room = seq.max_len - length
    if room < 1:
        return None
    least = min(room, max(0, seq.params.min_tokens - at))
    one = dataclasses.replace(seq.params, n=1, best_of=None, rank_by=None, prompt_logprobs=None)
    return dataclasses.replace(after(one, length - seq.prompt_len), min_tokens=least, max_tokens=room)


def num_forks(n: int, most: int) -> int:
    """The number. Raises `RequestError`, for more than may ever wait `EngineOverloaded`."""
    n = integer("n", n, 1, rule="an integer >= 1")
    if n > most:
        raise EngineOverloaded(
            f"Request queue is full: {n} forks are more than may wait (max_queue_size={most}). "
            "Ask for fewer, or raise the limit.",
            _LONG_S,
        )
    return n


def forkable(channel: Channel | None, request_id: str) -> Channel:
    """The channel of a request that can be forked as far as its caller's thread knows. Raises `RequestError`."""
    if channel is None or channel.ended:
        raise RequestError(_ENDED.format(request_id))
    if channel.status is RequestStatus.QUEUED:
        raise RequestError(_NOT_BEGUN.format(request_id))
    return channel
