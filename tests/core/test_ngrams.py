from hypothesis import given
from hypothesis import strategies as st

from space_cli.core.drafting.ngrams import LONGEST_MATCH, MAX_COPIED, NgramIndex

FEW_TOKENS = st.lists(st.integers(0, 3), min_size=2, max_size=40)


def matching(text, end, tokens):
    """Return how many tokens in front of `end` of a text are the newest of `tokens`."""
    length = 0
    while length < min(end, len(tokens)) and text[end - 1 - length] == tokens[-1 - length]:
        length += 1
    return length


@given(tokens=FEW_TOKENS)
def test_the_first_continuation_is_of_the_longest_match(tokens):
    index = NgramIndex()
    for end in range(1, len(tokens) + 1):  # as it grows in an answer
        index.extend(tokens[:end])

    found = index.lookup(tokens)

    # brute force; among places that agree in three tokens, the newest eight are looked at
    places = {end: matching(tokens, end, tokens) for end in range(1, len(tokens))}
    known = max((3 if match >= 3 else min(match, 1) for match in places.values()), default=0)
    if known == 0:
        assert found == []
        return
    newest = [end for end, match in sorted(places.items()) if match >= known][-8:]
    match, end = max((min(places[end], LONGEST_MATCH), end) for end in newest)
    assert found[0].match == match
    assert found[0].tokens[: len(tokens) - end] == tokens[end : end + MAX_COPIED]
    assert [each.match for each in found] == sorted((each.match for each in found), reverse=True)
    assert len({each.tokens[0] for each in found}) == len(found)


@given(texts=st.lists(FEW_TOKENS, max_size=4), tokens=FEW_TOKENS)
def test_every_continuation_stands_in_one_of_the_texts_behind_its_match(texts, tokens):
    index = NgramIndex(texts)

    for match, copied, _ in index.lookup(tokens):
        assert any(
            matching(text, end, tokens) >= match and text[end : end + len(copied)] == copied[: len(text) - end]
            for text in texts
            for end in range(1, len(text))
        )


def test_a_text_that_runs_into_its_own_end_goes_on_as_it_did():
    index = NgramIndex([[9, 9, 9]])
    index.extend([1, 2, 3, 1, 2, 3, 1])

    assert index.lookup([1, 2, 3, 1, 2, 3, 1])[0].tokens[:6] == [2, 3, 1, 2, 3, 1]


def test_a_finished_text_ends_where_it_ended():
    assert NgramIndex([[1, 2, 3], [4, 5]]).lookup([1, 2])[0].tokens == [3]
