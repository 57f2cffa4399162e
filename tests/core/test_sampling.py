import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from space_cli.core.sampling import Sampler, Sampling


def one_row(sampling, logits, history):
    return Sampler.from_sampling(sampling).step_logits(logits[None]).token(0, history)


@given(st.integers(0, 2**63), st.integers(1, 50))
def test_a_choice_depends_on_logits_history_length_and_seed_alone(seed, length):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(length))
    sampling = Sampling(temperature=0.9, seed=seed)
    busy = Sampler.from_sampling(sampling)
    step_logits = busy.step_logits(logits.repeat(3, 1))

    for position in range(1, 100):
        step_logits.token(0, [1] * position)

    assert step_logits.token(2, [3] * length) == one_row(sampling, logits, [7] * length)


def test_sampling_has_the_softmax_distribution():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    expected = torch.softmax(logits / 0.7, dim=0) * 4000
    counts = torch.zeros(4)

    for seed in range(40):
        step_logits = Sampler.from_sampling(Sampling(temperature=0.7, seed=seed)).step_logits(logits[None])
        for position in range(1, 101):
            counts[step_logits.token(0, [0] * position)] += 1

    # chi-squared with 3 degrees of freedom: 16.3 is exceeded once in a thousand
    assert ((counts - expected) ** 2 / expected).sum() < 16.3


def test_neighbouring_seeds_and_positions_are_independent():
    logits = torch.zeros(1, 1000)
    seen = {
        Sampler.from_sampling(Sampling(temperature=1.0, seed=seed)).step_logits(logits).token(0, [0] * position)
        for seed in range(10)
        for position in range(1, 11)
    }

    assert len(seen) > 85


def test_greedy_takes_the_first_of_equal_logits():
    assert one_row(Sampling(), torch.tensor([0.0, 2.0, 2.0]), [1]) == 1


def test_repetition_penalty_sees_each_rows_own_history():
    step_logits = Sampler.from_sampling(Sampling(repetition_penalty=5.0)).step_logits(
        torch.tensor([[2.0, 1.0], [2.0, 1.0]])
    )

    assert step_logits.token(0, [1]) == 0
    assert step_logits.token(1, [0]) == 1


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0, top_k=2), Sampling(1.0, top_p=0.8), Sampling(1.0, min_p=0.2), Sampling(0.05)]
)
def test_filters_keep_to_the_likely_tokens(sampling):
    step_logits = Sampler.from_sampling(sampling).step_logits(torch.tensor([[4.0, 3.5, -2.0, -3.0]]))

    assert {step_logits.token(0, [0] * position) for position in range(1, 60)} <= {0, 1}


def test_negative_temperature_is_refused():
    with pytest.raises(ValueError, match="temperature"):
        Sampling(-1.0)
