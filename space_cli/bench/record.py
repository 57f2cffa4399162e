"""The record of a benchmark: samples, sums per suite, and their JSON."""

from __future__ import annotations

from pydantic import BaseModel, Field

from space_cli.bench.profile import Profile
from space_cli.records import Record


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
        score: 0 to 1 by the suite's metric; None where it was not scored.
        outcome: how the scoring went, as "passed", "timed out" or "NameError: name 'x' is not defined".
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
        metric: by which answers were scored; None where they were not.
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

    @property
    def is_whole_suite(self) -> bool:
        """Whether the row sums up all answers of a suite, repetitive ones and every category included."""
        return self.outputs == "all" and self.category is None


class BenchRecord(Record):
    """A benchmark; `profile` is there where it was asked for."""

    profile: Profile | None = None

    results: list[Result] = Field(default_factory=list)
    samples: list[Sample] = Field(default_factory=list)
