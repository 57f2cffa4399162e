"""What comes out of a run: samples, their sums, where it took place, and the JSON that holds it all."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from json import dumps
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field
from pydantic_core import PydanticSerializationError

import space_cli
from space_cli.bench.profile import Profile
from space_cli.compile.fingerprint import weights_digest
from space_cli.core.costs import ASSUMED_COSTS
from space_cli.errors import unwritten
from space_cli.files import write_whole
from space_cli.models.loading import LoadedModel

SCHEMA_VERSION = 2


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
        joules: used by the machine's processors meanwhile, other work included; None where no platform tells.
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
    joules: float | None = None
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
        joules_per_token: where the platform tells.
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
    speedup_interval: tuple[float, float] | None = None
    speedup_quartiles: list[float] | None
    first_token_seconds: float
    decode_tokens_per_second: float | None
    joules_per_token: float | None = None
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
        try:
            return self.model_dump_json(indent=1) + "\n"
        except PydanticSerializationError:  # the name of a file can hold bytes that are no text
            text = dumps(self.model_dump(), indent=1, ensure_ascii=False)
            return text.encode("utf-8", "replace").decode() + "\n"

    def write(self, file: Path) -> None:
        """Write the JSON, whole or not at all.

        Raises:
            RunFailed: the file cannot be written.
        """
        try:
            write_whole(file, self.to_json())
        except OSError as error:
            raise unwritten(file, error) from error


class Record(JsonRecord):
    """What every run leaves behind."""

    environment: dict[str, Any]
    settings: dict[str, Any]


class Report(Record):
    """A benchmark; `profile` is there where it was asked for."""

    profile: Profile | None = None

    results: list[Result] = Field(default_factory=list)
    samples: list[Sample] = Field(default_factory=list)


def environment(loaded: LoadedModel, *, threads: int) -> dict[str, Any]:
    """Return where a run took place: versions, machine, weights, dtype, engine, what steps cost there, date."""
    return {
        "space": space_cli.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": threads,
        "gpu": torch.cuda.get_device_name(loaded.model.device) if loaded.model.device.type == "cuda" else None,
        "device": loaded.device,
        "dtype": loaded.dtype,
        "weights": weights_digest(loaded.model),
        "engine": "eager" if loaded.program is None else "compiled",
        "step_costs": None if loaded.costs is ASSUMED_COSTS else asdict(loaded.costs),
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
