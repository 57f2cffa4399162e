import pytest
from samples import sample

from space_cli.bench import quality
from space_cli.bench.quality import check, code_of, score_all, score_answer
from space_cli.errors import UsageProblem
from space_cli.sandbox import contained as sandbox
from space_cli.tasks.prompts import Code, Prompt, Suite

contained = pytest.mark.skipif(
    sandbox.unsupported_reason() is not None, reason=f"programs are refused here: {sandbox.unsupported_reason()}"
)

DOUBLE = 'def double(x):\n    """Return twice x."""\n'
ADD = Prompt("add/0", (DOUBLE,), code=Code(DOUBLE, "\nassert double(3) == 6\n"))
WHOLE = Prompt("add/1", ("Write double.",), code=Code("", "\nassert double(3) == 6\n"))


@contained
@pytest.mark.parametrize(
    ("prompt", "text", "scored"),
    [
        (ADD, "    return 2 * x\n", (1.0, "passed")),
        (ADD, "    return x\n", (0.0, "AssertionError")),
        (ADD, "    return y\n", (0.0, "NameError: name 'y' is not defined")),
        (ADD, "", (0.0, "AssertionError")),
        (ADD, "    return 2 * x\n```\nThis doubles x.\n```python\ndouble(1)\n```\n", (1.0, "passed")),
        (ADD, f"Here it is:\n\n```python\n{DOUBLE}    return 2 * x\n```\nIt doubles x.", (1.0, "passed")),
        (WHOLE, "def double(x):\r\n  return x + x", (1.0, "passed")),
        (WHOLE, "Sure!\n```\ndef double(x):\n  return x + x\n```", (1.0, "passed")),
    ],
)
def test_code_is_judged_by_running_it(prompt, text, scored):
    assert score_answer(prompt, "pass@1", text) == scored


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("    return x", "    return x"),
        ("a ``` b", "a ``` b"),
        ("```python\nx\n```", "x\n"),
        ("```py title=a\nx\n```\n```python\ny\n```", "x\n"),
        ("Text\n```\nx\n```\nmore", "x\n"),
        ("  ```python\n  x\n  ```", "  x\n"),
        ("```python\nx", "x"),
        ("```", ""),
        ("x = 1\n```\nText", "x = 1\n"),
        ("    return x\n```\nText\n```\ny\n```", "    return x\n"),
    ],
)
def test_code_is_taken_out_of_its_fence(text, code):
    assert code_of(text) == code


@pytest.mark.parametrize(
    ("reference", "text", "score", "message"),
    [
        ("18", "She makes 9 * 2 = $18 every day. #### 18", 1.0, "answered 18"),
        ("18", "The answer is $18.", 1.0, "answered 18"),
        ("1,000", "so 1000", 1.0, "answered 1000"),
        ("1000", "It is $1,000.", 1.0, "answered 1000"),
        ("16 - 3 = 13\n#### 13", "13", 1.0, "answered 13"),
        ("-5", "it is -5", 1.0, "answered -5"),
        ("7", "7 apples of 8", 0.0, "answered 8"),
        ("7", "7.0", 0.0, "answered 7.0"),
        ("7", "seven", 0.0, "no number in the answer"),
        ("7", "", 0.0, "no number in the answer"),
        ("7", "9" * 100_000, 0.0, "answered " + "9" * 40),
    ],
)
def test_the_last_number_of_an_answer_is_compared(reference, text, score, message):
    assert score_answer(Prompt("g", ("?",), reference=reference), "exact match", text) == (score, message)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("The cat sat on the mat.", 1.0),
        ("the cats sat on the mats", 1.0),
        ("the cat", 0.5),
        ("mat on sat cat", 0.2),
        ("dogs run", 0.0),
        ("", 0.0),
    ],
)
def test_a_summary_is_scored_by_its_longest_common_subsequence(text, score):
    pytest.importorskip("rouge_score")
    prompt = Prompt("x", ("Summarise.",), reference="The cat sat on the mat")

    assert score_answer(prompt, "ROUGE-L", text) == (pytest.approx(score), None)


def test_nothing_is_executed_unless_asked(monkeypatch):
    monkeypatch.setattr(sandbox, "run_submission", lambda *_, **__: pytest.fail("executed"))

    assert check(["pass@1", "exact match", None], execute=False) == {"pass@1": "answers are run under --execute alone"}


@contained
def test_all_metrics_are_judged_where_all_is_there():
    pytest.importorskip("rouge_score")

    assert check(["pass@1", "exact match", "ROUGE-L"], execute=True) == {}


def test_a_missing_package_leaves_its_metric_out_with_a_word(monkeypatch):
    monkeypatch.setattr(quality, "find_spec", lambda _: None)

    assert check(["ROUGE-L"], execute=False) == {"ROUGE-L": "needs rouge-score: pip install 'space-decoding[eval]'"}


def test_executing_nothing_is_reported():
    with pytest.raises(UsageProblem, match="--execute: no suite here has tests"):
        check(["ROUGE-L", None], execute=True)


def test_the_same_answer_is_judged_once_and_all_samples_have_its_score(monkeypatch):
    asked = []
    monkeypatch.setattr(quality, "score_answer", lambda *key: asked.append(key) or (1.0, "passed"))
    suites = [
        Suite("code", (Prompt("1", ("a",)), Prompt("2", ("b",))), metric="pass@1"),
        Suite("sums", (Prompt("1", ("c",)),), metric="exact match"),
        Suite("talk", (Prompt("1", ("d",)),)),
    ]
    samples = [
        sample(task, method, suite=suite, text=text)
        for suite, task in (("code", "1"), ("code", "2"), ("sums", "1"), ("talk", "1"))
        for method, text in (("ar", "x"), ("space", "x"), ("hf", "y"))
    ]

    score_all(samples, suites, missing=["exact match"])

    assert sorted((prompt.task_id, text) for prompt, _, text in asked) == [
        ("1", "x"),
        ("1", "y"),
        ("2", "x"),
        ("2", "y"),
    ]
    assert [each.score for each in samples] == [1.0] * 6 + [None] * 6
    assert samples[0].outcome == "passed"


def test_a_machine_that_cannot_contain_programs_is_reported_before_the_run(monkeypatch):
    monkeypatch.setattr(sandbox, "unsupported_reason", lambda: "generated code can be contained on Linux alone")

    with pytest.raises(UsageProblem, match="on Linux alone; leave --execute out"):
        check(["pass@1"], execute=True)
    assert list(check(["pass@1"], execute=False)) == ["pass@1"]


@pytest.mark.parametrize("metric", ["pass@1", "ROUGE-L", "exact match"])
def test_a_prompt_without_what_its_metric_needs_is_a_fault_of_the_caller(metric):
    with pytest.raises(ValueError, match="bare has no"):
        score_answer(Prompt("bare", ("?",)), metric, "1")
