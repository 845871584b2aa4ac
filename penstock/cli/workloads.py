"""The workloads of `penstock bench`: fixed sizes, random token ids, greedy, EOS ignored, so that all do the same work.

Pure functions of a name, a repeat and a model's limits. Never the same ids in two repeats: no cache of the last repeat
can help, while whatever requests share within one repeat may be shared.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from penstock.errors import ConfigurationError

# One request: its prompt's token ids and how many new tokens it wants.
Work = Sequence[tuple[list[int], int]]
LOWEST_ID, HIGHEST_ID = 3, 7000


@dataclass(frozen=True, slots=True)
class Workload:
    """Tokens per request: `shared` by all, then `own` of each, then `output` new ones.

    `ragged` draws each request's own and output tokens uniformly from an eighth of these numbers up to all of them.
    """

    name: str
    num_requests: int
    shared: int
    own: int
    output: int
    ragged: bool = False

    @property
    def longest(self) -> int:
        """Most tokens that one request may come to."""
        return self.shared + self.own + self.output

    def fitted(self, max_length: int) -> Workload:
        """The same shape within `max_length` tokens per request. Raises `ConfigurationError` below 2."""
        if max_length < 2:
            raise ConfigurationError(f"a model of {max_length} tokens has no room for prompt and output: use another")
        if self.longest <= max_length:
            return self
        scale = max_length / self.longest
        output = max(1, int(self.output * scale))
        own = min(max(1, int(self.own * scale)), max_length - output)
        return replace(self, shared=min(int(self.shared * scale), max_length - own - output), own=own, output=output)

    def draw(self, repeat: int, vocab_size: int) -> Work:
        """The requests of one repeat: lengths are the same in all repeats, ids in none."""
        lengths, ids = random.Random(self.name), random.Random(f"{self.name}/{repeat}")
        prefix = _ids(ids, self.shared, vocab_size)
        sizes = [(self._size(lengths, self.own), self._size(lengths, self.output)) for _ in range(self.num_requests)]
        return [(prefix + _ids(ids, own, vocab_size), output) for own, output in sizes]

    def _size(self, rng: random.Random, most: int) -> int:
        return rng.randint(max(1, most // 8), most) if self.ragged else most


def _ids(rng: random.Random, count: int, vocab_size: int) -> list[int]:
    """Ids that any tokenizer would call ordinary, as far as the vocabulary has such."""
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
    """K/V cache tokens with which the largest of these workloads never waits for room."""
    return max(sum(-(-(len(prompt) + output) // block_size) * block_size for prompt, output in work) for work in works)
