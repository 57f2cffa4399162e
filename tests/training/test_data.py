import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from space_cli.chat.templates import Turn
from space_cli.errors import UsageProblem
from space_cli.training.data import Completion, Conversation, Text, read_examples

SHARED = Path(__file__).parents[3] / "shared" / "data"

words = st.text(min_size=1, max_size=20).filter(str.strip)
conversations = st.lists(
    st.builds(Turn, st.sampled_from(["system", "user", "assistant"]), words), min_size=1, max_size=4
).map(lambda turns: (*turns, Turn("assistant", "a")))


def write(folder, rows, *, name="data.jsonl"):
    file = folder / name
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8", newline="")
    return str(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def said(*turns):
    return tuple(Turn(*turn.split()) for turn in turns)


def listed(*turns, keys=("role", "content")):
    return [dict(zip(keys, turn.split(), strict=True)) for turn in turns]


def sharegpt(*turns):
    return {"conversations": listed(*turns, keys=("from", "value"))}


ASKED = said("user q", "assistant a")
SEVERAL = ("system s", "user q", "assistant a", "user r")


@pytest.mark.parametrize(
    ("row", "name", "turns"),
    [
        ({"instruction": "q", "output": "a"}, "alpaca", ASKED),
        ({"instruction": "q", "input": "", "response": "a", "text": "all", "id": 3}, "alpaca", ASKED),
        ({"instruction": "q", "input": None, "output": "a"}, "alpaca", ASKED),
        ({"instruction": "q", "input": "x", "output": "a"}, "alpaca", (Turn("user", "q\n\nx"), ASKED[1])),
        ({"instruction": "q", "context": "x", "response": "a"}, "alpaca", (Turn("user", "q\n\nx"), ASKED[1])),
        (sharegpt("system s", "human q", "gpt a", "user r"), "sharegpt", said(*SEVERAL)),
        (sharegpt("user q", "chatgpt a") | {"weight": 1}, "sharegpt", ASKED),
        ({"prompt": "q", "messages": listed(*SEVERAL)}, "messages", said(*SEVERAL)),
        ({"prompt": listed("user q"), "completion": listed("assistant a")}, "prompt-completion", ASKED),
        ({"history": [], "prompt": "q", "response": "a"}, "prompt-completion", ASKED),
        ({"history": None, "prompt": "q", "completion": "a"}, "prompt-completion", ASKED),
        (
            {"history": [["q", "a"]], "prompt": "r", "response": "b"},
            "prompt-completion",
            said("user q", "assistant a", "user r", "assistant b"),
        ),
    ],
)
def test_a_row_becomes_a_conversation(tmp_path, row, name, turns):
    file = write(tmp_path, [row])

    loaded = read_examples(file)

    assert loaded.format == name
    assert loaded.source == file
    assert loaded.examples == [Conversation(turns, f"{file}:1")]


@pytest.mark.parametrize("answer", ["completion", "response"])
def test_a_prompt_and_its_completion_stay_plain(tmp_path, answer):
    file = write(tmp_path, [{"prompt": "q", answer: " a\n"}])

    loaded = read_examples(file)

    assert loaded.format == "prompt-completion"
    assert loaded.examples == [Completion("q", " a\n", f"{file}:1")]


def test_a_history_in_some_rows_makes_conversations_of_these_and_of_all_if_the_first_has_one(tmp_path):
    plain = {"prompt": "q", "response": "a"}
    chat = plain | {"history": [["q", "a"]]}

    first_plain = read_examples(write(tmp_path, [plain, chat])).examples
    first_chat = read_examples(write(tmp_path, [chat, plain])).examples

    assert [type(example) for example in first_plain] == [Completion, Conversation]
    assert [type(example) for example in first_chat] == [Conversation, Conversation]


@given(texts=st.lists(words, min_size=1, max_size=5))
def test_any_text_is_read_as_it_was_written(folder, texts):
    file = write(folder, [{"text": text} for text in texts])

    loaded = read_examples(file)

    assert loaded.format == "text"
    assert loaded.examples == [Text(text, f"{file}:{line}") for line, text in enumerate(texts, start=1)]


@given(st.lists(conversations, min_size=1, max_size=4), st.sampled_from(["a.jsonl", "a.json", "a.parquet"]))
def test_any_conversation_is_read_as_it_was_written(folder, conversations, name):
    rows = [{"messages": [{"role": turn.role, "content": turn.content} for turn in turns]} for turns in conversations]
    file = folder / name
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow.parquet").write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), file)
    else:
        file.write_text(json.dumps(rows) if name == "a.json" else "\n".join(map(json.dumps, rows)), "utf-8")

    assert [example.turns for example in read_examples(str(file)).examples] == conversations


@given(pairs=st.lists(st.tuples(words, words), min_size=1, max_size=4))
def test_any_cells_are_read_as_they_were_written(folder, pairs):
    file = folder / "data.csv"
    with file.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, quoting=csv.QUOTE_ALL).writerows([("prompt", "completion"), *pairs])

    examples = read_examples(str(file)).examples

    assert [(example.prompt, example.completion) for example in examples] == pairs


