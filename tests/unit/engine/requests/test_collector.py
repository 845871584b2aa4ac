"""Events of a request's sequences become deltas and, at the end, its output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from penstock.api.transcript import Transcript
from penstock.engine.requests.collector import Collector
from penstock.engine.text.detokenizer import Detokenizer
from penstock.engine.text.stops import StopStrings
from penstock.engine.text.stream import TextStream
from penstock.outputs import Delta, Logprob, RequestMetrics
from penstock.sampling import SamplingParams
from penstock.scores import Score, ScorePart
from penstock.sequence import FinishReason
from penstock.step import Event, TokenLogprobs
from tests.letters import LetterTokenizer


def make(count: int = 1, **options: Any) -> Collector:
    """A collector of `count` candidates for a prompt of [9]."""
    params = SamplingParams(max_tokens=99, **options)
    stops = tuple(params.stop or ())
    streams = [
        TextStream(Detokenizer(LetterTokenizer()), StopStrings(stops, params.include_stop_str_in_output))
        for _ in range(count)
    ]
    return Collector("r", "j", [9], params, streams, lambda token: chr(97 + token))


def event(tokens: Sequence[int] = (), reason: FinishReason | None = None, **fields: Any) -> Event:
    """Each token has logprob -1, except "b" with -3; the sampled logprobs are half of that."""
    logprobs = tuple(scored(token) for token in tokens)
    return Event(0, tuple(tokens), logprobs, reason=reason, **fields)


def scored(token: int) -> TokenLogprobs:
    """A token's logprobs, with the two most likely."""
    logprob = -3.0 if token == 1 else -1.0
    return TokenLogprobs(token, logprob, logprob / 2, 5, ((0, -0.1, 1), (2, -0.2, 2)))


def push(collector: Collector, index: int, event: Event) -> Delta:
    """The delta after one event."""
    return cut(collector.push(index, event)[0])


def cut(transcript: Transcript) -> Delta:
    """The next delta."""
    transcript.show()
    return transcript.take()


def test_tokens_become_text_and_sums() -> None:
    collector = make()
    first = push(collector, 0, event([0, 1]))
    last = push(collector, 0, event([2], FinishReason.LENGTH, weight_version=7))
    assert (first.text, first.token_ids, first.token_logprobs, first.finish_reason) == (
        "ab",
        (0, 1),
        (-1.0, -3.0),
        None,
    )
    assert (last.text, last.finish_reason) == ("c", "length")
    output = collector.output(RequestMetrics())
    (only,) = output.outputs
    assert (output.finished, output.prompt, output.prompt_token_ids) == (True, "j", [9])
    assert (only.text, only.token_ids, only.cumulative_logprob) == ("abc", [0, 1, 2], -5.0)
    assert only.sampled_logprobs == [-0.5, -1.5, -0.5]
    assert only.weight_versions == [0, 0, 7]
    assert only.logprobs is None
    assert output.output_ids == [[9, 0, 1, 2]]


def test_stop_string_cuts_text_and_tokens() -> None:
    collector = make(stop="bc")
    delta = push(collector, 0, event([0, 1, 2, 3]))
    assert (delta.text, delta.token_ids, delta.finish_reason, delta.stop_reason) == ("a", (0, 1, 2), "stop", "bc")
    only = collector.output(RequestMetrics()).outputs[0]
    assert (only.token_ids, len(only.token_logprobs), only.cumulative_logprob) == ([0, 1, 2], 3, -5.0)
    assert collector.done


def test_draft_tokens_after_a_stop_string_were_not_accepted() -> None:
    collector = make(stop="bc")
    collector.push(0, event([3], num_drafted_tokens=2))
    collector.push(0, event([0, 1, 2, 3, 3], num_drafted_tokens=6, num_accepted_tokens=4))
    only = collector.output(RequestMetrics()).outputs[0]
    assert (only.token_ids, only.num_drafted_tokens, only.num_accepted_tokens) == ([3, 0, 1, 2], 8, 3)


def test_text_that_could_become_a_stop_string_is_held_back_until_the_end() -> None:
    collector = make(stop="bcd")
    assert push(collector, 0, event([0, 1])).text == "a"
    assert push(collector, 0, event([2], FinishReason.LENGTH)).text == "bc"


