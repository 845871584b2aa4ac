"""The input processor turns a request into sequences that fit, or raises an error that says what to change."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from penstock.api.channel import Channel
from penstock.api.prompt import read_prompt
from penstock.config import EngineConfig
from penstock.engine.requests.input_processor import InputProcessor
from penstock.engine.requests.request import Request
from penstock.errors import DeadlineExceeded, RequestError, RequestTooLarge
from penstock.generation import GenerationConfig, Params
from penstock.models.protocol import ModelSpec
from penstock.sampling import RequestPriority, SamplingParams
from penstock.scheduling.admission import Admission, QueuePlace
from tests.tokenizers_for_tests import byte_level

LIMIT = 40


class Tokenizer:
    """Every character is a token: "a" is 0."""

    def encode(self, text: str, **options: Any) -> list[int]:
        return [max(0, ord(char) - 97) for char in text]

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join(chr(97 + i) for i in ids)


class Pool:
    """Encodes at once, on the caller's thread, and counts the calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.tokenizer: Any = Tokenizer()

    def submit(self, fn: Callable[..., Any], *args: Any) -> Future[Any]:
        """Run it."""
        self.calls += 1
        future: Future[Any] = Future()
        try:
            future.set_result(fn(self.tokenizer, *args))
        except Exception as error:
            future.set_exception(error)
        return future


class Rig:
    """An input processor for a model with 26 tokens and a limit of 40."""

    def __init__(self, defaults: dict[str, Any] | None = None, **settings: Any) -> None:
        config = EngineConfig(**settings)
        self.pool = Pool()
        self.admission = Admission(config)
        spec = ModelSpec(
            name="m",
            vocab_size=26,
            max_length=64,
            eos_token_ids=frozenset({1}),
            defaults=defaults or {"temperature": 0.5},
        )
        self.inputs = InputProcessor(config, spec, LIMIT, Tokenizer(), self.pool, self.admission)  # type: ignore[arg-type]
        self.ids = itertools.count()

    def admit(self, prompt: Any, params: Params = None, now: float = 0.0, **fields: Any) -> Request:
        """An admitted request."""
        place, self.channel = QueuePlace("r", 2), Channel("r")
        request = Request(
            id="r", prompt=read_prompt(prompt), params=params, channel=self.channel, arrival=0.0, place=place, **fields
        )
        self.admission.reserve([place])
        encoded = self.inputs.encode(request)
        if isinstance(encoded, Future):
            encoded = encoded.result(0)
        self.inputs.admit(request, encoded, self.ids, now)
        return request


def test_token_ids_pass_without_a_tokenizer() -> None:
    rig = Rig()
    request = rig.admit([3, 4], SamplingParams(max_tokens=5))
    assert rig.pool.calls == 0
    assert (request.channel.prompt, request.channel.prompt_token_ids) == (None, [3, 4])
    (sequence,) = request.sequences
    assert (sequence.tokens, sequence.max_len, sequence.stop_ids) == ([3, 4], 7, frozenset({1}))


def test_text_and_bad_words_are_encoded_on_the_pool() -> None:
    rig = Rig()
    request = rig.admit("cab", SamplingParams(max_tokens=5, bad_words=["de", [7]]))
    assert rig.pool.calls == 1
    assert (request.channel.prompt, request.channel.prompt_token_ids) == ("cab", [2, 0, 1])
    assert (3, 4) in request.sequences[0].params.bad_words
    assert (7,) in request.sequences[0].params.bad_words


def test_words_as_ids_need_no_pool() -> None:
    rig = Rig()
    rig.admit([1], SamplingParams(max_tokens=5, bad_words=[[7]]))
    assert rig.pool.calls == 0


def test_without_parameters_the_models_defaults_hold() -> None:
    params = Rig(default_max_tokens=12).admit([1]).sequences[0].params
    assert (params.temperature, params.max_tokens) == (0.5, 12)
    assert Rig(default_max_tokens=1000).admit([1]).sequences[0].params.max_tokens == LIMIT - 1


