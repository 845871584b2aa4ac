"""Padded batches: which lengths go together, what padding costs, and the padded tensors themselves.

For programs that run a model themselves; the engine pads nothing. Pure but for `SequenceBucketer`, which keeps items
until they are taken. Imports no tensor library: tensors make their own kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from penstock.errors import RequestError, RequestTooLarge

Item = tuple[Any, int]


def similar(lengths: Iterable[int], bucket_size: int) -> list[list[int]]:
    """`lengths` in ascending groups, within each of which they differ by at most `bucket_size`; greedy from below.

    No partition of them into such groups has fewer.
    """
    groups: list[list[int]] = []
    for length in sorted(lengths):
        if groups and length - groups[-1][0] <= bucket_size:
            groups[-1].append(length)
        else:
            groups.append([length])
    return groups


class SequenceBucketer:
    """Keeps (item, length) pairs and gives those of similar length together.

    `bucket_size` is the largest difference of lengths within a bucket. Buckets follow from what is there, so that
    lengths on both sides of some fixed border still share one: 50, 60, 120 and 130 are two buckets of size 64.
    """

    def __init__(self, bucket_size: int = 128) -> None:
        if bucket_size < 0:
            raise RequestError(f"bucket_size must be 0 or more, got {bucket_size}")
        self.bucket_size = bucket_size
        self._items: list[Item] = []  # in order of arrival

    def add_sequence(self, item: Any, length: int) -> None:
        """Keep an item. Raises `RequestError` for a length below 1."""
        if length < 1:
            raise RequestError(f"a sequence has at least 1 token, got {length}")
        self._items.append((item, length))

    @property
    def buckets(self) -> dict[int, list[Item]]:
        """The items by bucket, in order of arrival; a bucket's key is its greatest length."""
        found: dict[int, list[Item]] = {}
        for group in similar((length for _, length in self._items), self.bucket_size):
            found[group[-1]] = [entry for entry in self._items if group[0] <= entry[1] <= group[-1]]
        return found

    def get_batch_from_bucket(self, max_batch_size: int) -> tuple[list[Item], int]:
        """Take up to `max_batch_size` items, longest here first, from the oldest one's bucket, and its greatest length.

        ([], 0) when there are none. Nobody starves: the oldest of all is always taken.
        """
        buckets = self.buckets
        if not buckets or max_batch_size < 1:
            return [], 0
        _, oldest = self._items[0]
        length = min(longest for longest in buckets if longest >= oldest)
        taken = buckets[length][:max_batch_size]
        self._items = [entry for entry in self._items if not any(entry is other for other in taken)]
        return taken, length

    def get_all_items(self) -> list[Item]:
        """All that are here, in order of arrival."""
        return list(self._items)

    def clear(self) -> None:
        """Forget all."""
        self._items.clear()


def calculate_padding_efficiency(sequence_lengths: Sequence[int]) -> dict[str, float]:
    """What padding these lengths to the longest costs.

    total_tokens, padding_tokens, efficiency and waste_ratio (shares of what is computed, together 1), max_length,
    min_length, avg_length, length_variance (of the population). {} of no lengths.
    """
    if not sequence_lengths:
        return {}
    count, total, longest = len(sequence_lengths), sum(sequence_lengths), max(sequence_lengths)
    mean = total / count
    return {
        "total_tokens": total,
        "padding_tokens": count * longest - total,
        "efficiency": total / (count * longest) if longest else 1.0,
        "waste_ratio": 1 - total / (count * longest) if longest else 0.0,
        "max_length": longest,
        "min_length": min(sequence_lengths),
        "avg_length": mean,
        "length_variance": sum((length - mean) ** 2 for length in sequence_lengths) / count,
    }


def create_padded_batch(
    input_ids_list: Sequence[Any],
    attention_masks_list: Sequence[Any] | None = None,
    padding_token_id: int = 0,
    max_length: int | None = None,
    device: Any = None,
    *,
    padding_side: str = "right",
) -> dict[str, Any]:
    """`input_ids` [B, L] and `attention_mask` int64 [B, L] of token tensors [N] or [1, N] of any lengths.

    L is `max_length`, or the longest of them. Models that continue the last column want `padding_side="left"`. {} of
    no tensors. Raises `RequestTooLarge` for one that is longer than `max_length`: tokens are never cut off.
    """
    if padding_side not in ("left", "right"):
        raise RequestError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
    rows = [ids.reshape(-1) for ids in input_ids_list]
    if not rows:
        return {}
    width = max(len(row) for row in rows)
    if max_length is not None and width > max_length:
        raise RequestTooLarge(f"a sequence of {width} tokens is longer than max_length={max_length}: shorten it")
    width = max_length or width
    ids = rows[0].new_full((len(rows), width), padding_token_id, device=device)
    mask = ids.new_zeros((len(rows), width)).long()
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if padding_side == "right" else slice(width - len(row), width)
        given = attention_masks_list[i] if attention_masks_list is not None else None
        ids[i, place] = row.to(ids.device)
        mask[i, place] = 1 if given is None else given.reshape(-1).long().to(ids.device)
    return {"input_ids": ids, "attention_mask": mask}
