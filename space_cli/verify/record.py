"""The record of a verification: answers, divergences, sums per suite, and the verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, Field

from space_cli.records import Record

Verdict = Literal["tie", "violation"]
AGAINST = ("ar", "hf", "base")
"""What SPACE is compared with: our AR baseline, transformers' `generate`, an adapter's base without the adapter."""
MIN_P_VALUE = 1e-4
"""A distribution test below this counts as a violation."""


class Divergence(BaseModel):
    """The first place where two answers differ, or a draft that differs from its masks' prediction.

    Attributes:
        prompt: the task id.
        against: ar, hf, base, or drafts.
        position: index of the token in the answer; for drafts, of the token guessed.
        expected: the other side's token id; None where its answer had ended.
        got: SPACE's token id; None where its answer had ended.
        context: the end of the text before.
        gap: difference of the two tokens' scores in `exact_dtype`; None where one of them could not be chosen at all.
        noise: largest error of a logit found at this place in the dtype of the run, against `exact_dtype`.
        verdict: tie where that error explains either token, else violation.
    """

    suite: str
    prompt: str
    seed: int | None
    against: str
    position: int
    expected: int | None
    got: int | None
    expected_text: str
    got_text: str
    context: str
    gap: float | None
    noise: float | None
    exact_dtype: str | None
    verdict: Verdict
    reason: str


class Answer(BaseModel):
    """One prompt under one seed.

    Attributes:
        tokens: in SPACE's answer, whose ids are `token_ids`.
        identical: whether it equals the answer of each method compared with.
        accepted_by_step: acceptance length of each step.
        drafts_checked: mask groups whose predictions were recomputed by a plain causal call.
    """

    suite: str
    prompt: str
    seed: int | None
    tokens: int
    token_ids: list[int]
    identical: dict[str, bool]
    accepted_by_step: list[int]
    drafts_checked: int
    divergences: list[Divergence]


class Row(BaseModel):
    """One comparison over one suite; for drafts, `answers` counts mask groups, and `identical` those that agree."""

    suite: str
    against: str
    answers: int
    identical: int
    ties: int
    violations: int


class KernelSelfTest(BaseModel):
    """Whether this machine gives a token the same bits alone and in a block.

    Attributes:
        positions: tokens evaluated both ways.
        bit_equal: how many had the same logits bit for bit.
        largest_difference: of any logit.
    """

    positions: int
    bit_equal: int
    largest_difference: float


class Distribution(BaseModel):
    """Test of the first two tokens over many seeds against the exact distribution of transformers' sampling.

    Attributes:
        bins: groups of pairs of tokens, each with an expected count of at least five.
        p_value: probability that a right sampler is at least this far off.
    """

    suite: str
    prompt: str
    method: str
    draws: int
    bins: int
    chi_squared: float
    p_value: float


class Verification(Record):
    """The record of a whole run.

    Attributes:
        lossless: no violation was found, and with `strict` no tie either; None where the run broke.
        broken: an error ended the run, so that nothing follows from the answers before it.
        prompts: distinct prompts; answers count each prompt once per seed.
        tokens: in all of SPACE's answers.
        identical: answers that equal all those they were compared with.
        accepted: how often a step accepted 0, 1, ... candidates.
        never_accepted: acceptance lengths that no step had, so that nothing is known of them.
    """

    lossless: bool | None = None
    broken: bool = False
    prompts: int = 0
    tokens: int = 0
    identical: int = 0
    accepted: list[int] = Field(default_factory=list)
    never_accepted: list[int] = Field(default_factory=list)
    rows: list[Row] = Field(default_factory=list)
    divergences: list[Divergence] = Field(default_factory=list)
    kernels: KernelSelfTest | None = None
    distributions: list[Distribution] = Field(default_factory=list)
    answers: list[Answer] = Field(default_factory=list)

    def conclude(self, *, candidates: int | None, strict: bool) -> None:
        """Sum up the findings so far.

        Args:
            candidates: k, the longest acceptance; None where it differs from step to step.
            strict: a tie counts as a failure too.
        """
        accepted = Counter(length for answer in self.answers for length in answer.accepted_by_step)
        self.prompts = len({(answer.suite, answer.prompt) for answer in self.answers})
        self.tokens = sum(answer.tokens for answer in self.answers)
        self.identical = sum(all(answer.identical.values()) for answer in self.answers)
        longest = max(accepted, default=0) if candidates is None else candidates
        self.accepted = [accepted[length] for length in range(longest + 1)]
        # blocks that change from step to step need not accept every length
        self.never_accepted = [length for length in range((candidates or -1) + 1) if not accepted[length]]
        self.divergences = [
            found
            for answer in self.answers
            for found in answer.divergences
            # a draft changed by rounding costs at most one step
            if found.against != "drafts" or found.verdict == "violation"
        ]
        self.rows = _rows(self.answers)
        counted = {"tie", "violation"} if strict else {"violation"}
        self.lossless = not any(divergence.verdict in counted for divergence in self.divergences) and all(
            test.p_value >= MIN_P_VALUE for test in self.distributions
        )
        if self.broken and self.lossless:
            self.lossless = None


def _rows(answers: Sequence[Answer]) -> list[Row]:
    rows = []
    for suite in dict.fromkeys(answer.suite for answer in answers):
        of_suite = [answer for answer in answers if answer.suite == suite]
        for against in dict.fromkeys(name for answer in of_suite for name in answer.identical):
            compared = [answer.identical[against] for answer in of_suite if against in answer.identical]
            rows.append(_row(of_suite, suite, against, len(compared), sum(compared)))
        drafts = sum(answer.drafts_checked for answer in of_suite)
        if drafts:
            wrong = sum(found.against == "drafts" for answer in of_suite for found in answer.divergences)
            rows.append(_row(of_suite, suite, "drafts", drafts, drafts - wrong))
    return rows


def _row(answers: Sequence[Answer], suite: str, against: str, compared: int, identical: int) -> Row:
    verdicts = Counter(found.verdict for answer in answers for found in answer.divergences if found.against == against)
    return Row(
        suite=suite,
        against=against,
        answers=compared,
        identical=identical,
        ties=verdicts["tie"],
        violations=verdicts["violation"],
    )
