"""`InputProcessor`: turns a submitted request into sequences for the scheduler: encode, validate, resolve.

Long texts and chats are encoded on the tokenizer pool's threads, everything else on the engine's thread. Nothing is
queued before it is known to fit; refusals are typed and say what to change. Called by `EngineCore` and `Fork`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

from penstock.api.log import Logger, make_logger
from penstock.api.prompt import PromptInput
from penstock.config import EngineConfig
from penstock.constraint import Constraint
from penstock.constraints.compiler import CompiledGrammar, GrammarCompiler
from penstock.demo import MODEL_DIR
from penstock.engine.requests.adapters import AdapterNames
from penstock.engine.requests.collector import Collector
from penstock.engine.requests.parameter_checks import SpecialTokens, check_ids, ineffective, warn_once_each
from penstock.engine.requests.request import Request
from penstock.engine.text.detokenizer import Detokenizer
from penstock.engine.text.reasoning import ReasoningEnd
from penstock.engine.text.stops import StopStrings
from penstock.engine.text.stream import BeamStopMatcher, NoText, Text, TextStream
from penstock.engine.text.token_bound import TokenBound
from penstock.engine.text.token_text import TokenDecoder
from penstock.engine.text.tokenizer import Tokenizer
from penstock.engine.text.tokenizer_pool import SHORT_TEXT, TokenizerPool, encode_prompt, encode_words, is_plain
from penstock.errors import DeadlineExceeded, GrammarError, RequestError, RequestTooLarge
from penstock.generation import LengthLimit, Params, fitted
from penstock.models.protocol import ModelSpec
from penstock.optimizers.beam_search import BeamSearch
from penstock.optimizers.tuning.tuner import ceilings
from penstock.sampling import SamplingParams, resolved, without_prompt_logprobs
from penstock.scheduling.admission import Admission
from penstock.sequence import Sequence

# Number of tokens before a fork whose text may depend on later tokens: more than any character has.
CONTEXT = 8


class Encoded(NamedTuple):
    """A prompt's text and ids, `bad_words` as ids, and the compiled grammar of the output, if it has any."""

    text: str | None
    ids: list[int]
    bad_words: list[list[int]]
    grammar: CompiledGrammar | None = None