def test_a_row_of_csv_is_known_by_the_line_it_begins_in(tmp_path):
    file = tmp_path / "data.csv"
    file.write_text('\ufeffinstruction,input,output\r\n"a\nb",,1\r\n\r\nc,d,2\r\n', "utf-8", newline="")

    first, second = read_examples(str(file)).examples

    assert first == Conversation((Turn("user", "a\nb"), Turn("assistant", "1")), f"{file}:2")
    assert second == Conversation((Turn("user", "c\n\nd"), Turn("assistant", "2")), f"{file}:5")


def test_a_long_cell_is_read_whole(tmp_path):
    file = tmp_path / "data.csv"
    file.write_text("text\n" + "x" * 200_000 + "\n")

    assert len(read_examples(str(file)).examples[0].text) == 200_000


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.JSONL", "data.jsonl.gz", "data.json.gz"])
def test_json_lines_are_read_with_their_line_numbers(tmp_path, name):
    file = tmp_path / name
    content = b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b\\u2028"}'
    file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)

    assert read_examples(str(file)).examples == [Text("a", f"{file}:1"), Text("b\u2028", f"{file}:3")]


@pytest.mark.parametrize("name", ["data.json", "data.json.gz"])
def test_the_objects_of_an_array_have_the_lines_they_begin_in(tmp_path, name):
    file = tmp_path / name
    content = b'\xef\xbb\xbf \n[\n {"text":\n "a"},{"text": "b"}\n\n,\n{"text": "c"}]\n'
    file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)

    assert [(example.text, example.where) for example in read_examples(str(file)).examples] == [
        ("a", f"{file}:3"),
        ("b", f"{file}:4"),
        ("c", f"{file}:7"),
    ]


def test_a_limit_takes_the_first_examples_and_looks_at_no_more(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "a"}\n{"text": "b"}\nno JSON\n')

    assert [example.text for example in read_examples(str(file), limit=2).examples] == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "data.jsonl: no examples in it"),
        (b'{"text": "a"}\n{"text": \n', "data.jsonl:2: not JSON: Expecting value in column"),
        (b'{"text": "a"}\n\n["b"]\n', "data.jsonl:3: not a JSON object"),
        (b'["b"]\n', "data.jsonl:1: not a JSON object; understood are messages: "),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "data.jsonl:2: not UTF-8 text"),
        (b'{"text": "a\\ud800"}\n', "data.jsonl:1: 'text' holds half of a surrogate pair"),
        (b'{"text": ' + b"9" * 5000 + b"}\n", "data.jsonl:1: not JSON: Exceeds the limit"),
        (b"[" * 200_000 + b"\n", "data.jsonl:1: not JSON: maximum recursion"),
        (b"{}\n", "data.jsonl:1: the fields none are no known format; understood are "),
        (b'{"prompt": "a", "answer": "b"}\n', "data.jsonl:1: the fields 'prompt', 'answer' are no known format"),
        (b'{"instruction": "a"}\n', "data.jsonl:1: the fields 'instruction' are no known format"),
        (b"[]", "data.json: no examples in it"),
        (b'[{"text": "a"},\n3]', "data.json:2: not a JSON object"),
        (b'[{"text": "a"},\n\n{"text": }]', "data.json:3: not JSON: Expecting value in column 10"),
        (b'[{"text": "a"},\n', "data.json:2: not JSON: Expecting value"),
        (b'[{"text": "a"}\n', "data.json:2: not JSON: the array wants a comma or its end"),
        (b'[{"text": "a"}\n{"text": "b"}]', "data.json:2: not JSON: the array wants a comma or its end"),
        (b'[{"text": "a"}]\n\n{}', "data.json:3: not JSON: something follows the array"),
        (b'[\n{"text": "\xff"}]', "data.json:2: not UTF-8 text"),
        (b"[\n" + b"9" * 5000 + b"]", "data.json:2: not JSON: Exceeds the limit"),
        (b"[" * 200_000, "data.json:1: not JSON: maximum recursion"),
        (b'{\n"text": "a"\n}', "data.json:1: not JSON: Expecting property name"),
        (b"", "data.csv: no examples in it"),
        (b"text\n", "data.csv: no examples in it"),
        (b"prompt,completion\nq,a\n\nq\n", "data.csv:4: 'completion' must be a non-empty string"),
        (b"prompt,completion\nq,a,b\n", "data.csv:2: 3 cells under a header of 2"),
        (b'text\na\n"b\n', "data.csv:3: not CSV: unexpected end of data"),
        (b"text\na\n\xff\n", "data.csv:3: not UTF-8 text"),
        (b"txt\na\n", "data.csv:2: the fields 'txt' are no known format"),
    ],
)
def test_a_malformed_file_is_reported_with_the_line(tmp_path, content, message):
    file = tmp_path / message.partition(":")[0]
    file.write_bytes(content)

    with pytest.raises(UsageProblem) as problem:
        read_examples(str(file))

    assert message in str(problem.value)
    assert "\n" not in str(problem.value)


