import json

import pytest
from samples import sample

from space_cli.bench.compare import changes, differing, read_report
from space_cli.bench.record import BenchRecord
from space_cli.errors import UsageProblem


def report(rates, *, prompts=8, environment=None, **changed):
    """A run whose methods give so many tokens per second, a little spread over the prompts."""
    samples = [
        sample(str(n), method, seconds=4 / (speed * (0.9 + 0.02 * n)), **changed)
        for method, speed in rates.items()
        for n in range(prompts)
    ]
    return BenchRecord(environment=environment or {"dtype": "bfloat16"}, settings={"model": "nano"}, samples=samples)


def verdicts(before, after):
    return {change.method: change.verdict for change in changes(before, after)}


def test_a_slower_machine_is_no_change_of_a_method():
    assert verdicts(report({"ar": 100, "space": 200}), report({"ar": 50, "space": 100})) == {
        "ar": "not judged",
        "space": "no change beyond noise",
    }


def test_more_speedup_is_faster_and_less_is_slower():
    before = report({"ar": 100, "space": 200})

    assert verdicts(before, report({"ar": 100, "space": 240}))["space"] == "faster"
    assert verdicts(before, report({"ar": 100, "space": 150}))["space"] == "slower"
    (_, space) = changes(before, report({"ar": 50, "space": 120}))
    assert space.ratio == pytest.approx(1.2)
    assert space.speedup == pytest.approx((2.0, 2.4))


def test_few_prompts_are_not_judged_and_prompts_not_shared_do_not_count():
    found = changes(report({"ar": 100, "space": 200}), report({"ar": 100, "space": 400}, prompts=3))

    assert [(change.prompts, change.verdict) for change in found][1] == (3, "too few prompts to tell")


def test_prompts_that_became_others_have_nothing_in_common():
    assert changes(report({"ar": 100}), report({"ar": 100}, prompt_tokens=9)) == []


def test_other_answers_and_other_quality_are_reported():
    before, after = report({"ar": 1}, token_ids=[1, 2], score=0.25), report({"ar": 1}, token_ids=[1, 3], score=0.5)

    (change,) = changes(before, after)

    assert change.other_answers == 8
    assert change.quality == (0.25, 0.5)


def test_what_the_runs_do_not_share_is_reported():
    assert differing(report({"ar": 1}), report({"ar": 1}, environment={"dtype": "float32"})) == [
        ("dtype", "bfloat16", "float32")
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not a record"), ("[1]", "not a record"), (json.dumps({"samples": 3}), "environment: Field required")],
)
def test_a_file_that_is_no_record_is_reported(tmp_path, content, message):
    file = tmp_path / "run.json"
    file.write_text(content)

    with pytest.raises(UsageProblem, match=message):
        read_report(file)


def test_a_record_that_is_not_there_is_reported(tmp_path):
    with pytest.raises(UsageProblem, match=r"none\.json: No such file"):
        read_report(tmp_path / "none.json")
