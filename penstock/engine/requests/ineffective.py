"""Parameters that can never act: a certain mistake is refused, a probable one is a warning.

Pure functions of a request's parameters, the model and the tokenizer. Called by `InputProcessor`, once per request.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

from penstock.engine.text.decoding import Kind, TokenDecoder
from penstock.engine.text.tokenizer import Tokenizer
from penstock.errors import RequestError
from penstock.models.protocol import ModelSpec
from penstock.sampling import SamplingParams

_MANY = 100
_STOPS_AND_BANS = ("stop_token_ids", "suppress_tokens", "begin_suppress_tokens")
_OUTSIDE = "is outside the model's vocabulary"
_REMEDY = "pass ids of this model's tokenizer"


def check_ids(params: SamplingParams, vocab_size: int) -> None:
    """Refuse wishes for token ids that the model does not have. Raises `RequestError`."""
    first, last = params.forced_bos_token_id, params.forced_eos_token_id
    wishes: tuple[tuple[str, Collection[int]], ...] = (
        ("logit_bias", params.logit_bias or ()),
        ("allowed_token_ids", params.allowed_token_ids or ()),
        ("sequence_bias", [token for ids in params.sequence_bias or () for token in ids]),
        ("forced_bos_token_id", () if first is None else (first,)),
        ("forced_eos_token_id", (last,) if isinstance(last, int) else last or ()),
    )
    for name, ids in wishes:
        if (token := _outside(ids, vocab_size)) is not None:
            raise RequestError(f"token id {token} in {name} {_OUTSIDE} of {vocab_size}: {_REMEDY}")


def _outside(ids: Collection[int], vocab_size: int) -> int | None:
    """An id that the model does not have."""
    ends = (max(ids), min(ids)) if ids else ()
    return next((token for token in ends if not 0 <= token < vocab_size), None)


def _useless_ids(params: SamplingParams, vocab_size: int) -> Iterator[str]:
    """Stops and bans of tokens that cannot come: they hurt nobody."""
    words = [token for word in params.bad_words if not isinstance(word, str) for token in word]
    for name, ids in (("bad_words", words), *((name, getattr(params, name) or ()) for name in _STOPS_AND_BANS)):
        if (token := _outside(ids, vocab_size)) is not None:
            yield f"token id {token} in {name} {_OUTSIDE} of {vocab_size} and without effect: {_REMEDY}"


def ineffective(params: SamplingParams, spec: ModelSpec, special: SpecialTokens | None) -> Iterator[str]:
    """What the caller should know of parameters without effect, in sentences."""
    yield from _useless_ids(params, spec.vocab_size)
    if params.greedy and not params.use_beam_search:
        names = [name for name, off in (("top_p", 1.0), ("min_p", 0.0)) if getattr(params, name) != off]
        names += ["top_k"] if params.top_k > 1 else []
        if names:
            yield f"{' and '.join(names)} without effect: nothing is drawn with temperature=0 or top_k=1"
    ends = params.stop or params.stop_token_ids or spec.eos_token_ids
    if params.min_tokens and not ends:
        yield "min_tokens without effect: the model has no EOS, and the request neither stop nor stop_token_ids"
    if params.length_penalty != 1 and not params.use_beam_search and params.rank_by != "normalized_logprob":
        yield 'length_penalty without effect: it needs use_beam_search or rank_by="normalized_logprob"'
    if special is not None and params.skip_special_tokens:
        for stop in params.stop or ():
            if parts := special.inside(stop):
                yield (
                    f"the stop string {stop!r} cannot match: skip_special_tokens leaves {parts[0]!r} out of the text; "
                    "stop at that token alone, or set skip_special_tokens=False"
                )


class SpecialTokens:
    """The added tokens that decoding leaves out, by their texts. `tokenizer` is the engine thread's own."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        added: Mapping[int, object] = getattr(tokenizer, "added_tokens_decoder", {})
        self._ids = {str(token): id for id, token in added.items() if str(token)}
        self._decoder = TokenDecoder(tokenizer, skip_special_tokens=True)
        self._inside: dict[str, list[str]] = {}

    def ids_of(self, stops: Collection[str]) -> dict[int, str]:
        """The stop strings that are such tokens: text never shows them, so that their ids end it."""
        return {self._ids[stop]: stop for stop in stops if self._is_left_out(stop)}

    def inside(self, stop: str) -> list[str]:
        """Those whose texts are parts of a stop string, which cannot be in the text, then."""
        parts = self._inside.get(stop)
        if parts is None:
            if len(self._inside) >= _MANY:
                self._inside.clear()
            parts = [text for text in self._ids if text in stop and self._is_left_out(text)]
            self._inside[stop] = parts = [] if stop in parts else parts
        return parts

    def _is_left_out(self, text: str) -> bool:
        return text in self._ids and self._decoder.kind(self._ids[text]) is Kind.INVISIBLE


def once(tell: Callable[[str], None]) -> Callable[[str], None]:
    """Tell the same thing only once; of endlessly many things, only the first ones."""
    told: set[str] = set()

    def tell_once(sentence: str) -> None:
        if sentence not in told and len(told) < _MANY:
            told.add(sentence)
            tell(sentence)

    return tell_once
