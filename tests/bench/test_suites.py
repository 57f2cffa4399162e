import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from space_cli.bench.suites import load_suite
from space_cli.errors import UsageProblem


def test_humaneval_comes_with_its_package():
    suite = load_suite("humaneval")

    assert len(suite.prompts) == 164
    assert suite.prompts[0].task_id == "HumanEval/0"
    assert "\ndef" in suite.stop_strings
    assert load_suite("humaneval", limit=3).prompts == suite.prompts[:3]


@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=5))
def test_any_text_is_read_as_it_was_written(tmp_path_factory, prompts):
    file = tmp_path_factory.mktemp("suite") / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": p}, ensure_ascii=False) + "\n" for p in prompts), "utf-8", newline="")

    assert [prompt.turns[0] for prompt in load_suite(str(file)).prompts] == prompts


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "no prompts in it"),
        (b"\n\n", "no prompts in it"),
        (b'{"prompt": "a"}\n{"prompt": \n', r"prompts\.jsonl:2: not JSON"),
        (b'{"prompt": "a"}\n\n{"text": "b"}\n', r"prompts\.jsonl:3: needs a non-empty string field 'prompt'"),
        (b'["a"]\n', r"prompts\.jsonl:1: needs"),
        (b'{"prompt": ""}\n', r"prompts\.jsonl:1: needs"),
        (b'{"prompt": "a", "task_id": {}}\n', r"prompts\.jsonl:1: 'task_id'"),
        (b'{"prompt": "a", "task_id": 1}\n\n{"prompt": "b", "task_id": "1"}\n', "jsonl:3: task_id .1. stands in line"),
        (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', r"prompts\.jsonl:2: not UTF-8"),
        (b'{"prompt": "a\\ud800"}\n', r"prompts\.jsonl:1: 'prompt' holds half of a surrogate pair"),
        (b'{"prompt": "a", "task_id": "\\udfff"}\n', r"prompts\.jsonl:1: 'task_id' holds half"),
        (b'{"prompt": "a", "task_id": ' + b"9" * 5000 + b"}\n", r"prompts\.jsonl:1: not JSON: Exceeds the limit"),
        (b"[" * 200_000 + b"\n", r"prompts\.jsonl:1: not JSON"),
    ],
)
def test_a_malformed_file_is_told_with_the_line(tmp_path, content, told):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content)

    with pytest.raises(UsageProblem, match=told):
        load_suite(str(file))


def test_an_unknown_suite_is_told_with_a_suggestion(tmp_path):
    with pytest.raises(UsageProblem, match="did you mean humaneval"):
        load_suite("humanevl")
    with pytest.raises(UsageProblem, match="Is a directory"):
        load_suite(str(tmp_path))
    with pytest.raises(UsageProblem, match="File name too long"):
        load_suite("x" * 300)


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
