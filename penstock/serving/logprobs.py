"""Log probabilities in the shapes of OpenAI's two APIs. An impossible token has -9999, since JSON has no infinity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from penstock.outputs import Logprob

LOWEST = -9999.0


def finite(logprob: float) -> float:
    """The value, or the lowest one that is written."""
    return max(logprob, LOWEST)


def best(entry: Mapping[int, Logprob], count: int) -> list[tuple[int, Logprob]]:
    """The `count` most likely tokens of a position; the chosen one is not added to them."""
    return sorted((item for item in entry.items() if item[1].rank <= count), key=lambda item: item[1].rank)


def chat_logprobs(
    ids: Iterable[int], entries: Iterable[Mapping[int, Logprob]], top: int, as_ids: bool = False
) -> dict[str, object]:
    """A `logprobs` object of a chat completion; with `as_ids` tokens are named by their ids."""
    content = [
        {**_token(token, entry[token], as_ids), "top_logprobs": [_token(*item, as_ids) for item in best(entry, top)]}
        for token, entry in zip(ids, entries, strict=True)
    ]
    return {"content": content, "refusal": None}


def _token(token: int, entry: Logprob, as_ids: bool) -> dict[str, object]:
    text = token_text(token, entry, as_ids)
    return {"token": text, "logprob": finite(entry.logprob), "bytes": list(text.encode(errors="replace"))}


def token_text(token: int, entry: Logprob, as_ids: bool = False) -> str:
    """The token's text, or its id where there is no tokenizer, or with `as_ids`."""
    return f"token_id:{token}" if as_ids or entry.decoded_token is None else entry.decoded_token


class CompletionLogprobs:
    """Builds the `logprobs` objects of a text completion, piece by piece; offsets count characters of the text.

    With `as_ids` tokens are named by their ids.
    """

    def __init__(self, top: int, offset: int = 0, as_ids: bool = False) -> None:
        self._top = top
        self._offset = offset
        self._as_ids = as_ids

    def add(
        self, ids: Sequence[int], entries: Sequence[Mapping[int, Logprob] | None], first_text: str = ""
    ) -> dict[str, object]:
        """The object for these tokens, which follow the earlier ones. The first may have no entry, only a text."""
        texts, offsets, logprobs, tops = [], [], [], []
        for token, entry in zip(ids, entries, strict=True):
            text = token_text(token, entry[token], self._as_ids) if entry else first_text
            texts.append(text)
            offsets.append(self._offset)
            self._offset += len(text)
            logprobs.append(finite(entry[token].logprob) if entry else None)
            tops.append(self._tops(token, entry) if entry else None)
        return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}

    def _tops(self, token: int, entry: Mapping[int, Logprob]) -> dict[str, float]:
        """The most likely tokens, and the chosen one."""
        items = dict(best(entry, self._top)) | {token: entry[token]}
        return {token_text(*item, self._as_ids): finite(item[1].logprob) for item in items.items()}
