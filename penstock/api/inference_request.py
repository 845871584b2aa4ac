"""`InferenceRequest`: an ended request with what was submitted, for `submit_request` and `submit_request_async`.

Owns the record and its construction; runs nothing. Built by engines where a request is submitted and where it ends.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from penstock.api.arguments import check_callback
from penstock.api.channel import RequestStatus
from penstock.errors import RequestError, shown
from penstock.generation import Params
from penstock.outputs import RequestOutput
from penstock.sampling import RequestPriority


@dataclass(slots=True, kw_only=True)
class InferenceRequest(RequestOutput):
    """The result of a request, and what was submitted. `callback` and `metadata` are the caller's own objects.

    `created_at` is in seconds since the epoch. K/V stays in blocks that requests share: there is no `kv_cache`.
    """

    generation_config: Params = None
    priority: RequestPriority = RequestPriority.NORMAL
    created_at: float = 0.0
    callback: FinalCallback | None = None
    metadata: Mapping[str, object] = dataclasses.field(default_factory=dict)
    status: RequestStatus = RequestStatus.COMPLETED

    @property
    def input_ids(self) -> list[list[int]]:
        """One row: the prompt's ids."""
        return [self.prompt_token_ids]

    @property
    def attention_mask(self) -> list[list[int]]:
        """Ones in the shape of `input_ids`: prompts are not padded."""
        return [[1] * len(self.prompt_token_ids)]

    @property
    def generated_length(self) -> int:
        """The number of generated tokens of all completions."""
        return sum(len(completion.token_ids) for completion in self.outputs)

    @property
    def processing_start(self) -> float | None:
        """When the request left the queue, in seconds since the epoch; None if it never did."""
        return self._time_of(self.metrics.queued_s)

    @property
    def processing_end(self) -> float | None:
        """When the request ended, in seconds since the epoch; None if it failed before it was admitted."""
        return self._time_of(self.metrics.total_s)

    def _time_of(self, seconds: float | None) -> float | None:
        return None if seconds is None else self.created_at + seconds


# A function that receives a request once it has ended.
FinalCallback = Callable[[InferenceRequest], Awaitable[None] | None]


@dataclass(frozen=True, slots=True)
class Submission:
    """What a caller submitted, and when. Raises `RequestError` for a callback or metadata that is none."""

    generation_config: Params
    priority: RequestPriority
    callback: FinalCallback | None = None
    metadata: Mapping[str, object] | None = None
    created_at: float = dataclasses.field(default_factory=time.time)

    def __post_init__(self) -> None:
        check_callback(self.callback)
        if not isinstance(self.metadata, Mapping | None):
            raise RequestError(f"metadata must be a mapping, got {shown(self.metadata)}")

    def ended(self, output: RequestOutput, status: RequestStatus) -> InferenceRequest:
        """The submitted request with its result."""
        return InferenceRequest(
            **{field.name: getattr(output, field.name) for field in dataclasses.fields(output)},
            generation_config=self.generation_config,
            priority=RequestPriority(self.priority),
            created_at=self.created_at,
            callback=self.callback,
            metadata={} if self.metadata is None else self.metadata,
            status=status,
        )
