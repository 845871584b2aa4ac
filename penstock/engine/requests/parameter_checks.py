"""Finds parameters that have no effect: a certain mistake is refused, a probable one is a warning.

Pure functions of a request's parameters, the model and the tokenizer. Called by `InputProcessor`, once per request.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from itertools import chain

from penstock.engine.text.token_text import Kind, TokenDecoder
from penstock.engine.text.tokenizer import Tokenizer
from penstock.errors import RequestError
from penstock.models.protocol import ModelSpec
from penstock.sampling import SamplingParams

_MAX_ENTRIES = 100
_STOPS_AND_BANS = ("stop_token_ids", "suppress_tokens", "begin_suppress_tokens")
_OUTSIDE = "is outside the model's vocabulary"
_REMEDY = "pass ids of this model's tokenizer"


def check_ids(params: SamplingParams, vocab_size: int) -> None:
    """Refuse parameters that require tokens outside the vocabulary. Raises `RequestError`."""
    bos, eos = params.forced_bos_token_id, params.forced_eos_token_id
    restrictions: tuple[tuple[str, Collection[int]], ...] = (
        ("logit_bias", params.logit_bias or ()),
        ("allowed_token_ids", params.allowed_token_ids or ()),
        ("sequence_bias", list(chain.from_iterable(params.sequence_bias or ()))),
        ("forced_bos_token_id", () if bos is None else (bos,)),
        ("forced_eos_token_id", (eos,) if isinstance(eos, int) else eos or ()),
    )
    for name, ids in restrictions:
        if ids and (token := _outside(ids, vocab_size)) is not None:
            raise RequestError(f"token id {token} in {name} {_OUTSIDE} of {vocab_size}: {_REMEDY}", parameter=name)


def _outside(ids: Collection[int], vocab_size: int) -> int | None:
    """An id outside the vocabulary, or None."""
    highest, lowest = max(ids), min(ids)
    return highest if highest >= vocab_size else lowest if lowest < 0 else None


def ineffective(params: SamplingParams, spec: ModelSpec, special: SpecialTokens | None) -> list[str]:
    """Warnings about parameters without effect, one sentence each."""
    sentences = []
    words = chain.from_iterable(word for word in params.bad_words if not isinstance(word, str))
    bans: list[tuple[str, Collection[int]]] = [("bad_words", list(words) if params.bad_words else ())]
    for name, ids in (*bans, *((name, getattr(params, name)) for name in _STOPS_AND_BANS)):
        if ids and (token := _outside(ids, spec.vocab_size)) is not None:
            sentences.append(f"token id {token} in {name} {_OUTSIDE} of {spec.vocab_size} and has no effect: {_REMEDY}")
    if params.greedy and not params.use_beam_search:
        names = ["top_p"] * (params.top_p != 1) + ["min_p"] * (params.min_p != 0) + ["top_k"] * (params.top_k > 1)
        if names:
            verb = "has" if len(names) == 1 else "have"
            sentences.append(
                f"{' and '.join(names)} {verb} no effect: nothing is sampled with temperature=0 or top_k=1"
            )
    if params.min_tokens and not (params.stop or params.stop_token_ids or spec.eos_token_ids):
        sentences.append(
            "min_tokens has no effect: the model has no EOS, and the request has neither stop nor stop_token_ids"
        )
    if params.length_penalty != 1 and not params.use_beam_search and params.rank_by != "normalized_logprob":
        sentences.append('length_penalty has no effect: it needs use_beam_search or rank_by="normalized_logprob"')
    if special is not None and params.skip_special_tokens and params.stop:
        sentences += map(_unmatchable, params.stop, map(special.inside, params.stop))
    return [sentence for sentence in sentences if sentence]


def _unmatchable(stop: str, hidden: list[str]) -> str:
    if not hidden:
        return ""
    return (
        f"the stop string {stop!r} cannot match: skip_special_tokens omits {hidden[0]!r} from the text; "
        "stop at that token alone, or set skip_special_tokens=False"
    )


class SpecialTokens:
    """The added tokens that decoding omits, by text. `tokenizer` is the engine thread's own."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        added: Mapping[int, object] = getattr(tokenizer, "added_tokens_decoder", {})
        self._ids = {str(token): id for id, token in added.items() if str(token)}
        self._decoder = TokenDecoder(tokenizer, skip_special_tokens=True)
        self._inside: dict[str, list[str]] = {}

    def ids_of(self, stops: Collection[str]) -> dict[int, str]:
        """The stop strings that are such tokens, by id. Text never shows them, so their ids end the sequence."""
        return {self._ids[stop]: stop for stop in stops if self._is_left_out(stop)}

    def any_in(self, text: str) -> bool:
        """Whether a text contains one of them."""
        return any(token in text for token in self._ids)

    def inside(self, stop: str) -> list[str]:
        """Such tokens whose texts are part of a stop string, which therefore cannot occur in the text."""
        parts = self._inside.get(stop)
        if parts is None:
            if len(self._inside) >= _MAX_ENTRIES:
                self._inside.clear()
            parts = [text for text in self._ids if text in stop and self._is_left_out(text)]
            self._inside[stop] = parts = [] if stop in parts else parts
        return parts

    def _is_left_out(self, text: str) -> bool:
        return text in self._ids and self._decoder.kind(self._ids[text]) is Kind.INVISIBLE


def warn_once_each(warn: Callable[[str], None]) -> Callable[[str], None]:
    """A function that passes each distinct sentence to `warn` once, and only a limited number of them."""
    warnings: set[str] = set()

    def warn_once(sentence: str) -> None:
        if sentence not in warnings and len(warnings) < _MAX_ENTRIES:
            warnings.add(sentence)
            warn(sentence)

    return warn_once
