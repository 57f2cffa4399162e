"""The JSON schemas in docs/schemas, made of the records themselves; `python tests/schemas.py` writes them."""

import json
from pathlib import Path

from space_cli.bench.record import BenchRecord
from space_cli.chat.session import AnswerRecord
from space_cli.models.checkpoint import SpaceConfig
from space_cli.models.inventory import ModelStatus
from space_cli.verify.record import Verification

FOLDER = Path(__file__).parent.parent / "docs" / "schemas"
RECORDS = {
    "bench": BenchRecord,
    "chat": AnswerRecord,
    "model-status": ModelStatus,
    "space_config": SpaceConfig,
    "verify-lossless": Verification,
}


def schema(name):
    """Return the schema of what a command writes, as text."""
    return json.dumps(RECORDS[name].model_json_schema(mode="serialization"), indent=1) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in RECORDS:
        (FOLDER / f"{name}.json").write_text(schema(name))