def test_a_stop_string_that_the_flush_completes_ends_the_completion() -> None:
    """finish_reason was "length", although the text was cut at the stop string."""
    for include, text in ((False, "a"), (True, "a\ufffd")):
        collector = half_a_character(include)
        delta = push(collector, 0, event([0, 1], FinishReason.LENGTH))
        assert (delta.text, delta.token_ids, delta.finish_reason, delta.stop_reason) == (text, (0, 1), "stop", "\ufffd")
        collector = half_a_character(include)
        collector.push(0, event([0, 1]))
        (delta,) = map(cut, collector.close(FinishReason.ABORT))
        assert (delta.text, delta.finish_reason, delta.stop_reason) == (text, "stop", "\ufffd")


def half_a_character(include: bool) -> Collector:
    """A collector that stops at U+FFFD, which is the text of token 1 until another token follows."""
    params = SamplingParams(max_tokens=2, stop="\ufffd", include_stop_str_in_output=include)
    stream = TextStream(Detokenizer(LetterTokenizer("a\ufffd")), StopStrings(("\ufffd",), include))
    return Collector("r", "j", [9], params, [stream], lambda token: "")


@pytest.mark.parametrize(("shown", "text"), [(False, "a"), (True, "ab")])
def test_text_of_the_stop_token_shows_only_when_asked_for(shown: bool, text: str) -> None:
    collector = make(stop_token_ids=[1], include_stop_str_in_output=shown)
    delta = push(collector, 0, event([0, 1], FinishReason.STOP, stop_token=1))
    assert (delta.text, delta.token_ids, delta.stop_reason) == (text, (0, 1), 1)


def test_eos_is_no_stop_reason_because_it_was_not_requested() -> None:
    delta = push(make(), 0, event([0, 1], FinishReason.STOP, stop_token=1))
    assert (delta.finish_reason, delta.stop_reason) == ("stop", None)


def test_logprobs_show_the_most_likely_tokens_and_the_chosen_one() -> None:
    collector = make(logprobs=2)
    delta = push(collector, 0, event([1]))
    wanted = {
        0: Logprob(-0.1, 1, "a"),
        2: Logprob(-0.2, 2, "c"),
        1: Logprob(-3.0, 5, "b", -1.5),
    }
    assert delta.logprobs == (wanted,)
    assert collector.output(RequestMetrics()).outputs[0].logprobs == [wanted]


def test_prompt_logprobs_begin_with_none_and_are_taken_once() -> None:
    collector = make(count=2, n=2, prompt_logprobs=0)
    for index in range(2):
        push(collector, index, event([0], prompt_logprobs=(scored(1),), num_cached_tokens=4))
    output = collector.output(RequestMetrics())
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == 2
    assert output.num_cached_tokens == 4


def test_a_score_that_begins_again_voids_its_earlier_parts() -> None:
    """After a preemption, or because the weights changed."""
    collector = make()
    parts = [ScorePart(begin, Score([0.0] * 2)) for begin in (0, 2, 0, 2, 4)]
    for part in parts:
        collector.push(0, event(scores=part))
    kept = collector.output(RequestMetrics()).score_parts
    assert [(part.begin, part.score) for part in kept] == [(part.begin, part.score) for part in parts[2:]]


def test_best_candidates_are_chosen_by_likelihood() -> None:
    collector = make(count=3, n=2, best_of=3)
    assert not collector.streams
    for index, token in enumerate((1, 0, 2)):
        collector.push(index, event([token, token], FinishReason.LENGTH))
    outputs = collector.output(RequestMetrics()).outputs
    assert [(out.index, out.text) for out in outputs] == [(0, "aa"), (1, "cc")]
    assert [(delta.index, delta.text, delta.finish_reason) for delta in map(cut, collector.chosen())] == [
        (0, "aa", "length"),
        (1, "cc", "length"),
    ]


def test_done_when_every_completion_has_ended() -> None:
    collector = make(count=2, n=2)
    push(collector, 0, event([0], FinishReason.LENGTH))
    assert not collector.done
    push(collector, 1, event([0, 0], FinishReason.LENGTH))
    assert collector.done


