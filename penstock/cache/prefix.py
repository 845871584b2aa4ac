"""`PrefixIndex`: which block holds the K/V of which tokens, given everything before them.

Owns the map from chained digests to blocks and back. A digest covers the namespace, the weight version and every
token up to the block's end, so equal digests mean equal K/V. Never counts references. Called by `CacheManager` alone.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from hashlib import blake2b

DIGEST_BYTES = 32


def digest(parent: bytes, tokens: Sequence[int]) -> bytes:
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

    def root(self, *scope: object) -> bytes:
        """Digest of the empty prefix in a scope (namespace and what else separates), under the current weights."""
        text = repr((self.weight_version, *scope)).encode()
        return blake2b(text, digest_size=DIGEST_BYTES, person=b"penstock-root").digest()

    def get(self, key: bytes) -> int | None:
        """The block with this digest, or None."""
        return self._blocks.get(key)

    def put(self, key: bytes, block: int) -> bool:
        """Register a block; False when an equal one is registered already, which then stays."""
        if key in self._blocks:
            return False
        assert block not in self._digests, f"block {block} is registered twice"
        self._blocks[key] = block
        self._digests[block] = key
        return True

    def remove(self, block: int) -> None:
        """Forget a registered block."""
        del self._blocks[self._digests.pop(block)]
