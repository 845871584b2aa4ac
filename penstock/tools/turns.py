"""The records of a `Conversation`: its turns, where a chat template forks, and what a trainer reads.

Frozen; they know no engine and no tokenizer. Made by `Conversation`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat

from penstock.api.prompt import Message
from penstock.errors import RequestError
from penstock.outputs import CompletionOutput

NO_VERSION = -1  # of a token that was not sampled, and of every token if the engine counts no versions
_EXCERPT = 60  # characters
_Row = tuple[int, int, float, float, int]


@dataclass(frozen=True, slots=True)
class TemplateFork:
    """A chat template wrote something else for earlier turns than what the model has read and written.

    The texts have `position` characters in common, and differ first in turn number `turn`. There `kept` begins the text
    of the conversation so far and `rendered` the template's; both are excerpts.
    """

    turn: int
    position: int
    kept: str
    rendered: str

    def __str__(self) -> str:
        return (
            f"the chat template rewrites turn {self.turn}: {self.kept!r} became {self.rendered!r} at character "
            f"{self.position}"
        )


@dataclass(frozen=True, slots=True)
class TurnPrompt:
    """What a turn adds before its reply.

    `text` is all that the chat template writes up to the reply. `token_ids` are new in this turn; with `is_whole` they
    are the whole prompt, otherwise they follow the tokens of the earlier turns. `fork` is set if the template rewrote
    these.
    """

    messages: tuple[Message, ...]
    text: str = field(repr=False)
    token_ids: tuple[int, ...] = field(repr=False)
    is_whole: bool = False
    fork: TemplateFork | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """A prompt and its reply.

    `content` is the reply as the model wrote it, with special tokens but without the token that ended it, whose text is
    `ending`. `num_cached_tokens` of the whole prompt were in the prefix cache.
    """

    prompt: TurnPrompt
    reply: CompletionOutput
    content: str
    ending: str = ""
    num_cached_tokens: int = 0

    @property
    def text(self) -> str:
        """The reply without special tokens."""
        return self.reply.text

    @property
    def message(self) -> Message:
        """The reply as a chat message."""
        return {"role": "assistant", "content": self.content}

    @property
    def written(self) -> str:
        """The text after the turn: the template's, and then the model's."""
        return self.prompt.text + self.content + self.ending


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """The tokens of a conversation for a trainer: a prompt, and everything that followed it.

    All lists but the first have one entry per response token. `mask` is 1 for a token that the model sampled, and 0 for
    one that a later message brought. There the log probabilities are 0.0 and the version is -1. `logprobs` are the raw
    model's, `sampled_logprobs` those of the distribution that was sampled.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    mask: list[int]
    logprobs: list[float]
    sampled_logprobs: list[float]
    weight_versions: list[int]


def context_ids(turns: Sequence[Turn]) -> list[int]:
    """All tokens that the model has read and written so far, since the template last restarted the prompt."""
    ids: list[int] = []
    for turn in turns:
        if turn.prompt.is_whole:
            ids = []
        ids += turn.prompt.token_ids
        ids += turn.reply.token_ids
    return ids


def fork_between(turns: Sequence[Turn], rendered: str) -> TemplateFork | None:
    """Where the template rewrites what was written in these turns; None if it only goes on."""
    written = turns[-1].written
    if rendered.startswith(written):
        return None
    position = next((i for i, pair in enumerate(zip(written, rendered, strict=False)) if pair[0] != pair[1]), None)
    if position is None:  # one of them begins the other
        position = min(len(written), len(rendered))
    number = max((i for i, turn in enumerate(turns) if len(turn.prompt.text) <= position), default=0)
    kept, new = (text[position : position + _EXCERPT] for text in (written, rendered))
    return TemplateFork(number, position, kept, new)


def token_records(turns: Sequence[Turn]) -> list[TokenRecord]:
    """One record for every prompt that was encoded as a whole. Raises `RequestError` without log probabilities."""
    starts = [i for i, turn in enumerate(turns) if turn.prompt.is_whole]
    return [_record(turns[i:end]) for i, end in zip(starts, [*starts[1:], len(turns)], strict=True)]


def _record(turns: Sequence[Turn]) -> TokenRecord:
    rows = [row for number, turn in enumerate(turns) for row in _rows(turn, is_first=number == 0)]
    ids, mask, logprobs, sampled, versions = map(list, zip(*rows, strict=True)) if rows else ([] for _ in range(5))
    return TokenRecord(list(turns[0].prompt.token_ids), ids, mask, logprobs, sampled, versions)


def _rows(turn: Turn, is_first: bool) -> Iterator[_Row]:
    """One row per response token, so that all lists of a record are of one length."""
    if not is_first:
        yield from ((token, 0, 0.0, 0.0, NO_VERSION) for token in turn.prompt.token_ids)
    reply = turn.reply
    versions = reply.weight_versions or repeat(NO_VERSION, len(reply.token_ids))
    try:
        columns = zip(reply.token_ids, reply.token_logprobs, reply.sampled_logprobs, versions, strict=True)
        yield from [(token, 1, raw, sampled, version) for token, raw, sampled, version in columns]
    except ValueError:
        raise RequestError("this engine's outputs have no log probability for each token: a trainer needs it") from None