GOOD = {
    "alpaca": {"instruction": "q", "output": "a"},
    "messages": {"messages": listed("user q", "assistant a")},
    "sharegpt": sharegpt("human q", "gpt a"),
    "pair": {"prompt": "q", "completion": "a"},
    "text": {"text": "a"},
}


@pytest.mark.parametrize(
    ("form", "row", "message"),
    [
        ("text", {"txt": "a"}, "'text' must be a non-empty string"),
        ("text", {"text": 5}, "'text' must be a non-empty string"),
        ("alpaca", {"instruction": "q", "response": "a"}, "'output' must be a non-empty string"),
        ("alpaca", {"instruction": "q", "input": 3, "output": "a"}, "'input' must be a string"),
        ("alpaca", {"instruction": "q", "input": "\udfff", "output": "a"}, "'input' holds half of a surrogate pair"),
        ("pair", {"prompt": "q"}, "'completion' must be a non-empty string"),
        ("pair", {"prompt": ["q"], "completion": "a"}, "'prompt[0]' must be an object with 'role' and 'content'"),
        ("pair", {"prompt": [], "completion": "a"}, "'completion' must be a list of turns with 'role' and 'content'"),
        ("pair", {"prompt": listed(*SEVERAL), "completion": listed("user q")}, "'completion' must hold an assistant"),
        ("pair", {"prompt": "q", "completion": "a", "history": "h"}, "'history' must be a list of [user, assistant]"),
        ("pair", {"prompt": "q", "completion": "a", "history": [["h"]]}, "'history[0]' must be a pair of strings"),
        ("pair", {"prompt": "q", "completion": "a", "history": [[1, "h"]]}, "'history[0][0]' must be a string"),
        ("messages", {"messages": None}, "'messages' must be a list of turns with 'role' and 'content'"),
        ("messages", {"messages": ["q"]}, "'messages[0]' must be an object with 'role' and 'content'"),
        ("messages", {"messages": listed("bard q")}, "'messages[0].role' is 'bard'; known are sy"),
        ("messages", {"messages": [{"role": ["user"], "content": "q"}]}, "'messages[0].role' must be a string"),
        ("messages", {"messages": [{"role": "user", "content": [1]}]}, "'messages[0].content' must be a string"),
        ("sharegpt", {"conversations": "q"}, "'conversations' must be a list of turns with 'from' and 'value'"),
        ("sharegpt", sharegpt("bard a"), "'conversations[0].from' is 'bard'; known"),
        ("sharegpt", {"conversations": [{"from": "human"}]}, "'conversations[0].value' must be a string"),
    ],
)
@pytest.mark.parametrize("kind", ["lines", "array"])
def test_a_malformed_row_is_reported_with_line_and_field(tmp_path, form, row, message, kind):
    file = tmp_path / "data.json"
    rows = [json.dumps(GOOD[form]), json.dumps(row)]
    file.write_text("\n".join(rows) if kind == "lines" else "[" + ",\n".join(rows) + "]")

    with pytest.raises(UsageProblem) as problem:
        read_examples(str(file))

    assert str(problem.value).startswith(f"{file}:2: {message}")


