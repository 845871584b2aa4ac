"""`Fork`: requests that continue what another request has generated, sharing its K/V.

Owns the branch point, common to all branches, and the inherited parameters. Created on the caller's thread; the
engine's thread finds the branch point once. Called by `InferenceEngine` and `EngineCore`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

from penstock.api.arguments import check_params
from penstock.api.channel import Channel, RequestStatus
from penstock.api.prompt import PromptInput
from penstock.engine.requests.input_processor import InputProcessor
from penstock.engine.requests.request import Request
from penstock.errors import EngineOverloaded, RequestError, described
from penstock.generation import Params
from penstock.processors import params_after
from penstock.sampling import SamplingParams
from penstock.scheduling.admission import QueuePlace
from penstock.sequence import Sequence, Status
from penstock.values import integer, token_ids

_RETRY_AFTER_S = 60.0  # reported where waiting does not help
_ENDED = "request {} has ended: fork it while it runs, or generate() from its output_ids"
_NOT_BEGUN = "request {} has no tokens yet: fork it after its first delta"


class BranchPoint(NamedTuple):
    """Where forks branch off: prompt and text of every fork, and the remaining parameters of its origin.

    The last `num_continued` tokens are output, which a grammar takes in first.
    """

    origin: Request
    sequence: Sequence
    text: str | None
    tokens: list[int]
    num_continued: int
    params: SamplingParams | None


class Fork:
    """Branches of completion `index` of a request, after its first `at` tokens (None: after all so far).

    The token ids of `append` are added there. Raises `RequestError` for invalid arguments.
    """

    def __init__(self, origin_id: str, *, index: int, at: int | None, append: SequenceOf[int]) -> None:
        self.origin_id = origin_id
        self._index = integer("index", index, 0, rule="the number of a completion, an integer >= 0")
        self._at = None if at is None else integer("at", at, 0, rule="a number of tokens, an integer >= 0, or None")
        self._append = list(token_ids("append", append))
        self._point: BranchPoint | None = None

    def new_requests(self, request_ids: Iterable[str], origin: Channel, params: Params) -> list[Request]:
        """Requests for `branch`, with the priority and deadline of their origin. Raises `RequestError`."""
        params, now, ids = check_params(params), time.monotonic(), origin.prompt_token_ids
        return [
            Request(
                id=request_id,
                prompt=PromptInput(token_ids=ids),
                params=params,
                channel=Channel(request_id, origin.priority, origin.deadline),
                arrival=now,
                place=QueuePlace(request_id, len(ids), origin.priority, origin.deadline),
            )
            for request_id in request_ids
        ]

    def branch(self, request: Request, origin: Request | None, inputs: InputProcessor) -> Request:
        """Complete a request as one of the branches. Raises `RequestError` if it cannot branch off."""
        if self._point is None:
            self._point = self._find_point(origin, inputs)
        point = self._point
        params = point.params if request.params is None else request.params
        if params is None:
            raise RequestError(
                f"max_tokens of request {self.origin_id} leaves no room after {len(point.tokens)} tokens: "
                "pass params for the fork"
            )
        return dataclasses.replace(
            request,
            prompt=PromptInput(point.text, point.tokens),
            params=params,
            seed=point.sequence.seed,
            sample_indices=point.origin.sample_indices,
            origin=point.sequence,
            num_continued=point.num_continued if _continues(params, point.sequence.params) else 0,
            namespace=point.origin.namespace,
            priority=point.origin.priority,
            deadline=point.origin.deadline,
        )

    def _find_point(self, origin: Request | None, inputs: InputProcessor) -> BranchPoint:
        if origin is None:
            raise RequestError(_ENDED.format(self.origin_id))
        if origin.search is not None:
            raise RequestError(f"request {self.origin_id} is a beam search: fork one that samples")
        seq = self._completion(origin)
        at = seq.num_generated if self._at is None else self._at
        new_tokens = [*seq.tokens[seq.prompt_len : seq.prompt_len + at], *self._append]
        tokens = [*seq.tokens[: seq.prompt_len], *new_tokens]
        try:
            text = inputs.text_after(origin.channel.prompt, new_tokens, seq.params)
        except BaseException as error:  # a panic in the tokenizer library is not an `Exception`
            raise RequestError(f"the tokens of the fork could not be turned into text: {described(error)}") from error
        num_continued = origin.num_continued + len(new_tokens)
        return BranchPoint(origin, seq, text, tokens, num_continued, _remaining_params(seq, at, len(tokens)))

    def _completion(self, origin: Request) -> Sequence:
        """The sequence to branch off from, which has at least `at` tokens."""
        assert origin.collector is not None or not origin.sequences
        if not origin.sequences or not origin.sequences[0].num_generated:
            raise RequestError(_NOT_BEGUN.format(self.origin_id))
        is_shared = len(origin.sequences) == 1  # identical greedy completions are computed once
        if not 0 <= self._index < (origin.sequences[0].params.n if is_shared else len(origin.sequences)):
            raise RequestError(f"request {self.origin_id} has no completion {self._index}")
        seq = origin.sequences[0 if is_shared else self._index]
        if seq.status is Status.FINISHED:
            raise RequestError(f"completion {self._index} of request {self.origin_id} has ended: fork a running one")
        if self._at is not None and not 0 <= self._at <= seq.num_generated:
            raise RequestError(f"at={self._at} exceeds the {seq.num_generated} tokens generated so far")
        return seq


def _continues(params: Params, origin: SamplingParams) -> bool:
    """Whether a fork goes on with the grammar of its origin, instead of beginning one of its own."""
    if not isinstance(params, SamplingParams):
        return False
    own = params.structured_outputs, params.reasoning_end
    return own == (origin.structured_outputs, origin.reasoning_end)


def _remaining_params(seq: Sequence, at: int, length: int) -> SamplingParams | None:
    """The parameters of a sequence with its remaining length; None if nothing remains."""
    tokens_left = seq.max_len - length
    if tokens_left < 1:
        return None
    min_tokens = min(tokens_left, max(0, seq.params.min_tokens - at))
    single = dataclasses.replace(seq.params, n=1, best_of=None, rank_by=None, prompt_logprobs=None)
    return dataclasses.replace(
        params_after(single, length - seq.prompt_len), min_tokens=min_tokens, max_tokens=tokens_left
    )


def check_num_forks(n: int, max_queue_size: int) -> int:
    """Return the number. Raises `RequestError`, or `EngineOverloaded` above the queue's limit."""
    n = integer("n", n, 1, rule="an integer >= 1")
    if n > max_queue_size:
        raise EngineOverloaded(
            f"Request queue is full: {n} forks, and at most {max_queue_size} requests may wait. Ask for fewer.",
            _RETRY_AFTER_S,
        ).with_hint("To let more requests wait, raise max_queue_size.")
    return n


def forkable(channel: Channel | None, request_id: str) -> Channel:
    """The channel of a request that, as far as the caller's thread knows, can be forked. Raises `RequestError`."""
    if channel is None or channel.ended:
        raise RequestError(_ENDED.format(request_id))
    if channel.status is RequestStatus.QUEUED:
        raise RequestError(_NOT_BEGUN.format(request_id))
    return channel
