import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from space_cli.core.drafting.corpus import SortedText
from space_cli.core.drafting.ngrams import BRANCHES, LONGEST_MATCH, MAX_COPIED, NgramIndex

FEW_TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=40)
TEXTS = st.lists(FEW_TOKENS, max_size=4)


def joined(texts):
    return [token for text in texts for token in [*text, -1]]


def matching(text, end, tokens):
    """Return how many tokens in front of `end` of a text are the newest of `tokens`."""
    length = 0
    while length < min(end, len(tokens), LONGEST_MATCH) and text[end - 1 - length] == tokens[-1 - length]:
        length += 1
    return length


def best_of(text, places, tokens):
    """Return by brute force the longest matches, then the newest, that go on differently: their lengths and tokens."""
    found = []
    for match, end in sorted(((matching(text, end, tokens), end) for end in places), reverse=True):
        following = text[end : end + MAX_COPIED]
        following = following[: following.index(-1)] if -1 in following else following
        if all(following[0] != other[0] for _, other in found):
            found.append((match, following))
    return found[:BRANCHES]


def in_places(text, tokens):
    """Return the places of a text behind the newest token that something follows."""
    return [end for end in range(1, len(text)) if text[end] >= 0 and matching(text, end, tokens)]


@given(texts=TEXTS, tokens=FEW_TOKENS)
def test_continuations_from_the_context_are_the_longest_matches_then_the_newest(texts, tokens):
    index = NgramIndex(texts)
    for end in range(1, len(tokens) + 1):  # as it grows in an answer
        index.extend(tokens[:end])

    found = index.lookup(tokens)

    text = joined(texts) + tokens
    places = in_places(text, tokens)
    long = [end for end in places if matching(text, end, tokens) >= 3]
    expected = best_of(text, (long or places)[-8:], tokens)  # of places that agree in three tokens, the newest eight
    assert [(match, copied[: len(other)]) for (match, copied, _), (_, other) in zip(found, expected, strict=True)] == (
        expected
    )
    assert all(each.is_context for each in found)


@given(texts=TEXTS, tokens=FEW_TOKENS)
def test_continuations_from_a_sorted_text_are_the_longest_matches_then_the_newest(texts, tokens):
    text = joined(texts)

    found = SortedText.of(np.array(text, dtype=np.int32)).lookup(tokens)

    # sorted by the six tokens in front, the nearest first; four on either side are looked at
    by_what_is_in_front = sorted(range(len(text)), key=lambda end: (text[max(0, end - 6) : end][::-1], end))
    at = sum(text[max(0, end - 6) : end][::-1] < tokens[: -6 - 1 : -1] for end in range(len(text)))
    nearest = set(by_what_is_in_front[max(0, at - 4) : at + 4])
    places = in_places(text, tokens)
    expected = best_of(text, nearest & set(places), tokens)
    assert [(match, copied) for match, copied, _ in found] == expected
    assert not any(each.is_context for each in found)


@given(texts=TEXTS, tokens=FEW_TOKENS)
def test_a_sorted_text_misses_no_match_of_up_to_six_tokens(texts, tokens):
    texts = [[*text, 9] for text in texts]  # so that something follows everywhere

    found = SortedText.of(np.array(joined(texts), dtype=np.int32)).lookup(tokens)

    longest = max((matching(joined(texts), end, tokens) for end in in_places(joined(texts), tokens)), default=0)
    assert min(6, found[0].match if found else 0) == min(6, longest)


@given(seed=st.integers(0, 2**32), vocabulary=st.sampled_from([50, 5000, 1 << 21]))
def test_a_place_that_stands_once_is_found_among_many(seed, vocabulary):
    generator = np.random.default_rng(seed)
    text = generator.integers(0, vocabulary, 5000).astype(np.int32)
    text[-1] = -1
    at = int(generator.integers(20, 4900))

    found = SortedText.of(text).lookup([7, *text[at - 12 : at].tolist()])

    assert found[0].match >= 12
    assert found[0].tokens == text[at : at + 31].tolist()


@pytest.mark.parametrize(
    "source", [NgramIndex([[1, 2, 3], [4, 5]]), SortedText.of(np.array([1, 2, 3, -1, 4, 5, -1], np.int32))]
)
def test_a_finished_text_ends_where_it_ended(source):
    assert source.lookup([1, 2])[0].tokens == [3]
    assert source.lookup([3]) == source.lookup([5]) == source.lookup([9]) == []


def test_a_text_that_runs_into_its_own_end_goes_on_as_it_did():
    index = NgramIndex([[9, 9, 9]])
    index.extend([1, 2, 3, 1, 2, 3, 1])

    assert index.lookup([1, 2, 3, 1, 2, 3, 1])[0].tokens[:6] == [2, 3, 1, 2, 3, 1]


def test_nothing_is_found_in_no_text():
    assert NgramIndex().lookup([1]) == SortedText.of(np.zeros(0, np.int32)).lookup([1]) == []
