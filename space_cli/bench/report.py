"""What comes out of a run: samples, their sums per suite and method, and the JSON that holds both."""

from __future__ import annotations

import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

import space_cli
from space_cli.bench.profile import Profile
from space_cli.errors import RunFailed
from space_cli.files import write_whole
from space_cli.models.loading import LoadedModel

SCHEMA_VERSION = 1


class Sample(BaseModel):
    """One answer.

    Attributes:
        seconds: wall time of the answer, prefill included.
        first_step_seconds: wall time to the end of the first step, prefill included.
        parts: seconds of all steps by what they were spent on (see `core.stream.Parts`); None for foreign methods.
        tokens_by_step: tokens that came out of each model call.
        repetitive: tokens over distinct tokens above 3.5.
        identical: token for token AR's answer; None where that is not defined.
    """

    suite: str
    task_id: str
    method: str
    prompt_tokens: int
    tokens: int
    steps: int
    seconds: float
    first_step_seconds: float
    parts: dict[str, float] | None = None
    token_ids: list[int]
    text: str
    tokens_by_step: list[int]
    finish_reason: str | None
    repetitive: bool
    identical: bool | None = None


class Result(BaseModel):
    """One method on one suite.

    Attributes:
        outputs: "all", or "without repetitive" for the prompts whose AR answer is not repetitive.
        speedup: tokens per second over AR's in the same run, all tokens over all seconds; None without AR.
        speedup_quartiles: of the same ratio prompt by prompt.
        identical: whether every answer is AR's; identical_prompts counts them. None where that is not defined.
    """

    suite: str
    method: str
    outputs: str
    prompts: int
    tokens: int
    steps: int
    seconds: float
    tokens_per_second: float
    tokens_per_step: float
    speedup: float | None
    speedup_quartiles: list[float] | None
    identical: bool | None
    identical_prompts: int | None


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


def results(samples: Sequence[Sample], methods: Sequence[str]) -> list[Result]:
    """Sum samples up per suite and method: all outputs, then those that are not repetitive where some are."""
    rows = []
    for suite in dict.fromkeys(sample.suite for sample in samples):
        of_suite = [sample for sample in samples if sample.suite == suite]
        # AR's own text decides, so that both sides of a comparison keep the same prompts
        reference = "ar" if "ar" in methods else methods[0]
        loops = {sample.task_id for sample in of_suite if sample.method == reference and sample.repetitive}
        rows += _rows(of_suite, suite, methods, "all")
        if loops:
            kept = [sample for sample in of_suite if sample.task_id not in loops]
            rows += _rows(kept, suite, methods, "without repetitive")
    return rows


def _rows(samples: Sequence[Sample], suite: str, methods: Sequence[str], outputs: str) -> list[Result]:
    by_method = {method: [sample for sample in samples if sample.method == method] for method in methods}
    baseline = {sample.task_id: _rate(sample) for sample in by_method.get("ar", ())}
    base_rate = _total_rate(by_method.get("ar", ()))
    return [_row(own, suite, method, outputs, baseline, base_rate) for method, own in by_method.items() if own]


def _row(
    samples: list[Sample], suite: str, method: str, outputs: str, baseline: dict[str, float], base_rate: float
) -> Result:
    tokens, steps = sum(sample.tokens for sample in samples), sum(sample.steps for sample in samples)
    rate = _total_rate(samples)
    ratios = [_rate(sample) / baseline[sample.task_id] for sample in samples if baseline.get(sample.task_id)]
    compared = [sample.identical for sample in samples if sample.identical is not None]
    return Result(
        suite=suite,
        method=method,
        outputs=outputs,
        prompts=len(samples),
        tokens=tokens,
        steps=steps,
        seconds=sum(sample.seconds for sample in samples),
        tokens_per_second=rate,
        tokens_per_step=tokens / steps if steps else 0.0,
        speedup=rate / base_rate if base_rate else None,
        speedup_quartiles=statistics.quantiles(ratios, n=4) if len(ratios) > 1 else None,
        identical=all(compared) if compared else None,
        identical_prompts=sum(compared) if compared else None,
    )


def _rate(sample: Sample) -> float:
    return sample.tokens / sample.seconds if sample.seconds else 0.0


def _total_rate(samples: Sequence[Sample]) -> float:
    seconds = sum(sample.seconds for sample in samples)
    return sum(sample.tokens for sample in samples) / seconds if seconds else 0.0


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
