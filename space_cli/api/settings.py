"""Settings of an answer: the options of `space chat`, with the same names and limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypedDict

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from space_cli import limits
from space_cli.api.grammar import ANY_OBJECT
from space_cli.core.sampling import Sampling
from space_cli.errors import UsageProblem, first_invalid

Mode = Literal["space", "ar"]


class SamplingSettings(BaseModel):
    """Settings that hold for a whole conversation.

    Attributes:
        candidates: tokens guessed per step, always as many; None is as many as pay.
        mode: ar is one token at a time; space drafts in every way the model can.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)

    temperature: limits.Temperature = 0.0
    top_k: limits.TopK = 0
    top_p: limits.TopP = 1.0
    min_p: limits.MinP = 0.0
    repetition_penalty: limits.RepetitionPenalty = 1.0
    presence_penalty: limits.CountPenalty = 0.0
    frequency_penalty: limits.CountPenalty = 0.0
    seed: limits.Seed = 0
    max_new_tokens: limits.MaxNewTokens = 512
    candidates: Annotated[int | None, Field(ge=1)] = None
    mode: Mode = "space"

    @classmethod
    def of(cls, **given: Any) -> Self:
        """Return settings that were given as options.

        Raises:
            UsageProblem: one is unknown or out of range; names it.
        """
        try:
            return cls(**given)
        except ValidationError as error:
            found = first_invalid(error)
            raise UsageProblem(f"{found.field} {found.value}: {found.reason}") from error

    def sampling(self) -> Sampling:
        """Return the sampling settings for the decoder."""
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
        )


class GenerationSettings(SamplingSettings):
    """Settings of one answer.

    Attributes:
        stop: the answer ends in front of the first of these texts.
        logprobs: number of likeliest tokens reported beside each token's log-probability; None reports nothing.
        json_schema: the answer is JSON that the schema holds for, as far as it comes before `max_new_tokens`.
        json_mode: the answer is a JSON object.
        prediction: what the answer is expected to be much like; a draft, which changes nothing of it.
    """

    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    json_schema: dict[str, Any] | None = None
    json_mode: bool = False
    prediction: str = ""

    @property
    def schema_to_follow(self) -> Mapping[str, Any] | None:
        """The schema of the answer, or None where it is any text."""
        return ANY_OBJECT if self.json_schema is None and self.json_mode else self.json_schema


class Options(TypedDict, total=False):
    """The fields of `GenerationSettings` as keyword arguments; see there."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    max_new_tokens: int
    candidates: int | None
    mode: Mode
    stop: tuple[str, ...] | list[str]
    logprobs: int | None
    json_schema: dict[str, Any] | None
    json_mode: bool
    prediction: str
