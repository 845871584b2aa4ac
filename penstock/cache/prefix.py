"""`PrefixIndex`: which block holds the K/V of which tokens, given everything before them; `Chains`: their digests.

Owns the map from chained digests to blocks and back. A digest covers the namespace, the weight version, the adapter and
every token up to the block's end, so equal digests mean equal K/V. Never counts references. Called by `PrefixCache` and
`CacheManager`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from hashlib import blake2b

from penstock.sequence import Sequence

DIGEST_BYTES = 32


def digest(parent: bytes, tokens: SequenceOf[int]) -> bytes:
    """Digest of a block with these tokens after a prefix with digest `parent`."""
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=DIGEST_BYTES).digest()


class PrefixIndex:
    """One block per digest and one digest per block."""

    def __init__(self, weight_version: int = 0) -> None:
        self.weight_version = weight_version
        self._blocks: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[int]:
        """The registered blocks, oldest registration first."""
        return iter(self._digests)

    def root(self, namespace: str, adapter: str = "", ancestor_id: int | None = None) -> bytes:
        """Digest of the empty prefix in a namespace, under the current weights and an adapter ("": none).

        `adapter` names the adapter and its generation. With `ancestor_id`, the prefix is found only by the sequences of
        one request, of which that is the first. Everything besides tokens that K/V depend on is in here.
        """
        text = repr((self.weight_version, namespace, adapter, ancestor_id)).encode()
        return blake2b(text, digest_size=DIGEST_BYTES, person=b"penstock-root").digest()

    def get(self, key: bytes) -> int | None:
        """The block with this digest, or None."""
        return self._blocks.get(key)

    def put(self, key: bytes, block: int) -> bool:
        """Register a block; False if an equal one is registered already, which then stays."""
        if key in self._blocks:
            return False
        assert block not in self._digests, f"block {block} is registered twice"
        self._blocks[key] = block
        self._digests[block] = key
        return True

    def remove(self, block: int) -> bytes:
        """Unregister a block; returns its digest."""
        key = self._digests.pop(block)
        del self._blocks[key]
        return key


class Chains:
    """Digests of sequences: a chain holds the root of its scope, then one digest for each full block.

    With `shared`, all sequences of a namespace have the same scope; otherwise only those of one request.
    """

    def __init__(self, index: PrefixIndex, block_size: int, shared: bool) -> None:
        self._index = index
        self._block_size = block_size
        self._shared = shared
        self._latest: tuple[int, list[bytes]] = (-1, [])  # of the sequence looked up last, mostly the queue's head

    def of(self, seq: Sequence) -> list[bytes]:
        """The chain of a sequence, as far as it is known; `extend` makes it longer."""
        if self._latest[0] != seq.id:
            ancestor_id = None if self._shared else _ancestor_id(seq)
            self._latest = (seq.id, [self._index.root(seq.namespace, seq.adapter, ancestor_id)])
        return self._latest[1]

    def extend(self, chain: list[bytes], seq: Sequence, num_blocks: int) -> None:
        """Extend the chain of this sequence to `num_blocks` blocks."""
        size = self._block_size
        for i in range(len(chain) - 1, num_blocks):
            chain.append(digest(chain[i], seq.tokens[i * size : (i + 1) * size]))

    def forget(self, seq: Sequence | None = None) -> None:
        """Drop the chain of a sequence whose tokens may change; without one, drop all, because the weights changed."""
        if seq is None or self._latest[0] == seq.id:
            self._latest = (-1, [])


def _ancestor_id(seq: Sequence) -> int:
    """Id of the first of a request's sequences. Request ids are chosen by callers and may be used again."""
    while seq.parent is not None:
        seq = seq.parent
    return seq.id
