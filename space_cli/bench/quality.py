"""Scores answers by their suite's metric: tests passed, exact number, or ROUGE-L of a summary."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

from space_cli.bench.record import Sample
from space_cli.errors import UsageProblem
from space_cli.sandbox import contained
from space_cli.tasks.prompts import Metric, Prompt, Suite

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*(?:\n|\Z)", re.MULTILINE)

_NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = re.compile(r"(?s:.*#### )|[,$]")
"""lm-evaluation-harness, tasks/gsm8k/gsm8k.yaml: `flexible-extract` and `regexes_to_ignore`."""

_LONGEST_NUMBER = 40


def check(metrics: Collection[Metric | None], *, execute: bool) -> dict[Metric, str]:
    """Return the metrics that will not be scored, with the reason.

    Args:
        metrics: of the suites.
        execute: the user asked for answers to be run.

    Raises:
        UsageProblem: answers shall be run and cannot be contained here, or have no tests.
    """
    missing: dict[Metric, str] = {}
    if execute and "pass@1" not in metrics:
        raise UsageProblem("--execute: no suite here has tests", hint="leave it out")
    if execute and (problem := contained.unsupported_reason()) is not None:
        raise UsageProblem(problem, hint="leave --execute out")
    if not execute and "pass@1" in metrics:
        missing["pass@1"] = "answers are run under --execute alone"
    if "ROUGE-L" in metrics and find_spec("rouge_score") is None:
        missing["ROUGE-L"] = "needs rouge-score: pip install 'space-decoding[eval]'"
    return missing


def score_all(samples: Sequence[Sample], suites: Collection[Suite], *, missing: Collection[Metric]) -> None:
    """Set the score of every sample; equal answers to the same prompt are scored once.

    Args:
        samples: of finished answers.
        suites: that they answer.
        missing: metrics left out.
    """
    known = {(suite.name, prompt.task_id): (prompt, suite.metric) for suite in suites for prompt in suite.prompts}
    alike: dict[tuple[Prompt, Metric, str], list[Sample]] = {}
    for sample in samples:
        prompt, metric = known[sample.suite, sample.task_id]
        if metric is not None and metric not in missing:
            alike.setdefault((prompt, metric, sample.text), []).append(sample)
    # threads suffice: each waits for its own process
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    try:
        for group, (score, outcome) in zip(
            alike.values(), pool.map(lambda key: score_answer(*key), alike), strict=True
        ):
            for sample in group:
                sample.score, sample.outcome = score, outcome
    finally:
        pool.shutdown(cancel_futures=True)


def score_answer(prompt: Prompt, metric: Metric, text: str) -> tuple[float, str | None]:
    """Return the score of an answer, 0 to 1, and its outcome in one printable line.

    Runs the answer where the metric is "pass@1": ask `check` first. May be called from several threads.
    """
    if metric == "pass@1":
        return _passes(prompt, text)
    if prompt.reference is None:
        raise ValueError(f"{prompt.task_id} has no reference for {metric}")
    if metric == "ROUGE-L":
        return _rouge_scorer().score(prompt.reference, text)["rougeL"].fmeasure, None
    return _exact_match(prompt.reference, text)


def _passes(prompt: Prompt, text: str) -> tuple[float, str]:
    if prompt.code is None:
        raise ValueError(f"{prompt.task_id} has no tests")
    outcome = contained.run_submission(prompt.code.before + code_of(text) + prompt.code.after)
    return float(outcome.passed), outcome.reason


def code_of(text: str) -> str:
    """Return the code in an answer: its first fenced Markdown block, or the whole text if there is none.

    A bare fence behind indented text, or the only one, closes what the prompt began: the code stands before it.
    Source: the two forms that lm-evaluation-harness takes apart, tasks/humaneval/utils.py and tasks/mbpp/utils.py.
    """
    fences = list(_FENCE.finditer(text))
    if not fences:
        return text
    first = fences[0]
    before = text[: first.start()]
    if not first[1] and before.strip() and (len(fences) == 1 or before.lstrip("\r\n").startswith((" ", "\t"))):
        return before
    return text[first.end() : fences[1].start() if len(fences) > 1 else None]


def _exact_match(reference: str, text: str) -> tuple[float, str]:
    found = [first or second for first, second in _NUMBER.findall(text)]
    if not found:
        return 0.0, "no number in the answer"
    right, answered = _bare(reference), _bare(found[-1])
    message = f"answered {answered[:_LONGEST_NUMBER]}"
    return float(answered == right), message


def _bare(number: str) -> str:
    return _IGNORED.sub("", number).strip().removesuffix(".")


@cache
def _rouge_scorer() -> RougeScorer:
    """Return the scorer with stemming, as summaries are commonly scored."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)
