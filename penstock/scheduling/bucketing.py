"""Padded batches: which lengths go together, what padding costs, and the padded tensors themselves.

For programs that run a model themselves; the engine pads nothing. Pure functions, except `SequenceBucketer`, which
keeps items until they are taken. Imports no tensor library: new tensors come from the caller's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from penstock.errors import RequestError, RequestTooLarge

Item = tuple[Any, int]  # anything, and its length
Tensor = Any  # of a library that this module does not import


def similar(lengths: Iterable[int], bucket_size: int) -> list[list[int]]:
    """`lengths` in ascending groups, within each of which they differ by at most `bucket_size`; greedy from below.

    No partition into such groups has fewer.
    """
    groups: list[list[int]] = []
    for length in sorted(lengths):
        if groups and length - groups[-1][0] <= bucket_size:
            groups[-1].append(length)
        else:
            groups.append([length])
    return groups


class SequenceBucketer:
    """Keeps (item, length) pairs and returns those of similar length together.

    `bucket_size` is the largest difference of lengths within a bucket. Buckets follow from the items present, so
    lengths on both sides of some fixed border still share one: 50, 60, 120 and 130 are two buckets of size 64.
    """

    def __init__(self, bucket_size: int = 128) -> None:
        if bucket_size < 0:
            raise RequestError(f"bucket_size must be 0 or more, got {bucket_size}")
        self.bucket_size = bucket_size
        self._items: list[Item] = []  # in order of arrival

    def add_sequence(self, item: object, length: int) -> None:
        """Keep an item. Raises `RequestError` for a length below 1."""
        if length < 1:
            raise RequestError(f"a sequence has at least 1 token, got {length}")
        self._items.append((item, length))

    @property
    def buckets(self) -> dict[int, list[Item]]:
        """The items by bucket, in order of arrival; a bucket's key is its greatest length."""
        buckets: dict[int, list[Item]] = {}
        for group in similar((length for _, length in self._items), self.bucket_size):
            buckets[group[-1]] = [entry for entry in self._items if group[0] <= entry[1] <= group[-1]]
        return buckets

    def get_batch_from_bucket(self, max_batch_size: int) -> tuple[list[Item], int]:
        """Take up to `max_batch_size` items, oldest first, from the oldest item's bucket, and its greatest length.

        ([], 0) when there are none. Nothing starves: the oldest item is always taken.
        """
        buckets = self.buckets
        if not buckets or max_batch_size < 1:
            return [], 0
        _, oldest_length = self._items[0]
        key = min(length for length in buckets if length >= oldest_length)
        batch = buckets[key][:max_batch_size]
        self._items = [entry for entry in self._items if not any(entry is member for member in batch)]
        return batch, key

    def get_all_items(self) -> list[Item]:
        """All items, in order of arrival."""
        return list(self._items)

    def clear(self) -> None:
        """Drop all items."""
        self._items.clear()


def calculate_padding_efficiency(sequence_lengths: Sequence[int]) -> dict[str, float]:
    """What padding these lengths to the longest costs.

    total_tokens, padding_tokens, efficiency and waste_ratio (fractions of the computed tokens, together 1), max_length,
    min_length, avg_length, length_variance (of the population). {} for no lengths.
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
    input_ids_list: Sequence[Tensor],
    attention_masks_list: Sequence[Tensor] | None = None,
    padding_token_id: int = 0,
    max_length: int | None = None,
    device: object = None,
    *,
    padding_side: str = "right",
) -> dict[str, Tensor]:
    """`input_ids` [B, L] and `attention_mask` int64 [B, L] of token tensors [N] or [1, N] of any lengths.

    L is `max_length`, or the length of the longest. Models that continue the last column want `padding_side="left"`. {}
    for no tensors. Raises `RequestTooLarge` for one that is longer than `max_length`: tokens are never cut off.
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
        columns = slice(0, len(row)) if padding_side == "right" else slice(width - len(row), width)
        row_mask = attention_masks_list[i] if attention_masks_list is not None else None
        ids[i, columns] = row.to(ids.device)
        mask[i, columns] = 1 if row_mask is None else row_mask.reshape(-1).long().to(ids.device)
    return {"input_ids": ids, "attention_mask": mask}
