"""`truncated`: a conversation without its oldest turns, so that it fits (`truncation: "auto"`)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from penstock.serving.responses.items import Item


async def truncated(
    items: Sequence[Item], limit: int, num_tokens: Callable[[Sequence[Item]], Awaitable[int]]
) -> Sequence[Item]:
    """The items from the earliest user message on with which `num_tokens` is at most `limit`.

    System messages at the beginning stay. If nothing fits, the last turn remains. Counts tokens a logarithmic number of
    times.
    """
    if await num_tokens(items) <= limit:
        return items
    num_leading = next((i for i, item in enumerate(items) if item.get("role") not in ("system", "developer")), 0)
    starts = [i for i, item in enumerate(items) if item.get("role") == "user" and i > num_leading]
    candidates = [[*items[:num_leading], *items[start:]] for start in starts[-1:]] or [list(items)]
    low, high = 0, len(starts) - 1
    while low < high:
        middle = (low + high) // 2
        candidate = [*items[:num_leading], *items[starts[middle] :]]
        if await num_tokens(candidate) <= limit:
            candidates.append(candidate)
            high = middle
        else:
            low = middle + 1
    return candidates[-1]
