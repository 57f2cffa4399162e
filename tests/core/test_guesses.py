"""What masks guess, tied to the token before: of a whole vocabulary it is the softmax of the sum."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from space_cli.core.drafting.guesses import Bigram, Guesses

VOCABULARY, RANK = 40, 3


def softmax(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def drawn(seed, masks=4):
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(masks, VOCABULARY)) * 2
    tables = generator.normal(size=(2, VOCABULARY, RANK)).astype(np.float32)
    return logits, Bigram(*tables, generator.normal(size=(masks, RANK)).astype(np.float32))


def score(bigram, depth, token):
    return bigram.following @ (bigram.gates[depth] * bigram.previous[token])


def shortlist(logits, count):
    tokens = np.argsort(-logits, axis=-1)[:, :count]
    return tokens, np.take_along_axis(softmax(logits), tokens, axis=-1)


@given(seed=st.integers(0, 1000), token=st.integers(0, VOCABULARY - 1), width=st.integers(1, 6))
def test_with_the_whole_vocabulary_it_is_the_softmax_of_the_sum(seed, token, width):
    logits, bigram = drawn(seed)
    guesses = Guesses(*shortlist(logits, VOCABULARY), width, bigram)

    for depth in range(len(logits)):
        expected = softmax(logits[depth] + score(bigram, depth, token))
        found = guesses.after(depth, token)
        assert [each for each, _ in found] == np.argsort(-expected)[:width].tolist()
        assert [probability for _, probability in found] == pytest.approx(np.sort(expected)[::-1][:width], rel=1e-4)


@given(seed=st.integers(0, 1000), count=st.integers(2, 20), token=st.integers(0, VOCABULARY - 1))
def test_a_shortlist_gives_probabilities_that_leave_room_for_the_rest(seed, count, token):
    logits, bigram = drawn(seed)
    tokens, probs = shortlist(logits, count)

    for depth in range(len(logits)):
        found = Guesses(tokens, probs, count, bigram).after(depth, token)
        assert sorted(each for each, _ in found) == sorted(tokens[depth].tolist())
        assert 0 < sum(probability for _, probability in found) < 1


@given(seed=st.integers(0, 1000), head=st.integers(0, VOCABULARY - 1))
def test_a_chain_takes_the_best_behind_the_best(seed, head):
    logits, bigram = drawn(seed)
    expected, token = [], head
    for depth, row in enumerate(logits):
        token = int(np.argmax(row + score(bigram, depth, token)))
        expected.append(token)

    assert Guesses(*shortlist(logits, VOCABULARY), 1, bigram).chain(head) == expected


def test_without_a_bigram_the_token_before_means_nothing():
    logits, _ = drawn(5)
    tokens, probs = shortlist(logits, 6)
    guesses = Guesses(tokens, probs, 2)

    assert guesses.after(1, 3) == guesses.after(1, 30) == list(zip(tokens[1, :2], probs[1, :2], strict=True))
    assert guesses.chain(7) == tokens[:, 0].tolist()
    assert len(guesses) == 4