def test_a_malformed_row_of_parquet_is_reported_with_its_number(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "data.parquet"
    parquet.write_table(
        pyarrow.table({"prompt": ["q", "q"], "response": ["a", "b"], "history": [[["q", "a"]], [["q"]]]}), file
    )

    with pytest.raises(UsageProblem, match=r"data\.parquet, row 2: 'history\[0\]' must be a pair of strings"):
        read_examples(str(file))


@pytest.mark.parametrize("content", [b"", b"PAR1 nothing of the kind PAR1"])
def test_a_file_that_is_no_parquet_is_reported(tmp_path, content):
    pytest.importorskip("pyarrow")
    (tmp_path / "data.parquet").write_bytes(content)

    with pytest.raises(UsageProblem, match=r"data\.parquet: not readable as Parquet: Parquet"):
        read_examples(str(tmp_path / "data.parquet"))


@pytest.mark.parametrize("name", ["data.jsonl.gz", "data.json.gz"])
def test_a_damaged_gzip_file_is_reported(tmp_path, name):
    file = tmp_path / name
    whole = gzip.compress(b'{"text": "a"}\n' * 100)
    file.write_bytes(whole[:-10])
    with pytest.raises(UsageProblem, match=r"gz: damaged gzip file: Compressed file ended"):
        read_examples(str(file))
    file.write_bytes(b'{"text": "a"}\n')
    with pytest.raises(UsageProblem, match=r"gz: damaged gzip file: Not a gzipped file"):
        read_examples(str(file))
    file.write_bytes(whole[:12] + b"\xff\xff\xff" + whole[15:])
    with pytest.raises(UsageProblem, match=r"gz: damaged gzip file"):
        read_examples(str(file))


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.csv", "folder/gone.json.gz"])
def test_a_file_that_is_not_there_is_reported(name):
    with pytest.raises(UsageProblem, match=f"^no file named '{name}'$"):
        read_examples(name)


def test_what_is_neither_a_file_to_read_nor_a_name_on_the_hub_is_reported(tmp_path):
    (tmp_path / "data.doc").write_text("text")
    (tmp_path / "folder.json").mkdir()

    with pytest.raises(UsageProblem, match=r"no kind of file that is read; give a file in \.jsonl, \.json"):
        read_examples(str(tmp_path / "data.doc"))
    with pytest.raises(UsageProblem, match="a folder; give a file in"):
        read_examples(str(tmp_path))
    with pytest.raises(UsageProblem, match="json: a folder; give a file in"):
        read_examples(str(tmp_path / "folder.json"))
    with pytest.raises(UsageProblem, match="File name too long"):
        read_examples("x" * 300)
    for name in ("/tmp/gone", "a/b/c", "two words", ""):
        with pytest.raises(UsageProblem):
            read_examples(name)


def test_a_dataset_of_the_hub_is_reported_in_one_line_when_offline():
    pytest.importorskip("datasets")

    with pytest.raises(UsageProblem) as problem:
        read_examples("someone/something")

    assert str(problem.value).startswith(
        "no file named 'someone/something', and no dataset of that name could be loaded from the Hub: Couldn't reach"
    )
    assert "\n" not in str(problem.value)


def test_a_dataset_of_the_hub_is_read_by_split_and_revision(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}, {"text": ""}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    loaded = read_examples("someone/something", limit=2, split="test", revision="v1")

    assert asked == [(("someone/something",), {"split": "test", "revision": "v1"})]
    assert loaded.examples == [Text("a", "someone/something, row 1"), Text("b", "someone/something, row 2")]
    assert read_examples("someone/something").left_out == {"nothing to learn": 1}


@pytest.mark.parametrize("package", ["datasets", "pyarrow"])
def test_a_missing_package_is_reported_with_what_to_install(monkeypatch, tmp_path, package):
    (tmp_path / "data.parquet").write_bytes(b"")
    source = {"datasets": "someone/something", "pyarrow": str(tmp_path / "data.parquet")}[package]
    monkeypatch.setitem(sys.modules, package, None)

    with pytest.raises(UsageProblem, match="; pip install datasets"):
        read_examples(source)


def test_reading_a_file_loads_no_heavy_package(tmp_path):
    file = write(tmp_path, [GOOD["messages"]])
    heavy = "sorted({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules))"
    script = f"import sys; from space_cli.training.data import read_examples; read_examples({file!r}); print({heavy})"

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("name", "form", "count"),
    [("gpteacher_codegen.jsonl.gz", "alpaca", 4527), ("oasst_en_pairs.jsonl.gz", "prompt-completion", 670)],
)
def test_real_data_are_read(name, form, count):
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is not there")

    loaded = read_examples(str(SHARED / name))

    assert (loaded.format, len(loaded.examples)) == (form, count)
    assert all(isinstance(example, Conversation) for example in loaded.examples)