@pytest.mark.parametrize(
    ("defaults", "max_tokens", "min_new_tokens"),
    [
        ({"max_tokens": 7}, 7, 0),
        ({"max_tokens": 1000, "min_new_tokens": 900}, LIMIT - 3, 900),
        ({"max_length": 20, "min_length": 8}, 17, 5),
        ({"max_length": 2}, 12, 0),
        ({"max_length": 9000}, LIMIT - 3, 0),
        ({"bad_words": [[4, 5]]}, 12, 0),
    ],
)
def test_lengths_of_the_models_defaults_are_cut_to_what_fits(
    defaults: dict[str, Any], max_tokens: int, min_new_tokens: int
) -> None:
    params = Rig(defaults, default_max_tokens=12).admit([1, 2, 3]).sequences[0].params
    assert (params.max_tokens, params.min_new_tokens) == (max_tokens, min_new_tokens)
    assert [list(word) for word in params.bad_words] == defaults.get("bad_words", [])


def test_parameters_of_a_caller_are_not_mixed_with_the_models_defaults() -> None:
    rig = Rig({"bad_words": [[4]], "suppress_tokens": [5], "stop": "x", "min_tokens": 3})
    assert rig.admit([1], SamplingParams(max_tokens=2)).sequences[0].params == SamplingParams(max_tokens=2)


def test_no_limit_means_until_the_room_is_full() -> None:
    assert Rig().admit([1] * 10, SamplingParams(max_tokens=None)).sequences[0].max_len == LIMIT


def test_generation_config_is_cut_to_the_room() -> None:
    assert Rig().admit([1] * 10, GenerationConfig(max_length=512)).sequences[0].max_len == LIMIT


@pytest.mark.parametrize(
    ("prompt", "params", "says"),
    [
        ([1] * LIMIT, SamplingParams(max_tokens=1), "the prompt has 40 tokens and the limit is 40"),
        ([1] * 30, SamplingParams(max_tokens=11), "a prompt of 30 tokens and max_tokens=11 exceed the limit of 40"),
    ],
)
def test_what_can_never_fit_is_refused_with_the_numbers(prompt: list[int], params: Params, says: str) -> None:
    with pytest.raises(RequestTooLarge, match=says):
        Rig().admit(prompt, params)


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded() -> None:
    """A megabyte took seconds to encode, only to be refused."""
    rig, tokenizer = Rig(), byte_level()
    rig.pool.tokenizer = tokenizer
    longest = max(map(len, tokenizer.get_vocab()))
    least = LIMIT + 1
    for prompt in ({"prompt": "a" * least * longest}, [{"role": "user", "content": "a" * least * longest}]):
        with pytest.raises(RequestTooLarge, match=r"the prompt has at least 4\d tokens and the limit is 40"):
            rig.admit(prompt, SamplingParams(max_tokens=1))
    with pytest.raises(RequestTooLarge, match=f"the prompt has {LIMIT * longest + 1} tokens"):  # with BOS
        rig.admit({"prompt": "~" * LIMIT * longest}, SamplingParams(max_tokens=1))


def test_a_refused_request_says_what_its_prompt_was_encoded_to() -> None:
    """A server that asks again with a smaller `max_tokens` encoded every such prompt twice."""
    rig = Rig()
    with pytest.raises(RequestTooLarge):
        rig.admit("cab", SamplingParams(max_tokens=LIMIT))
    assert (rig.channel.prompt, rig.channel.prompt_token_ids) == ("cab", [2, 0, 1])


def test_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(RequestError, match="token id 26 in the prompt is outside the model's vocabulary of 26"):
        Rig().admit([3, 26])


@pytest.mark.parametrize("late", ["deadline", "ttft_deadline"])
def test_deadline_that_has_passed_is_reported(late: str) -> None:
    with pytest.raises(DeadlineExceeded):
        Rig().admit([1], None, 2.0, **{late: 2.0})


def test_completions_share_everything_but_their_number() -> None:
    request = Rig().admit(
        [3, 4],
        SamplingParams(n=3, max_tokens=2, seed=11),
        priority=RequestPriority.HIGH,
        deadline=9.0,
        namespace="tenant",
    )
    first, second, third = request.sequences
    assert [seq.sample_index for seq in request.sequences] == [0, 1, 2]
    assert {seq.seed for seq in request.sequences} == {11}
    assert {seq.priority for seq in request.sequences} == {RequestPriority.HIGH}
    assert {(seq.deadline, seq.ttft_deadline, seq.namespace) for seq in request.sequences} == {
        (9.0, math.inf, "tenant")
    }
    assert (first.parent, second.parent, third.parent) == (None, first, first)
    assert first.tokens is not second.tokens
    assert len({seq.id for seq in request.sequences}) == 3


