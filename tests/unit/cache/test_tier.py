"""Which blocks lie on the host, by hand: places are numbered from 0, digests are single letters."""

from __future__ import annotations

from penstock.cache.tier import HostTier


def filled(num_places: int, keys: bytes) -> HostTier:
    """A tier into which blocks 10, 11, ... with these digests were moved in one step."""
    tier = HostTier(num_places)
    for i, key in enumerate(keys):
        tier.put(bytes([key]), 10 + i)
    tier.commit()
    tier.check()
    return tier


def test_evicted_blocks_take_free_places() -> None:
    tier = HostTier(3)
    tier.put(b"a", 7)
    tier.put(b"b", 5)
    assert tier.moves() == (((7, 0), (5, 1)), ())
    assert (len(tier), tier.empty_places()) == (2, [])
    tier.commit()
    assert tier.moves() == ((), ())
    assert (tier.num_moved_out, tier.num_moved_in) == (2, 0)
    assert b"a" in tier
    assert b"c" not in tier


def test_the_least_recently_used_one_gives_way() -> None:
    tier = filled(2, b"ab")
    tier.put(b"a", 10)
    assert tier.moves() == ((), ()), "it lies there already"
    tier.put(b"c", 12)
    assert tier.moves() == (((12, 1),), ())
    assert b"b" not in tier
    tier.check()


def test_a_move_that_loses_its_place_in_the_same_step_is_not_made() -> None:
    tier = HostTier(1)
    tier.put(b"a", 7)
    tier.put(b"b", 8)
    assert tier.moves() == (((8, 0),), ())
    tier.check()


def test_what_a_step_reads_keeps_its_place_until_the_step_is_over() -> None:
    tier = filled(2, b"ab")
    tier.hold([b"a", b"b"])
    tier.read(b"b", 4)
    tier.put(b"c", 12)
    tier.put(b"a", 10)
    assert tier.moves() == ((), ((1, 4),))
    assert b"c" not in tier
    assert len(tier) == 2, "what is being read is still there"
    tier.check()
    tier.commit()
    assert (tier.num_moved_in, len(tier)) == (1, 2)
    tier.put(b"c", 12)
    assert b"a" not in tier, "of those read in one step, the first is the oldest"
    tier.check()


def test_what_went_out_in_a_step_can_be_read_in_the_same_step() -> None:
    tier = HostTier(2)
    tier.put(b"a", 7)
    tier.hold([b"a"])
    tier.read(b"a", 8)
    assert tier.moves() == (((7, 0),), ((0, 8),))


def test_a_failed_step_leaves_what_it_did_not_write() -> None:
    tier = filled(3, b"a")
    tier.put(b"b", 5)
    tier.put(b"c", 6)
    tier.hold([b"a", b"c"])
    tier.rollback()
    assert (b"a" in tier, b"b" in tier, b"c" in tier, len(tier)) == (True, False, False, 1)
    assert tier.num_moved_out == 1
    tier.check()


def test_clearing_in_mid_step_frees_every_place() -> None:
    tier = filled(3, b"ab")
    tier.hold([b"a"])
    tier.read(b"a", 3)
    tier.put(b"c", 5)
    tier.clear()
    tier.commit()
    assert (len(tier), sorted(tier.empty_places())) == (0, [0, 1, 2])
    tier.check()


def test_places_are_used_again_before_new_ones() -> None:
    tier = filled(1 << 40, b"ab")
    tier.clear()
    tier.put(b"c", 12)
    assert tier.moves() == (((12, 1),), ())
    assert tier.empty_places() == [0]


def test_without_places_nothing_is_kept() -> None:
    tier = HostTier()
    tier.put(b"a", 7)
    assert (b"a" in tier, tier.moves()) == (False, ((), ()))
