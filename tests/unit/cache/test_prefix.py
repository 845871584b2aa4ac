"""Digests tell apart everything that K/V depend on."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.cache.prefix import Chains, PrefixIndex, digest
from tests.unit.cache.hand import sequence


def test_digest_covers_parent_order_and_width_of_tokens() -> None:
    root = PrefixIndex().root("")
    digests = [
        digest(root, [1, 2]),
        digest(root, [2, 1]),
        digest(root, [1]),
        digest(root, [1 + 2 * 2**32]),
        digest(digest(root, [1]), [2]),
    ]
    assert len(set(digests)) == 5
    assert digest(root, [1, 2]) == digest(root, [1, 2])


def test_roots_differ_by_namespace_adapter_request_and_weights() -> None:
    index, newer = PrefixIndex(), PrefixIndex(weight_version=1)
    scopes: list[tuple[Any, ...]] = [("",), ("a",), ("", "a"), ("", "a, 1"), ("a", "", 1), ("", "a", 1), ("a, '', 1",)]
    roots = [root.root(*scope) for root in (index, newer) for scope in scopes]
    assert len(set(roots)) == len(roots)
    assert index.root("") == PrefixIndex(weight_version=0).root("")


def test_first_registration_stays() -> None:
    index = PrefixIndex()
    assert index.put(b"x", 3)
    assert not index.put(b"x", 4)
    assert (index.get(b"x"), len(index), list(index)) == (3, 1, [3])
    index.remove(3)
    assert index.get(b"x") is None
    with pytest.raises(KeyError):
        index.remove(3)


def test_a_chain_is_kept_until_the_tokens_of_its_sequence_may_change() -> None:
    index = PrefixIndex()
    chains, seq, other = Chains(index, 2, True), sequence([1, 2, 3, 4]), sequence([1, 2, 3, 4])
    chain = chains.of(seq)
    chains.extend(chain, seq, 2)
    chains.forget(other)
    assert chains.of(seq) is chain, "another sequence's tokens are nothing to it"
    chains.forget(seq)
    seq.tokens[:] = [5, 6, 7, 8]
    renewed = chains.of(seq)
    chains.extend(renewed, seq, 2)
    first = digest(index.root(""), [5, 6])
    assert renewed == [index.root(""), first, digest(first, [7, 8])]


def test_new_weights_end_every_chain() -> None:
    index = PrefixIndex()
    chains, seq = Chains(index, 2, True), sequence([1, 2, 3])
    old = chains.of(seq)
    index.weight_version = 1
    chains.forget()
    assert chains.of(seq) == [index.root("")] != old
