"""`Door`: from what a caller gave to sequences the scheduler can run: encode, validate, resolve parameters.

Encoding runs on the tokenizer pool's threads; everything else on the engine's thread. Refusals are typed and say what
to change; nothing is queued before its size is known to fit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from typing import Any

from penstock.config import EngineConfig
from penstock.engine.collector import Collector
from penstock.engine.decoding import TokenDecoder
from penstock.engine.detokenizer import Detokenizer
from penstock.engine.inert import SpecialTokens, check_ids, inert, once
from penstock.engine.log import Logger, make_logger
from penstock.engine.request import Params, Request
from penstock.engine.stops import StopStrings
from penstock.engine.textstream import NoText, Text, TextStream
from penstock.engine.textwatch import TextWatch
from penstock.engine.tokenizing import TokenizerPool, encode_prompt, encode_words, needs_tokenizer
from penstock.errors import DeadlineExceeded, EngineOverloaded, RequestError, RequestTooLarge
from penstock.generation import GenerationConfig, default_params
from penstock.models.protocol import ModelSpec
from penstock.optimizers.beams import BeamSearch
from penstock.optimizers.tuner import ceilings
from penstock.sampling import SamplingParams
from penstock.scheduling.admission import Admission
from penstock.sequence import Sequence

# Tokens before a fork whose text may still depend on what follows: more than any character has.
CONTEXT = 8
Encoded = tuple[str | None, list[int], list[list[int]]]


class Door:
    """Admits requests to one model.

    `limit` is the most tokens of one sequence, `remedy` how to have more, as the end of a sentence that says what else
    to do. `tokenizer` is the engine thread's own copy; None serves token ids only. `log` is told of parameters without
    effect, of each kind once.
    """

    def __init__(
        self,
        config: EngineConfig,
        spec: ModelSpec,
        limit: int,
        tokenizer: Any,
        pool: TokenizerPool,
        admission: Admission,
        *,
        remedy: str = "",
        log: Logger | None = None,
    ) -> None:
        self._config = config
        self._remedy = remedy
        self._spec = spec
        self._limit = limit
        self._tokenizer = tokenizer
        self._pool = pool
        self._admission = admission
        self._decoder = None if tokenizer is None else TokenDecoder(tokenizer, skip_special_tokens=False)
        self._special = None if tokenizer is None else SpecialTokens(tokenizer)
        self._token_texts: dict[int, str] = {}
        self._warn = once((log or make_logger("warning")).warning)

    def encode(self, request: Request) -> Future[Encoded]:
        """Prompt text, prompt ids and bad words as ids; on the pool where a tokenizer is needed, else at once."""
        words = getattr(request.params, "bad_words", ())
        if needs_tokenizer(request.prompt) or any(isinstance(word, str) for word in words):
            return self._pool.submit(_encode, request.prompt, words)
        done: Future[Encoded] = Future()
        try:
            done.set_result(_encode(None, request.prompt, words))
        except RequestError as error:
            done.set_exception(error)
        return done

    def enroll(self, request: Request, encoded: Encoded, seq_ids: Iterator[int], now: float) -> None:
        """Give the request its collector and sequences. Raises `RequestError`, `DeadlineExceeded`."""
        text, ids, bad_words = encoded
        if now >= min(request.deadline, request.ttft_deadline):
            raise DeadlineExceeded(f"request {request.id} passed its deadline while it was encoded")
        params = self._resolve(request.params, len(ids), bad_words)
        stops = self._special_stops(params)
        # After the length: looking at a million ids holds the interpreter lock.
        self._check_vocabulary("the prompt", ids)
        self._admission.adjust(request.place, len(ids))
        request.channel.prompt, request.channel.prompt_token_ids = text, ids
        said = () if request.origin is None else ids[-CONTEXT:]
        texts = [self._text(params, said) for _ in range(params.num_texts)]
        request.collector = Collector(request.id, text, ids, params, texts, self._decode_token, stops)
        request.sequences = self._sequences(request, params, ids, seq_ids, frozenset(stops))
        if params.use_beam_search:
            request.search = self._search(request.sequences[0], params)

    def continued(self, text: str | None, tokens: SequenceOf[int], params: SamplingParams) -> str | None:
        """A text and what tokens after it say; None where texts are not known."""
        if text is None or self._tokenizer is None:
            return None
        return text + TokenDecoder(self._tokenizer, params.skip_special_tokens).text(tokens)

    def release(self, request: Request) -> None:
        """Give back what the request held of the waiting room, if it still does."""
        self._admission.release(request.place)

    def displaced(self) -> EngineOverloaded:
        """What a request is told whose place one of a higher class took."""
        return self._admission.displaced()

    def _check_vocabulary(self, name: str, ids: Collection[int]) -> None:
        highest = max(ids, default=0)
        if highest >= self._spec.vocab_size:
            raise RequestError(
                f"token id {highest} in {name} is outside the model's vocabulary of {self._spec.vocab_size}"
            )

    def _check_logprobs(self, params: SamplingParams) -> None:
        most = self._config.max_logprobs
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(params, name) or 0
            if most >= 0 and not 0 <= value <= most:
                raise RequestError(f"{name}={value} is more than this engine gives ({most}): raise max_logprobs")

    def _resolve(self, params: Params, prompt_len: int, bad_words: list[list[int]]) -> SamplingParams:
        """Parameters with a definite `max_tokens` that fits."""
        room = self._limit - prompt_len
        if room < 1:
            raise RequestTooLarge(
                f"the prompt has {prompt_len} tokens and the limit is {self._limit} for prompt and output together: "
                f"shorten the prompt{self._remedy}"
            )
        if params is None:
            params = default_params(self._spec.defaults, self._config.default_max_tokens, prompt_len)
            params = dataclasses.replace(params, max_tokens=min(room, params.max_tokens or room))
        elif isinstance(params, GenerationConfig):
            params = params.sampling_params(prompt_len, room)
        wanted = room if params.max_tokens is None else params.max_tokens
        if wanted > room:
            raise RequestTooLarge(
                f"{prompt_len} prompt tokens and max_tokens={wanted} exceed the limit of {self._limit}: "
                f"ask for at most {room}, or max_tokens=None for what fits{self._remedy}"
            )
        if params.num_samples > self._config.max_queue_size:
            raise RequestTooLarge(
                f"{params.num_samples} completions of one prompt are more than may wait "
                f"({self._config.max_queue_size}): ask for fewer, or raise max_queue_size"
            )
        most_rows = ceilings(self._config).max_batch_size
        if params.num_beams > most_rows:
            raise RequestTooLarge(
                f"{params.num_beams} beams are more than run in one step ({most_rows}): "
                "search with fewer, or raise max_batch_size"
            )
        self._check_logprobs(params)
        self._check_effects(params)
        return dataclasses.replace(params, max_tokens=wanted, bad_words=bad_words or params.bad_words)

    def _check_effects(self, params: SamplingParams) -> None:
        """Refuse what could never act for sure, and tell of what probably cannot."""
        check_ids(params, self._spec.vocab_size)
        if params.stop and self._tokenizer is None:
            raise RequestError("stop strings need text, and this engine serves token ids only: pass stop_token_ids")
        for sentence in inert(params, self._spec, self._special):
            self._warn(sentence)

    def _special_stops(self, params: SamplingParams) -> dict[int, str]:
        """Stop strings that are special tokens which text leaves out, by id."""
        if not params.stop or not params.skip_special_tokens or self._special is None:
            return {}
        return self._special.ids_of(params.stop)

    def _sequences(
        self, request: Request, params: SamplingParams, ids: list[int], seq_ids: Iterator[int], stops: frozenset[int]
    ) -> list[Sequence]:
        assert params.max_tokens is not None
        sibling = dataclasses.replace(params, prompt_logprobs=None)  # one scoring of the prompt is enough
        eos = frozenset() if params.ignore_eos else self._spec.eos_token_ids
        found: list[Sequence] = []
        for _ in range(params.num_sequences):
            sequence = Sequence(
                id=next(seq_ids),
                request_id=request.id,
                params=sibling if found else params,
                tokens=list(ids),
                max_len=len(ids) + params.max_tokens,
                stop_ids=eos | stops | frozenset(params.stop_token_ids or ()),
                seed=request.seed if params.seed is None else params.seed,
                sample_index=next(request.sample_indices),
                priority=request.priority,
                arrival=request.arrival,
                deadline=request.deadline,
                ttft_deadline=math.inf if found else request.ttft_deadline,  # a first token is any completion's
                namespace=request.namespace,
                parent=found[0] if found else request.origin,
            )
            found.append(sequence)
        return found

    def _search(self, root: Sequence, params: SamplingParams) -> BeamSearch:
        text = self._text(params) if params.stop else None
        watch = TextWatch(text) if isinstance(text, TextStream) else None
        return BeamSearch(params, root.max_len - root.prompt_len, root.stop_ids, watch)

    def _text(self, params: SamplingParams, said: SequenceOf[int] = ()) -> Text:
        """A fresh stream of text; what was `said` before it is context, and not shown again."""
        if self._tokenizer is None or not params.detokenize:
            return NoText()
        detokenizer = Detokenizer(
            self._tokenizer,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
        )
        for token in said:
            detokenizer.push(token)
        stops = StopStrings(tuple(params.stop or ()), params.include_stop_str_in_output)
        return TextStream(detokenizer, stops, params.min_tokens)

    def _decode_token(self, token: int) -> str | None:
        if self._decoder is None:
            return None
        text = self._token_texts.get(token)
        if text is None:
            text = self._token_texts[token] = self._decoder.text([token])
        return text


def _encode(tokenizer: Any, prompt: Any, bad_words: Any) -> Encoded:
    text, ids = encode_prompt(tokenizer, prompt)
    return text, ids, encode_words(tokenizer, bad_words) if bad_words else []
