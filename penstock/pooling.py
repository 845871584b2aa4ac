"""`PoolingParams`: the parameters of a request for an embedding, which generates nothing.

Owns their names and ranges. Built by `engine/requests/embedding.py`; read by every layer below as the parameters of any
other sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from penstock.sampling import SamplingParams
from penstock.values import bare, refused

POOLINGS = ("mean", "last")


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams(SamplingParams):
    """How to pool the final hidden states of a prompt: their "mean", or the "last" token's.

    `max_tokens` is 0 and `detokenize` False, whatever is passed. Raises `RequestError` naming the invalid value.
    """

    generates: ClassVar[bool] = False
    pooling: str = "mean"

    def __post_init__(self) -> None:
        SamplingParams.__post_init__(self)  # `super()` does not work in a class with slots
        pooling = bare(self.pooling)
        if not isinstance(pooling, str) or pooling not in POOLINGS:
            raise refused("pooling", pooling, '"mean" or "last"')
        for name, value in (("pooling", pooling), ("max_tokens", 0), ("detokenize", False)):
            object.__setattr__(self, name, value)
