"""`ResponseStore`: responses that may be retrieved and continued, within bounds for each namespace.

Kept as JSON text, so that their size is known. Beyond a bound, the least recently used response goes; using
a response also uses those that it continues. Used on the server's loop only.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import cast

from pydantic_core import from_json, to_json

Item = dict[str, object]


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response, the items of its own input, and the response that it continues."""

    body: bytes
    input_items: bytes
    previous_id: str | None = None

    @classmethod
    def of(cls, body: object, input_items: list[Item], previous_id: str | None) -> StoredResponse:
        """From plain values."""
        return cls(to_json(body, inf_nan_mode="null"), to_json(input_items, inf_nan_mode="null"), previous_id)

    @property
    def num_bytes(self) -> int:
        """The size that counts against the bound."""
        return len(self.body) + len(self.input_items)

    def response(self) -> Item:
        """The response as it was sent."""
        return cast(Item, from_json(self.body))

    def items(self) -> list[Item]:
        """The items of its own input."""
        return cast(list[Item], from_json(self.input_items))


class _Shelf:
    """The responses of one namespace, least recently used first."""

    def __init__(self) -> None:
        self.responses: OrderedDict[str, StoredResponse] = OrderedDict()
        self.num_bytes = 0

    def take(self, response_id: str) -> StoredResponse | None:
        response = self.responses.pop(response_id, None)
        if response is not None:
            self.num_bytes -= response.num_bytes
        return response

    def put(self, response_id: str, response: StoredResponse) -> None:
        self.responses[response_id] = response
        self.num_bytes += response.num_bytes


class ResponseStore:
    """At most `max_responses` and `max_bytes` for each namespace."""

    def __init__(self, max_responses: int, max_bytes: int) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._shelves: dict[str, _Shelf] = {}
        self._open: set[str] = set()  # ids of responses that are being created and were not deleted

    def begin(self, namespace: str, response_id: str, response: StoredResponse) -> None:
        """Keep a response that is still being created; `end` must follow."""
        self._open.add(response_id)
        self.put(namespace, response_id, response)

    def end(self, namespace: str, response_id: str, response: StoredResponse) -> None:
        """Keep the last state of a response, unless it was deleted meanwhile."""
        if response_id in self._open:
            self._open.discard(response_id)
            self.put(namespace, response_id, response)

    def put(self, namespace: str, response_id: str, response: StoredResponse) -> None:
        """Keep a response, in place of an earlier state of it."""
        shelf = self._shelves.setdefault(namespace, _Shelf())
        shelf.take(response_id)
        shelf.put(response_id, response)
        while len(shelf.responses) > self._max_responses or shelf.num_bytes > self._max_bytes:
            shelf.take(next(iter(shelf.responses)))

    def get(self, namespace: str, response_id: str) -> StoredResponse | None:
        """A response; None if it was never kept, or is kept no longer."""
        shelf = self._shelves.get(namespace)
        response = shelf.responses.get(response_id) if shelf else None
        if shelf and response:
            shelf.responses.move_to_end(response_id)
        return response

    def delete(self, namespace: str, response_id: str) -> bool:
        """Whether there was such a response."""
        self._open.discard(response_id)
        shelf = self._shelves.get(namespace)
        return shelf is not None and shelf.take(response_id) is not None

    def conversation(self, namespace: str, response_id: str, max_bytes: int) -> list[Item]:
        """All items up to the end of this response.

        Raises `KeyError` with the id of one that is not kept, and `OverflowError` beyond `max_bytes`.
        """
        links: list[StoredResponse] = []
        next_id: str | None = response_id
        while next_id is not None:
            link = self.get(namespace, next_id)
            if link is None:
                raise KeyError(next_id)
            max_bytes -= link.num_bytes
            if max_bytes < 0:
                raise OverflowError
            links.append(link)
            next_id = link.previous_id
        items: list[Item] = []
        for link in reversed(links):
            items += [*link.items(), *cast(list[Item], link.response()["output"])]
        return items
