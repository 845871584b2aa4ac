"""Copies of one step: where each reads from, and which blocks they keep alive meanwhile."""

from __future__ import annotations

from penstock.cache.pool import BlockPool, Copies


def pool_of(held: int) -> BlockPool:
    """Blocks 0 to `held` - 1 are in use, two more are not."""
    pool = BlockPool(held + 2)
    for _ in range(held):
        pool.take()
    return pool


def test_copies_are_taken_once() -> None:
    copies = Copies(pool_of(3))
    copies.add(0, 1)
    assert copies.take() == ((0, 1),)
    copies.add(0, 2)
    assert copies.take() == ((0, 2),)
    assert copies.take() == ()


def test_a_copy_of_a_copy_reads_the_original() -> None:
    """They run in any order, before anything is written."""
    copies = Copies(pool_of(3))
    copies.add(0, 1)
    copies.add(1, 2)
    assert copies.take() == ((0, 1), (0, 2))


def test_the_source_is_held_until_the_step_is_over_and_is_nobodys_meanwhile() -> None:
    pool = pool_of(2)
    copies = Copies(pool)
    pool.share(0)
    assert copies.num_users(0) == 2
    copies.add(0, 1)
    assert (copies.num_users(0), copies.holds(), pool.refs(0)) == (1, {0: 1}, 2)
    copies.release()
    assert (copies.num_users(0), copies.holds(), pool.refs(0)) == (1, {}, 1)


def test_copies_that_nobody_took_are_dropped_with_their_step() -> None:
    copies = Copies(pool_of(2))
    copies.add(0, 1)
    copies.release()
    assert copies.take() == ()