class InputProcessor:
    """Admits requests for one model.

    `limit` is the maximum length of a sequence in tokens; `remedy` says how to raise it, as a hint.
    `tokenizer` is the engine thread's own copy; None accepts token ids only. Parameters without effect are logged as
    warnings, each of them once.
    """

    def __init__(
        self,
        config: EngineConfig,
        spec: ModelSpec,
        limit: int,
        tokenizer: Tokenizer | None,
        pool: TokenizerPool,
        admission: Admission,
        *,
        remedy: str = "",
        log: Logger | None = None,
    ) -> None:
        self._config = config
        self._remedy = remedy
        self._spec = spec
        self.limit = limit
        self.adapters = AdapterNames()
        self._tokenizer = tokenizer
        self._encodes_short_text = is_plain(tokenizer)
        # The demo model has a template, but was trained on source code alone.
        self._expects_chats = bool(getattr(tokenizer, "chat_template", None)) and spec.name != str(MODEL_DIR)
        self._bound = TokenBound()
        self._pool = pool
        self._admission = admission
        self._grammars = GrammarCompiler(spec.vocab_size, spec.eos_token_ids)
        self._decoder = None if tokenizer is None else TokenDecoder(tokenizer, skip_special_tokens=False)
        self._special = None if tokenizer is None else SpecialTokens(tokenizer)
        self._token_texts: dict[int, str] = {}
        self._warn = warn_once_each((log or make_logger("warning")).warning)

    def encode(self, request: Request) -> Future[Encoded] | Encoded:
        """The prompt's text and ids, and bad words as ids; a future if a pool thread does the work.

        Raises `RequestError`.
        """
        prompt, params = request.prompt, request.params if isinstance(request.params, SamplingParams) else None
        words = () if params is None else params.bad_words
        grammar = None
        if params is not None and params.structured_outputs is not None:
            grammar = self._grammars.find(params.structured_outputs, params.reasoning_end)
            if grammar is None:
                compilation = partial(self._grammars.compile, params.structured_outputs, params.reasoning_end)
                return self._pool.submit(_encode, prompt, words, compilation, self.check_length)
        if not prompt.needs_tokenizer and not any(isinstance(word, str) for word in words):
            return _encode(None, prompt, words)._replace(grammar=grammar)
        if self._encodes_short_text and not words and prompt.text is not None and len(prompt.text) <= SHORT_TEXT:
            return _encode(self._tokenizer, prompt, words)._replace(grammar=grammar)
        return self._pool.submit(_encode, prompt, words, lambda tokenizer: grammar, self.check_length)

    def check_length(self, tokenizer: Tokenizer | None, text: str) -> None:
        """Refuse a text that certainly does not fit without encoding it, which takes a second per megabyte.

        On a thread of the pool; its `tokenizer` may be that of any replica. Raises `RequestTooLarge`.
        """
        if len(text) > self.limit and (least := self._bound.at_least(tokenizer, text)) > self.limit:
            raise RequestTooLarge(
                f"the prompt has at least {least} tokens and the limit is {self.limit} for prompt and output "
                "together: shorten the prompt",
                parameter="prompt",
            ).with_hint(self._remedy)

    def admit(self, request: Request, encoded: Encoded, seq_ids: Iterator[int], now: float) -> None:
        """Set the request's collector and sequences. Raises `RequestError`, `DeadlineExceeded`."""
        text, ids, bad_words, _ = encoded
        request.channel.prompt, request.channel.prompt_token_ids = text, ids
        if now >= min(request.deadline, request.ttft_deadline):
            raise DeadlineExceeded(f"request {request.id} passed its deadline while it was encoded")
        params = self._resolve(request.params, len(ids), bad_words)
        stops = self._special_stops(params)
        if request.prompt.text is not None and (request.prompt.token_ids is None or request.prompt.is_encoded):
            self._check_text(request.prompt, ids)
        # After the length check, because scanning a million ids holds the interpreter lock.
        self._check_vocabulary(ids)
        self._admission.adjust(request.place, len(ids))
        before = ids[len(ids) - request.num_continued :]
        context = () if request.origin is None else ids[-CONTEXT:]
        texts = [self._text(params, context, before) for _ in range(params.num_texts)]
        request.collector = Collector(request.id, text, ids, params, texts, self._decode_token, stops)
        request.sequences = self._sequences(request, params, encoded, seq_ids, frozenset(stops))
        if params.use_beam_search:
            request.search = self._search(request.sequences[0], params)

    def text_after(self, text: str | None, tokens: SequenceOf[int], params: SamplingParams) -> str | None:
        """The text followed by the text of the tokens; None where texts are unknown."""
        if text is None or self._tokenizer is None:
            return None
        return text + TokenDecoder(self._tokenizer, params.skip_special_tokens).text(tokens)

    def _check_text(self, prompt: PromptInput, ids: SequenceOf[int]) -> None:
        """Warn about a string that is probably not what the caller meant to pass."""
        bos = getattr(self._tokenizer, "bos_token_id", None)
        if bos is not None and list(ids[:2]) == [bos, bos]:
            self._warn(
                "a prompt starts with two BOS tokens, one from a chat template and one from the tokenizer: "
                "pass the messages themselves, or prompt_token_ids"
            )
        elif prompt.is_bare and self._expects_chats:
            # A rendered chat begins with special tokens. Only the beginning is searched: a text may have a megabyte.
            if self._special is not None and self._special.any_in((prompt.text or "")[:SHORT_TEXT]):
                return
            self._expects_chats = False  # said once
            self._warn(
                "a prompt is a bare string, but this model has a chat template: for an answer, pass "
                '[{"role": "user", "content": text}]; to continue the text, pass {"prompt": text}'
            )

    def _check_vocabulary(self, ids: Collection[int]) -> None:
        highest = max(ids, default=0)
        if highest >= self._spec.vocab_size:
            text = f"token id {highest} in the prompt is outside the model's vocabulary of {self._spec.vocab_size}"
            raise RequestError(text, parameter="prompt")

    def _resolve(self, params: Params, prompt_len: int, bad_words: list[list[int]]) -> SamplingParams:
        """The parameters with a definite `max_tokens` that fits."""
        limit = LengthLimit(self.limit, hint=self._remedy)
        params, max_tokens = fitted(params, prompt_len, limit, self._spec.defaults, self._config.default_max_tokens)
        self._check_numbers(params)
        self._check_effects(params)
        return resolved(params, max_tokens, bad_words)

    def _check_numbers(self, params: SamplingParams) -> None:
        """Refuse more samples, beams or logprobs than this engine allows."""
        if params.num_samples > self._config.max_queue_size:
            raise RequestTooLarge(
                f"{params.num_samples} completions of one prompt exceed the queue's limit "
                f"({self._config.max_queue_size}): ask for fewer",
                parameter="n",
            ).with_hint("To allow more, raise max_queue_size.")
        if params.num_beams and params.num_beams > (max_rows := ceilings(self._config).max_batch_size):
            raise RequestTooLarge(
                f"{params.num_beams} beams exceed the maximum per step ({max_rows}): search with fewer",
                parameter="best_of",
            ).with_hint("To allow more, raise max_batch_size.")
        max_logprobs = self._config.max_logprobs
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(params, name) or 0
            if max_logprobs >= 0 and not 0 <= value <= max_logprobs:
                raise RequestError(
                    f"{name}={value} is more than this engine allows: ask for at most {max_logprobs}", parameter=name
                ).with_hint("To allow more, raise max_logprobs.")

    def _check_effects(self, params: SamplingParams) -> None:
        """Refuse parameters that certainly have no effect, and warn about those that probably have none."""
        check_ids(params, self._spec.vocab_size)
        if params.stop and self._tokenizer is None:
            text = "stop strings need text, and this engine serves token ids only: pass stop_token_ids"
            raise RequestError(text, parameter="stop")
        for sentence in ineffective(params, self._spec, self._special):
            self._warn(sentence)

    def _special_stops(self, params: SamplingParams) -> dict[int, str]:
        """The stop strings that are special tokens omitted from the text, by id."""
        if not params.stop or not params.skip_special_tokens or self._special is None:
            return {}
        return self._special.ids_of(params.stop)

    def _sequences(
        self, request: Request, params: SamplingParams, encoded: Encoded, seq_ids: Iterator[int], stops: frozenset[int]
    ) -> list[Sequence]:
        ids = encoded.ids
        assert params.max_tokens is not None
        eos = frozenset() if params.ignore_eos else self._spec.eos_token_ids
        sequences: list[Sequence] = []
        adapter = self.adapters.key(request.adapter) if request.adapter else ""
        for _ in range(params.num_sequences):
            first_sequence = sequences[0] if sequences else None
            # The prompt is scored once.
            own_params = params if first_sequence is None else without_prompt_logprobs(params)
            sequence = Sequence(
                id=next(seq_ids),
                request_id=request.id,
                params=own_params,
                tokens=list(ids),
                max_len=len(ids) + params.max_tokens if params.generates else len(ids),
                stop_ids=eos | stops | frozenset(params.stop_token_ids or ()),
                seed=request.seed if params.seed is None else params.seed,
                sample_index=next(request.sample_indices),
                priority=request.priority,
                arrival=request.arrival,
                deadline=request.deadline,
                # The first token of any completion counts.
                ttft_deadline=request.ttft_deadline if first_sequence is None else math.inf,
                namespace=request.namespace,
                adapter=adapter if request.origin is None else request.origin.adapter,
                parent=first_sequence or request.origin,
                constraint=None if encoded.grammar is None else self._constraint(request, params, encoded.grammar, ids),
            )
            sequences.append(sequence)
        return sequences

    def _constraint(
        self, request: Request, params: SamplingParams, grammar: CompiledGrammar, ids: list[int]
    ) -> Constraint:
        """A constraint that has taken in what a fork's origin generated. Raises `GrammarError`."""
        constraint = grammar.start(ends_itself=params.ignore_eos or not self._spec.eos_token_ids)
        output = ids[len(ids) - request.num_continued :]
        if constraint.advance(output) < len(output) or constraint.is_complete:
            raise GrammarError("the structured output is complete before the fork: fork at an earlier token")
        return constraint

    def _search(self, root: Sequence, params: SamplingParams) -> BeamSearch:
        text = self._text(params) if params.stop else None
        watch = BeamStopMatcher(text) if isinstance(text, TextStream) else None
        return BeamSearch(params, root.max_len - root.prompt_len, root.stop_ids, watch)

    def _text(self, params: SamplingParams, context: SequenceOf[int] = (), before: SequenceOf[int] = ()) -> Text:
        """A fresh text stream. The tokens of `context` precede it; their text is not emitted again.

        `before` are those that are output already, where the reasoning may have ended.
        """
        if self._tokenizer is None or not params.detokenize:
            return NoText()
        detokenizer = Detokenizer(
            self._tokenizer,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
        )
        for token in context:
            detokenizer.push(token)
        if not params.stop:
            return TextStream(detokenizer)
        stops = StopStrings(tuple(params.stop), params.include_stop_str_in_output)
        reasoning = None if params.reasoning_end is None else self._reasoning(params, params.reasoning_end, before)
        return TextStream(detokenizer, stops, params.min_tokens, reasoning)

    def _reasoning(self, params: SamplingParams, marker: str, output: SequenceOf[int]) -> ReasoningEnd | None:
        """The search for the end of the reasoning, which goes on after `output`; None where it has ended."""
        assert self._tokenizer is not None
        ids = self._special.ids_of((marker,)) if self._special is not None and params.skip_special_tokens else {}
        reasoning = ReasoningEnd(marker, next(iter(ids), None))
        detokenizer = Detokenizer(self._tokenizer, skip_special_tokens=params.skip_special_tokens)
        has_ended = any(reasoning.push(token, detokenizer.push(token)) is not None for token in output)
        return None if has_ended else reasoning

    def _decode_token(self, token: int) -> str | None:
        if self._decoder is None:
            return None
        text = self._token_texts.get(token)
        if text is None:
            text = self._token_texts[token] = self._decoder.text([token])
        return text


def _encode(
    tokenizer: Tokenizer | None,
    prompt: PromptInput,
    bad_words: Collection[str | SequenceOf[int]],
    compilation: Callable[[Tokenizer | None], CompiledGrammar | None] | None = None,
    check: Callable[[Tokenizer | None, str], None] | None = None,
) -> Encoded:
    text, ids = encode_prompt(tokenizer, prompt, check=check)
    words = encode_words(tokenizer, bad_words) if bad_words else []
    return Encoded(text, ids, words, None if compilation is None else compilation(tokenizer))
