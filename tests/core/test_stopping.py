import pytest
from hypothesis import given
from hypothesis import strategies as st

from space_cli.core.stopping import StopRule, TextStream, cut_at_stop


def decode_bytes(ids):
    """A tokenizer of single bytes."""
    return bytes(ids).decode("utf-8", errors="replace")


@given(st.text(max_size=30))
def test_stream_gives_the_text_in_final_pieces(text):
    stream = TextStream(decode_bytes)

    pieces = [stream.push(byte) for byte in text.encode()]

    assert "".join(pieces) + stream.flush() == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces) or "\N{REPLACEMENT CHARACTER}" in text


@given(st.text("ab\n", max_size=20), st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3))
def test_ends_with_the_first_token_that_completes_a_stop_string(text, stops):
    state = StopRule(100, stop_strings=tuple(stops), decode=decode_bytes).begin()

    count, reason = state.push_all(text.encode())

    ends = [index for index in range(1, len(text) + 1) if any(stop in text[:index] for stop in stops)]
    assert count == (ends[0] if ends else len(text))
    assert reason == ("stop_string" if ends else None)


def test_an_unfinished_character_is_shown_by_flush_alone():
    stream = TextStream(decode_bytes)

    assert stream.push(0xE2) == ""
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"


def test_end_of_sequence_and_length():
    rule = StopRule(3, frozenset({7, 8}))

    assert rule.begin().push_all([1, 8, 2]) == (2, "eos")
    assert rule.begin().push_all([1, 2, 3, 4]) == (3, "length")
    assert rule.begin().push_all([1, 2]) == (2, None)


def test_text_is_cut_at_the_first_stop_string():
    assert cut_at_stop("a\ndef b\nclass", ("\nclass", "\ndef")) == "a"
    assert cut_at_stop("abc", ("x",)) == "abc"


def test_impossible_rules_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        StopRule(0)
    with pytest.raises(ValueError, match="decode"):
        StopRule(1, stop_strings=("x",))
    with pytest.raises(ValueError, match="empty"):
        StopRule(1, stop_strings=("",), decode=decode_bytes)
