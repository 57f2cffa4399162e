"""How an answer is generated: the options of `space chat`, by the same names and with the same bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypedDict

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from space_cli.api.grammar import ANY_OBJECT
from space_cli.core.sampling import Sampling
from space_cli.errors import UsageProblem

Mode = Literal["space", "ar"]


class SamplingSettings(BaseModel):
    """What a whole conversation keeps.

    Attributes:
        candidates: tokens guessed per step, always as many; None is as many as pay.
        mode: ar is one token at a time; space drafts in every way the model can.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    max_new_tokens: Annotated[int, Field(ge=1)] = 512
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
            first = error.errors()[0]
            name = str(first["loc"][0])
            raise UsageProblem(f"{name} {first['input']}: {first['msg']}") from error

    def sampling(self) -> Sampling:
        """Return how tokens are chosen."""
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
    """What one answer is asked for with.

    Attributes:
        stop: the answer ends in front of the first of these texts.
        logprobs: so many likeliest tokens are told beside each token's log-probability; None tells nothing.
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
