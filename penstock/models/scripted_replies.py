"""`ScriptedReplies`: a scripted model that answers with given texts, for tests of clients and agents.

Needs a tokenizer, unlike `ScriptedModel` itself. A reply is chosen when a sequence samples its first token.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

from penstock.models.scripted import ScriptedModel
from penstock.step import Row

Encode = Callable[[str], list[int]]
Decode = Callable[[list[int]], str]


class ScriptedReplies(ScriptedModel):
    """Answers with `replies`: a list is cycled through, a mapping is searched for the key that the prompt ends with.

    Of a mapping, the key whose last occurrence in the prompt is latest counts, so it may be the last user message, or
    part of it; the key "" is the reply if there is no other. Every reply ends with `eos`. Raises `ValueError` without
    replies.
    """

    def __init__(
        self,
        replies: Sequence[str] | Mapping[str, str],
        encode: Encode,
        decode: Decode,
        eos: int,
        *,
        vocab_size: int,
        max_length: int = 1 << 20,
        step_s: float = 0.0,
    ) -> None:
        if not replies:
            raise ValueError("there are no replies")
        options = {"vocab_size": vocab_size, "max_length": max_length}
        super().__init__((), eos_token_ids=frozenset({eos}), step_s=step_s, **options)
        self._eos = eos
        self._decode = decode
        texts = replies.values() if isinstance(replies, Mapping) else replies
        self._tokens = [[*encode(text), eos] if text else [eos] for text in texts]
        self._keys = list(replies) if isinstance(replies, Mapping) else None
        self._turns: Iterator[int] = itertools.cycle(range(len(self._tokens)))
        self._chosen: dict[int, list[int]] = {}  # by sequence id

    def forget(self, seq_id: int) -> None:
        """Drop the choice for a sequence that ended."""
        self._chosen.pop(seq_id, None)

    def scripted_token(self, row: Row, tokens: Sequence[int]) -> int:
        """The next token of the reply to this row's prompt."""
        reply = self._chosen.get(row.seq_id)
        if reply is None:
            reply = self._chosen[row.seq_id] = self._choose(list(tokens[: row.prompt_len]))
        position = len(tokens) - row.prompt_len
        return reply[position] if position < len(reply) else self._eos

    def _choose(self, prompt: list[int]) -> list[int]:
        if self._keys is None:
            return self._tokens[next(self._turns)]
        text = self._decode(prompt)
        positions = {key: text.rfind(key) if key else -1 for key in self._keys}
        latest = max(self._keys, key=lambda key: (positions[key], not key))
        has_reply = positions[latest] >= 0 or not latest
        return self._tokens[self._keys.index(latest)] if has_reply else [self._eos]
