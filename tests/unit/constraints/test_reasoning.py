from __future__ import annotations

from array import array

from penstock.constraints.reasoning import Marker

TOKENS = [b"<", b"/t>", b"/t", b">", b">x", b"a", b"</t>", b"a</t>", b"a</t>b", b"", b"<<", b"END"]
END = 11


def marker() -> Marker:
    return Marker("</t>", TOKENS, {END}, num_words=1)


def state_after(*tokens: int) -> int | None:
    found, state = marker(), 0
    for token in tokens:
        following = found.after(state, token)
        if following is None:
            return None
        state = following
    return state


def allowed(mask: array[int]) -> set[int]:
    return {token for token in range(len(TOKENS)) if mask[0] >> token & 1}


def test_the_marker_is_found_across_tokens() -> None:
    assert state_after(5, 0, 2, 3) == state_after(6) == state_after(7) == marker().end
    assert state_after(0, 1) == marker().end
    assert state_after(0, 2, 5) == 0
    assert state_after(10, 1) == marker().end  # "<<" leaves one "<" of the marker


def test_a_token_that_goes_on_after_the_marker_may_not_follow() -> None:
    assert state_after(8) is None
    assert state_after(0, 2, 4) is None
    assert state_after(4) == 0


def test_the_text_cannot_end_before_the_marker() -> None:
    assert state_after(END) is None


def test_masks_refuse_what_may_not_follow_and_nothing_else() -> None:
    every = set(range(len(TOKENS)))
    assert allowed(marker().mask(0)) == every - {8, END}
    assert allowed(marker().mask(1)) == every - {8, END}
    assert allowed(marker().mask(3)) == every - {4, 8, END}


def test_masks_and_states_agree_on_every_token_in_every_state() -> None:
    found = marker()
    for state in range(found.end):
        legal = {token for token in range(len(TOKENS)) if found.after(state, token) is not None}
        assert allowed(found.mask(state)) == legal


def test_a_token_outside_the_vocabulary_has_no_bytes() -> None:
    assert marker().after(2, 1000) == 2
