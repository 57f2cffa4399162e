import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from space_cli.core.drafting.corpus import SortedText
from space_cli.core.drafting.ngrams import LONGEST_MATCH

FEW_TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=60)


def matching(text, end, tokens):
    length = 0
    while length < min(end, len(tokens), LONGEST_MATCH) and text[end - 1 - length] == tokens[-1 - length]:
        length += 1
    return length


@given(texts=st.lists(FEW_TOKENS, min_size=1, max_size=4), tokens=FEW_TOKENS)
def test_continuations_are_those_of_the_longest_matches(texts, tokens):
    joined = [token for text in texts for token in [*text, -1]]

    found = SortedText.of(np.array(joined, dtype=np.int32)).lookup(tokens)

    places = [end for end in range(1, len(joined)) if joined[end] >= 0 and matching(joined, end, tokens)]
    for match, copied, _ in found:
        assert -1 not in copied
        assert any(
            matching(joined, end, tokens) == match and joined[end : end + len(copied)] == copied for end in places
        )
    assert [match for match, *_ in found] == sorted((match for match, *_ in found), reverse=True)


@given(st.integers(0, 2**32))
def test_a_place_that_stands_once_is_found_among_many(seed):
    generator = np.random.default_rng(seed)
    text = generator.integers(0, 50, 5000).astype(np.int32)
    at = int(generator.integers(20, 4900))

    found = SortedText.of(text).lookup([7, *text[at - 12 : at].tolist()])

    assert found[0].match >= 12
    assert found[0].tokens == text[at : at + 31].tolist()


def test_tokens_that_are_nowhere_are_not_found():
    text = SortedText.of(np.array([1, 2, 3, -1], dtype=np.int32))

    assert text.lookup([9]) == text.lookup([3]) == text.lookup([0]) == []
    assert text.lookup([2])[0].tokens == [3]
