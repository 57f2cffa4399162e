import copy
from itertools import count

import pytest
import torch

from space_cli.core.sampling import Sampler, Sampling
from space_cli.verify.compare import mixed_drafter
from space_cli.verify.divergence import DivergenceAnalyzer

HISTORY = [17, 3, 250, 44, 91, 8]


@pytest.fixture(scope="module")
def twins(tiny_models):
    """A model to which tokens 40 and 41 are the same, and likelier than any other."""
    model = copy.deepcopy(tiny_models["llama"])
    with torch.inference_mode():
        hidden = model.base_model(torch.tensor([HISTORY])).last_hidden_state[0, -1]
    weight = model.lm_head.weight.data
    weight[40] = weight[41] = hidden * 2
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_scores_are_a_tie(twins, dtype):
    finding = DivergenceAnalyzer(copy.deepcopy(twins).to(dtype)).examine(
        HISTORY, HISTORY, Sampler(), expected=40, got=41
    )

    assert finding.verdict == "tie"
    assert finding.gap == 0
    assert finding.exact_dtype == "float64"
    assert finding.noise < (1e-3 if dtype == torch.float32 else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_no_rounding_explains_is_a_violation(twins, dtype):
    analyzer = DivergenceAnalyzer(copy.deepcopy(twins).to(dtype))

    finding = analyzer.examine(HISTORY, HISTORY, Sampler(), expected=40, got=7)

    assert finding.verdict == "violation"
    assert finding.gap > finding.noise


def test_two_wrong_tokens_are_a_violation_however_near_each_other(twins):
    model = copy.deepcopy(twins)
    model.lm_head.weight.data[51] = model.lm_head.weight.data[50]

    finding = DivergenceAnalyzer(model).examine(HISTORY, HISTORY, Sampler(), expected=50, got=51)

    assert finding.gap == 0
    assert finding.verdict == "violation"


def test_a_token_that_a_filter_left_out_has_no_gap(twins):
    sampler = Sampler.from_sampling(Sampling(temperature=0.7, top_k=2, seed=1))

    finding = DivergenceAnalyzer(twins).examine(HISTORY, HISTORY, sampler, expected=40, got=7)

    assert finding.gap is None
    assert finding.verdict == "violation"


def test_more_noise_than_the_gap_is_a_tie(twins):
    model = copy.deepcopy(twins)
    model.lm_head.weight.data[41] *= 1 - 1e-4

    exact = DivergenceAnalyzer(model).examine(HISTORY, HISTORY, Sampler(), expected=40, got=41)
    rounded = DivergenceAnalyzer(model.to(torch.bfloat16)).examine(HISTORY, HISTORY, Sampler(), expected=40, got=41)

    assert exact.verdict == "violation"
    assert rounded.verdict == "tie"


def test_mixed_drafts_are_right_up_to_each_length_in_turn():
    answer = [10, 11, 12, 13, 14]
    draft = mixed_drafter([5, *answer], 300, count())

    drafts = [list(draft([5], [0, 0, 0])) for _ in range(5)]

    assert drafts == [[11, 11, 12], [10, 12, 12], [10, 11, 13], [10, 11, 12], [11, 11, 12]]


def test_mixed_drafts_go_on_behind_the_answer():
    draft = mixed_drafter([5, 10], 300, count())

    assert list(draft([5, 10], [7, 8])) == [8, 8]
