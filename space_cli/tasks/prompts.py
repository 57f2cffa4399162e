"""Prompts, and suites of them: what is asked, and the rules by which an answer ends and is scored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


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
