"""The workloads of `penstock bench`: fixed sizes, random token ids, greedy, no stop at EOS: every run does equal work.

Pure functions of a name, a repeat and a model's limits. No two repeats have the same ids, so that no cache helps from
one repeat to the next; what requests share within a repeat may be shared.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from penstock.errors import ConfigurationError

# The prompt's token ids and the number of new tokens of each request.
Work = Sequence[tuple[list[int], int]]
LOWEST_ID, HIGHEST_ID = 3, 7000


@dataclass(frozen=True, slots=True)
class Workload:
    """Sizes in tokens: a prefix that all requests share, `unique` prompt tokens of each, and `output` new ones.

    With `ragged` each request's unique and output tokens are drawn uniformly between an eighth of these numbers and all
    of them.
    """

    name: str
    num_requests: int
    shared: int
    unique: int
    output: int
    ragged: bool = False

    @property
    def max_length(self) -> int:
        """Maximum tokens of one request."""
        return self.shared + self.unique + self.output

    def fitted(self, limit: int) -> Workload:
        """The same proportions within `limit` tokens per request. Raises `ConfigurationError` below 2."""
        if limit < 2:
            raise ConfigurationError(
                f"a context of {limit} tokens is too short for prompt and output: use another model"
            )
        if self.max_length <= limit:
            return self
        scale = limit / self.max_length
        output = max(1, int(self.output * scale))
        unique = min(max(1, int(self.unique * scale)), limit - output)
        shared = min(int(self.shared * scale), limit - unique - output)
        return replace(self, shared=shared, unique=unique, output=output)

    def draw(self, repeat: int, vocab_size: int) -> Work:
        """The requests of one repeat: the same lengths in all repeats, but other ids."""
        lengths, ids = random.Random(self.name), random.Random(f"{self.name}/{repeat}")
        prefix = _ids(ids, self.shared, vocab_size)
        sizes = [(self._size(lengths, self.unique), self._size(lengths, self.output)) for _ in range(self.num_requests)]
        return [(prefix + _ids(ids, unique, vocab_size), output) for unique, output in sizes]

    def _size(self, rng: random.Random, size: int) -> int:
        return rng.randint(max(1, size // 8), size) if self.ragged else size


def _ids(rng: random.Random, count: int, vocab_size: int) -> list[int]:
    """Ids of ordinary tokens in any tokenizer, as far as the vocabulary allows."""
    high = min(vocab_size, HIGHEST_ID)
    low = min(LOWEST_ID, high - 1)
    return [rng.randrange(low, high) for _ in range(count)]


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("single", 1, 0, 16, 64),
        Workload("prefill", 1, 0, 512, 1),
        Workload("batch8", 8, 0, 128, 64),
        Workload("batch32", 32, 0, 128, 64),
        Workload("ragged32", 32, 0, 256, 96, ragged=True),
        Workload("prefix32", 32, 512, 32, 32),
    )
}
WARM_UP = Workload("warm-up", 2, 0, 32, 8)


def cache_tokens(works: Sequence[Work], block_size: int) -> int:
    """The size of a K/V cache, in tokens, in which the largest of these workloads fits."""
    return max(sum(-(-(len(prompt) + output) // block_size) * block_size for prompt, output in work) for work in works)


def poisson_arrivals(rate: float, count: int, seed: int) -> list[float]:
    """When `count` requests arrive, in seconds from the start, at `rate` per second on average, independently.

    The gaps of a Poisson process are exponential. The same seed gives the same pattern at every rate, only faster.
    """
    rng = random.Random(seed)
    return list(accumulate(rng.expovariate(1.0) / rate for _ in range(count)))
