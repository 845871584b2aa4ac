"""A growing completion and its deltas: every part is delivered once, and only after it was shown."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock.api.transcript import Transcript
from penstock.outputs import CompletionOutput, Delta, Logprob


def write(transcript: Transcript, text: str, *tokens: int, version: int = 0) -> None:
    """Add tokens whose logprob is minus their id, and half of that as sampled."""
    transcript.add(text, tokens, [-float(token) for token in tokens], [-token / 2 for token in tokens], version)
    if transcript.logprobs is not None:
        transcript.logprobs += [{token: Logprob(-float(token), 1)} for token in tokens]


def cut(transcript: Transcript) -> Delta:
    """The delta so far."""
    transcript.show()
    return transcript.take()


def test_cut_gives_what_was_shown_since_the_last_one() -> None:
    transcript = Transcript("r", 1)
    write(transcript, "ab", 1, 2)
    assert cut(transcript) == Delta("r", 1, "ab", (1, 2), (), (-1.0, -2.0), weight_versions=(0, 0))
    write(transcript, "c", 3)
    write(transcript, "", 4, version=7)
    assert cut(transcript) == Delta("r", 1, "c", (3, 4), (), (-3.0, -4.0), weight_versions=(0, 7))
    assert cut(transcript) == Delta("r", 1)


def test_cut_leaves_what_was_not_shown() -> None:
    transcript = Transcript("r")
    write(transcript, "a", 1)
    transcript.show()
    write(transcript, "b", 2)
    transcript.end("c", "stop", "d")
    assert transcript.take() == Delta("r", 0, "a", (1,), (), (-1.0,), weight_versions=(0,))
    assert cut(transcript) == Delta("r", 0, "bc", (2,), (), (-2.0,), "stop", "d", (0,))


def test_logprobs_are_cut_like_tokens_if_they_were_asked_for() -> None:
    transcript = Transcript("r", 0, [])
    write(transcript, "a", 1)
    assert cut(transcript).logprobs == ({1: Logprob(-1.0, 1)},)
    write(transcript, "b", 2)
    assert cut(transcript).logprobs == ({2: Logprob(-2.0, 1)},)
    assert transcript.completion().logprobs == [{1: Logprob(-1.0, 1)}, {2: Logprob(-2.0, 1)}]


def test_completion_is_all_of_it_whatever_was_cut() -> None:
    transcript = Transcript("r", 2)
    write(transcript, "ab", 1, 2)
    cut(transcript)
    write(transcript, "", 3, version=7)
    transcript.end("c", "length")
    assert transcript.completion() == CompletionOutput(
        index=2,
        text="abc",
        token_ids=[1, 2, 3],
        cumulative_logprob=-6.0,
        finish_reason="length",
        token_logprobs=[-1.0, -2.0, -3.0],
        sampled_logprobs=[-0.5, -1.0, -1.5],
        weight_versions=[0, 0, 7],
    )


def test_tokens_of_several_steps_may_come_with_a_version_each() -> None:
    transcript = Transcript("r")
    transcript.add("ab", [1, 2], weight_versions=(4, 5, 6))
    assert transcript.completion().weight_versions == [4, 5]


def test_draft_tokens_are_added_up() -> None:
    transcript = Transcript("r")
    transcript.count_draft(4, 2)
    transcript.count_draft(3, 0)
    completion = transcript.completion()
    assert (completion.num_drafted_tokens, completion.num_accepted_tokens) == (7, 2)


def test_lists_of_a_completion_are_the_callers() -> None:
    transcript = Transcript("r")
    write(transcript, "a", 1)
    transcript.completion().token_ids.clear()
    assert cut(transcript).token_ids == (1,)


def test_completion_without_tokens_sums_to_a_float() -> None:
    assert str(Transcript("r").completion().cumulative_logprob) == "0.0"


@given(st.lists(st.one_of(st.sampled_from(["show", "cut"]), st.tuples(st.text("xyz"), st.lists(st.integers(1, 9))))))
def test_joined_deltas_are_the_completion(moves: list[str | tuple[str, list[int]]]) -> None:
    transcript, deltas = Transcript("r"), list[Delta]()
    for move in moves:
        if move == "show":
            transcript.show()
        elif move == "cut":
            deltas.append(transcript.take())
        else:
            write(transcript, move[0], *map(int, move[1]))
    transcript.end("!", "stop")
    deltas.append(cut(transcript))
    whole = transcript.completion()
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [token for delta in deltas for token in delta.token_ids] == whole.token_ids
    assert [logprob for delta in deltas for logprob in delta.token_logprobs] == whole.token_logprobs
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + ["stop"]
