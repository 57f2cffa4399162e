"""What every command's JSON has in common."""

from __future__ import annotations

from json import dumps
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticSerializationError

SCHEMA_VERSION = 2


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


class Record(JsonRecord):
    """What every run leaves behind."""

    environment: dict[str, Any]
    settings: dict[str, Any]
