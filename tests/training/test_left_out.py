"""Rows that are no examples, what rows say besides, and plain text."""

import gzip
import json

import pytest

from space_cli.errors import UsageProblem
from space_cli.training.data import Text, read_examples

ASKED = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}


def write(folder, *rows, name="data.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def turns_of(folder, row):
    (example,) = read_examples(write(folder, row)).examples
    return [(turn.role, turn.content) for turn in example.turns]


@pytest.mark.parametrize(
    ("good", "empty"),
    [
        ({"instruction": "q", "output": "a"}, {"instruction": "q", "output": ""}),
        ({"instruction": "q", "output": "a"}, {"instruction": "q", "output": None}),
        ({"instruction": "q", "output": "a"}, {"instruction": " ", "output": "a"}),
        ({"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": " \n"}),
        ({"prompt": "q", "response": "a"}, {"prompt": "q", "response": "a", "history": [["h", ""]]}),
        ({"text": "a"}, {"text": "\n"}),
        (ASKED, {"messages": []}),
        (ASKED, {"messages": [{"role": "user", "content": "q"}]}),
        (ASKED, {"messages": [{"role": "assistant", "content": "a"}]}),
        (ASKED, {"messages": [*ASKED["messages"], {"role": "assistant", "content": ""}]}),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, {"conversations": []}),
    ],
)
def test_a_row_that_teaches_nothing_is_left_out_and_counted(tmp_path, good, empty):
    loaded = read_examples(write(tmp_path, good, empty, good, empty))

    assert len(loaded.examples) == 2
    assert loaded.left_out == {"nothing to learn": 2}
    assert "2 examples" in loaded.summary
    assert "2 left out: nothing to learn" in loaded.summary


def test_empty_rows_do_not_count_for_the_limit(tmp_path):
    file = write(tmp_path, {"text": ""}, {"text": "a"}, {"text": "b"}, {"text": "c"})

    assert [example.text for example in read_examples(file, limit=2).examples] == ["a", "b"]


def test_a_file_of_nothing_else_is_refused(tmp_path):
    with pytest.raises(UsageProblem, match=r"no examples in it: 2 nothing to learn"):
        read_examples(write(tmp_path, {"text": ""}, {"text": " "}))


def test_the_first_malformed_rows_are_reported_at_once(tmp_path):
    file = write(tmp_path, {"text": "a"}, {"text": 1}, {"txt": "a"}, {"text": ""}, {"text": [2]}, {"text": {}})

    with pytest.raises(UsageProblem) as problem:
        read_examples(file)

    message = str(problem.value)
    assert [f"{file}:{line}: 'text' must be" in message for line in (2, 3, 4, 5, 6)] == [True, True, False, True, False]
    assert message.endswith("and 1 more such rows")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED["messages"][0], CALL]},
        {"messages": [*ASKED["messages"], {"role": "tool", "content": "3"}, ASKED["messages"][1]]},
        ASKED | {"tools": [{"type": "function"}]},
    ],
)
def test_calls_of_tools_are_left_out_and_told(tmp_path, row):
    loaded = read_examples(write(tmp_path, ASKED, row))

    assert len(loaded.examples) == 1
    assert "1 left out: calls of tools" in loaded.summary


def test_fields_of_turns_without_a_place_are_reported_once(tmp_path):
    thought = {"role": "assistant", "content": "a", "reasoning_content": "hm", "name": ""}
    row = {"messages": [ASKED["messages"][0], thought]}

    loaded = read_examples(write(tmp_path, row, row))

    assert loaded.summary.count("not used: messages.reasoning_content") == 1
    assert "name" not in loaded.summary


# What rows say besides


def test_alpacas_system_and_history_are_used(tmp_path):
    row = {"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["p", "r"]]}

    assert turns_of(tmp_path, row) == [
        ("system", "s"), ("user", "p"), ("assistant", "r"), ("user", "q\n\ni"), ("assistant", "a"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "row",
    [
        {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"system": "s"} | ASKED,
        {"system": "s", "prompt": "q", "completion": "a"},
        {"system": "s", "messages": [{"role": "system", "content": "s"}, *ASKED["messages"]]},
    ],
)
def test_a_rows_system_is_its_first_turn(tmp_path, row):
    assert turns_of(tmp_path, row) == [("system", "s"), ("user", "q"), ("assistant", "a")]


def test_an_empty_system_is_none_and_two_that_differ_are_refused(tmp_path):
    assert turns_of(tmp_path, ASKED | {"system": ""}) == [("user", "q"), ("assistant", "a")]
    with pytest.raises(UsageProblem, match="'system' is not what the system turn says"):
        read_examples(write(tmp_path, {"system": "t", "messages": [{"role": "system", "content": "s"}]}))


# Plain text


@pytest.mark.parametrize("name", ["stories.txt", "stories.txt.gz", "STORIES.TXT"])
@pytest.mark.parametrize(
    ("content", "apart"),
    [
        ("One.\n\nTwo.\n<|endoftext|>\nThree.\n", "<|endoftext|>"),
        ("One.\r\n\r\n \r\nTwo.\r\nStill two.\r\n", "blank lines"),
    ],
)
def test_plain_text_is_documents(tmp_path, name, content, apart):
    file = tmp_path / name
    data = content.encode()
    file.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)

    loaded = read_examples(str(file))

    expected = (
        [("One.\n\nTwo.", 1), ("Three.", 5)] if apart != "blank lines" else [("One.", 1), ("Two.\nStill two.", 4)]
    )
    assert loaded.examples == [Text(text, f"{file}:{line}") for text, line in expected]
    assert f"2 examples, format text, documents apart at {apart}" in loaded.summary


def test_plain_text_in_another_encoding_is_reported(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ncaf\xe9\n")

    with pytest.raises(UsageProblem, match=r"a\.txt:2: not UTF-8 text"):
        read_examples(str(tmp_path / "a.txt"))


def test_an_empty_text_file_has_no_examples(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n")

    with pytest.raises(UsageProblem, match="no examples in it"):
        read_examples(str(tmp_path / "a.txt"))