def test_closing_ends_what_still_runs_with_the_text_held_back() -> None:
    collector = make(count=2, n=2, stop="bcd")
    push(collector, 0, event([0], FinishReason.LENGTH))
    push(collector, 1, event([0, 1]))
    deltas = [cut(transcript) for transcript in collector.close(FinishReason.DEADLINE)]
    assert [(delta.index, delta.text, delta.finish_reason) for delta in deltas] == [(1, "b", "deadline")]
    assert [out.finish_reason for out in collector.output(RequestMetrics()).outputs] == ["length", "deadline"]
    assert collector.close(FinishReason.DEADLINE) == []


def test_closing_after_the_detokenizer_failed_does_not_fail_again() -> None:
    """The held-back text was decoded again, and the error ended the engine's loop."""
    collector = make()
    with pytest.raises(ValueError, match="no text for z"):
        push(collector, 0, event([25]))
    (delta,) = map(cut, collector.close(FinishReason.ERROR))
    assert (delta.text, delta.finish_reason) == ("", "error")


def test_candidates_that_end_early_show_the_best_of_them() -> None:
    """best_of > n streams nothing until the end; an early end used to deliver the held-back text of every candidate."""
    collector = make(count=3, n=1, best_of=3)
    for index in range(3):
        collector.push(index, event([index]))
    (delta,) = map(cut, collector.close(FinishReason.DEADLINE))
    assert (delta.index, delta.finish_reason, len(delta.token_ids)) == (0, "deadline", 1)


def test_alike_completions_are_generated_once_and_shown_as_many_times() -> None:
    collector = make(n=3, temperature=0.0)
    deltas = map(cut, collector.push(0, event([0, 1], FinishReason.LENGTH)))
    assert [(delta.index, delta.text) for delta in deltas] == [(0, "ab"), (1, "ab"), (2, "ab")]
    outputs = collector.output(RequestMetrics()).outputs
    assert [(out.index, out.text, out.token_ids) for out in outputs] == [(i, "ab", [0, 1]) for i in range(3)]
    outputs[0].token_ids.clear()
    assert outputs[1].token_ids == [0, 1]


def test_alike_completions_that_are_cut_short_all_end() -> None:
    collector = make(n=2, temperature=0.0, stop="bcd")
    for transcript in collector.push(0, event([0, 1])):
        assert cut(transcript).text == "a"
    deltas = map(cut, collector.close(FinishReason.ABORT))
    assert [(delta.index, delta.text) for delta in deltas] == [(0, "b"), (1, "b")]


def test_length_normalised_scores_prefer_what_is_likely_token_by_token() -> None:
    collector = make(count=2, n=2, rank_by="normalized_logprob")
    assert not collector.streams
    collector.push(0, event([1], FinishReason.LENGTH))
    collector.push(1, event([0, 0, 0, 0], FinishReason.LENGTH))
    outputs = collector.output(RequestMetrics()).outputs
    assert [(out.index, out.text, out.score) for out in outputs] == [(0, "aaaa", -1.0), (1, "b", -3.0)]


def test_scores_from_outside_decide() -> None:
    collector = make(count=3, n=2, best_of=3, rank_by=lambda output: len(output.text))
    for index in range(3):
        collector.push(index, event([index] * (index + 1), FinishReason.LENGTH))
    judging = collector.call_scorer()
    assert judging is not None
    collector.rank(judging.result(10))
    outputs = collector.output(RequestMetrics()).outputs
    assert [(out.text, out.score) for out in outputs] == [("ccc", 3.0), ("bb", 2.0)]


def test_consensus_is_a_score_from_outside() -> None:
    collector = make(count=3, n=1, best_of=3, rank_by="consensus")
    for index, tokens in enumerate(([0, 0], [1, 2], [1, 2])):
        collector.push(index, event(tokens, FinishReason.LENGTH))
    scores = collector.call_scorer()
    assert scores is not None
    collector.rank(scores.result(10))
    assert [(out.token_ids, out.score) for out in collector.output(RequestMetrics()).outputs] == [([1, 2], 0.5)]


def test_beams_are_ranked_by_the_score_of_the_search() -> None:
    collector = make(count=2, n=2, best_of=4, use_beam_search=True, temperature=0.0, length_penalty=2.0)
    collector.push(0, event([0, 0], FinishReason.STOP))
    collector.push(1, event([1], FinishReason.LENGTH))
    assert [out.score for out in collector.output(RequestMetrics()).outputs] == [-1.0 / 4, -1.5]
