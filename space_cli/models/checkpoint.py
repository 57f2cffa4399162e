"""A SPACE checkpoint: a Hugging Face model folder plus space_config.json."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from space_cli.errors import UsageProblem, first_invalid
from space_cli.files import atomic_write
from space_cli.text import read_text

SPACE_CONFIG_NAME = "space_config.json"
ADAPTER_FILE = "space_adapter.safetensors"
ADAPTER_FILES = ("adapter_config.json", ADAPTER_FILE)
"""What an adapter checkpoint holds in place of weights: peft's own description, and the tensors."""


class SpaceConfig(BaseModel):
    """The SPACE fields of a checkpoint.

    Attributes:
        format: version of this file.
        method: full, all weights were tuned; adapter, the base model is untouched.
        mask_token_ids: one id for all masks, or one per mask of a group.
        candidates: k to decode with unless the user chooses another, up to `masks_per_group`.
        masks_per_group: m, as trained.
        base_model: Hub id or folder of the base; base_revision its commit.
        training: the settings and figures of the training.
        acceptance: measured acceptance, by suite.
    """

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    method: Literal["full", "adapter"]
    mask_token_ids: list[int] = Field(min_length=1)
    candidates: int = Field(ge=1)
    masks_per_group: int = Field(ge=1)
    base_model: str | None = None
    base_revision: str | None = None
    training: dict[str, Any] = Field(default_factory=dict)
    acceptance: dict[str, Any] = Field(default_factory=dict)

    @property
    def accepted_by_depth(self) -> list[float]:
        """Acceptance rate by depth when last measured; empty if never measured."""
        found = [each.get("accepted_by_depth") for each in self.acceptance.values() if isinstance(each, dict)]
        known = [rates for rates in found if isinstance(rates, list)]
        return list(takewhile(_is_rate, known[-1])) if known else []

    @model_validator(mode="after")
    def _ids_match_masks(self) -> SpaceConfig:
        if len(self.mask_token_ids) not in (1, self.masks_per_group):
            raise ValueError(f"mask_token_ids needs 1 or {self.masks_per_group} ids, not {len(self.mask_token_ids)}")
        return self

    @classmethod
    def load(cls, folder: Path) -> SpaceConfig:
        """Read the config of a checkpoint folder.

        Raises:
            UsageProblem: the file is malformed; names file and key.
        """
        file = folder / SPACE_CONFIG_NAME
        try:
            return cls.model_validate_json(read_text(file))
        except ValidationError as error:
            raise UsageProblem(f"{file}: {first_invalid(error)}") from error

    def save(self, folder: Path) -> None:
        """Write the config into a folder, whole or not at all."""
        atomic_write(folder / SPACE_CONFIG_NAME, self.model_dump_json(indent=2) + "\n")


def _is_rate(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1