def test_best_of_runs_as_many_candidates() -> None:
    assert len(Rig().admit([3], SamplingParams(n=1, best_of=4, max_tokens=2)).sequences) == 4


def test_greedy_completions_are_computed_once() -> None:
    greedy = {"n": 3, "temperature": 0.0, "max_tokens": 2}
    assert len(Rig().admit([3], SamplingParams(**greedy)).sequences) == 1
    processed = SamplingParams(**greedy, logits_processors=[lambda ids, logits: logits])
    assert len(Rig().admit([3], processed).sequences) == 3, "what a function does may differ from call to call"


def test_a_beam_search_has_a_sequence_for_every_beam() -> None:
    params = SamplingParams(use_beam_search=True, best_of=4, n=2, temperature=0.0, max_tokens=2, prompt_logprobs=0)
    request = Rig().admit([3, 4], params)
    assert request.search is not None
    assert len(request.sequences) == request.search.width == 4
    assert [seq.params.prompt_logprobs for seq in request.sequences] == [0, None, None, None]
    assert request.collector is not None
    assert request.collector.num_texts == 2


def test_more_beams_than_run_in_a_step_are_refused() -> None:
    params = SamplingParams(use_beam_search=True, best_of=9, temperature=0.0, max_tokens=2)
    with pytest.raises(RequestTooLarge, match=r"9 beams exceed the maximum per step \(8\)"):
        Rig(max_batch_size=8).admit([3], params)


def test_rows_that_throughput_opens_are_there_for_beams_too() -> None:
    params = SamplingParams(use_beam_search=True, best_of=40, temperature=0.0, max_tokens=2)
    assert len(Rig(target="throughput").admit([3], params).sequences) == 40


def test_ignored_eos_leaves_the_stop_ids_that_were_asked_for() -> None:
    params = SamplingParams(max_tokens=2, ignore_eos=True, stop_token_ids=[7])
    assert Rig().admit([3], params).sequences[0].stop_ids == frozenset({7})


def test_requests_without_a_seed_use_the_one_drawn_at_submission() -> None:
    assert Rig().admit([3], seed=5).sequences[0].seed == 5
    assert Rig().admit([3], SamplingParams(seed=7, max_tokens=2), seed=5).sequences[0].seed == 7


def test_only_the_first_completion_scores_the_prompt() -> None:
    request = Rig().admit([3, 4], SamplingParams(n=2, max_tokens=2, prompt_logprobs=1))
    assert [seq.params.prompt_logprobs for seq in request.sequences] == [1, None]


def test_wishes_for_tokens_that_do_not_exist_are_refused() -> None:
    wishes: list[dict[str, Any]] = [
        {"allowed_token_ids": [26]},
        {"logit_bias": {26: 1.0}},
        {"sequence_bias": {(1, 26): 1.0}},
        {"forced_bos_token_id": 26},
        {"forced_eos_token_id": [2, 26]},
    ]
    for wish in wishes:
        with pytest.raises(RequestError, match=f"token id 26 in {next(iter(wish))}"):
            Rig().admit([3], SamplingParams(max_tokens=2, **wish))


def test_estimate_is_corrected_and_given_back_once() -> None:
    rig = Rig()
    request = rig.admit("cabcab")
    assert (rig.admission.num_requests, rig.admission.num_tokens) == (1, 6)
    rig.admission.release(request.place)
    rig.admission.release(request.place)
    assert (rig.admission.num_requests, rig.admission.num_tokens) == (0, 0)


def test_invalid_prompts_are_an_error() -> None:
    rig = Rig()
    with pytest.raises(RequestError, match="empty"):
        rig.admit([])


def test_more_logprobs_than_the_engine_gives_are_refused() -> None:
    for wish in ({"logprobs": 21}, {"prompt_logprobs": -1}):
        with pytest.raises(RequestError, match="raise max_logprobs"):
            Rig().admit([3], SamplingParams(max_tokens=2, **wish))  # type: ignore[arg-type]
    assert Rig(max_logprobs=-1).admit([3], SamplingParams(max_tokens=2, logprobs=-1)).sequences


def test_a_first_token_deadline_is_the_first_completions_alone() -> None:
    """Siblings that still waited used to end a request whose first token had arrived in time."""
    request = Rig().admit([3, 4], SamplingParams(n=3, max_tokens=2), ttft_deadline=5.0)
    assert [seq.ttft_deadline for seq in request.sequences] == [5.0, math.inf, math.inf]
