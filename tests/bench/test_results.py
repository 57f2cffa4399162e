import math
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import sample

from space_cli.bench.results import interval, rate, results


def test_acceptance_by_position_counts_only_steps_that_reached_so_far():
    # the last step of an answer is cut where it ends, and says nothing
    steps = sample(method="space", tokens_by_step=[1, 3, 2, 1, 4], depth_by_step=[0, 2, 2, 1, 3])

    (row,) = results([steps], ["space"])

    assert row.acceptance_by_position == pytest.approx([2 / 3, 1 / 2])
    assert row.step_tokens == [2, 1, 1, 1]


def test_decoding_is_kept_apart_from_the_first_token():
    (row,) = results([sample(seconds=2.0, first_step_seconds=0.5), sample("2", first_step_seconds=0.3)], ["ar"])

    assert row.first_token_seconds == pytest.approx(0.4)
    assert row.decode_tokens_per_second == pytest.approx(6 / 2.2)


def test_categories_have_rows_of_their_own():
    samples = [
        sample(task, method, category=category, seconds=seconds)
        for task, category in (("1", "qa"), ("2", "math"))
        for method, seconds in (("ar", 1.0), ("space", 0.5 if category == "qa" else 0.25))
    ]

    rows = {row.category: row for row in results(samples, ["ar", "space"]) if row.method == "space"}

    assert {category: row.speedup for category, row in rows.items()} == {None: pytest.approx(8 / 3), "qa": 2, "math": 4}


def test_an_interval_holds_the_speedup_and_is_a_point_where_all_prompts_agree():
    same = [[sample(str(n), seconds=seconds) for n in range(9)] for seconds in (0.5, 1.0)]
    spread = [sample(str(n), seconds=0.2 + 0.1 * n) for n in range(9)]

    low, high = interval([spread], [same[1]])

    assert interval([same[0]], [same[1]]) == pytest.approx((2.0, 2.0))
    assert low < rate(spread) / rate(same[1]) < high
    assert interval([same[0][:4]], [same[1][:4]]) is None


def test_prompts_are_drawn_with_both_sides_together():
    # a prompt that is slow is slow on both sides: the ratio does not vary though the rates do
    slow = [[sample(str(n), seconds=(1 + n) * factor) for n in range(9)] for factor in (1, 3)]

    assert interval([slow[0]], [slow[1]]) == pytest.approx((3.0, 3.0))


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=5))
def test_pass_at_k_is_the_chance_that_one_of_k_drawn_answers_passes(passed):
    samples = [
        sample(str(task), seed=seed, score=float(right))
        for task, answers in enumerate(passed)
        for seed, right in enumerate(answers)
    ]

    row = results(samples, ["ar"], {"s": "pass@1"})[0]

    for k in (1, 2, 3):
        missed = [math.comb(answers.count(False), k) / math.comb(3, k) for answers in passed]
        assert row.pass_at_k[k] == pytest.approx(1 - fmean(missed))
    assert row.quality == pytest.approx(row.pass_at_k[1])


def test_greedy_answers_have_a_mean_score_and_no_pass_at_k():
    rows = results([sample(score=0.25), sample("2", score=0.75)], ["ar"], {"s": "ROUGE-L"})

    assert (rows[0].metric, rows[0].quality, rows[0].pass_at_k) == ("ROUGE-L", 0.5, None)
    assert results([sample()], ["ar"], {"s": "ROUGE-L"})[0].metric is None


def test_energy_is_reported_per_token_where_it_was_read():
    (row,) = results([sample(joules=6.0), sample("2", joules=2.0)], ["ar"])

    assert row.joules_per_token == pytest.approx(1.0)
    assert np.isnan(results([sample()], ["ar"])[0].joules_per_token or np.nan)
