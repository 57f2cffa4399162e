"""The start of a training: identity of the base, an empty output folder, configs that can be saved."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from space_cli.compile.fingerprint import weights_digest
from space_cli.errors import UsageProblem
from space_cli.models.checkpoint import ADAPTER_FILES, SPACE_CONFIG_NAME
from space_cli.models.loading import LoadedModel
from space_cli.models.stops import repair

_OF_A_MODEL = (
    "model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*.json",
    "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.*",
)  # fmt: skip
_OF_A_TRAINING = ("checkpoint-*", ".unfinished", "training_settings.json", "training.jsonl", "training.png")
_ANSWERS = ("distilled.jsonl", "README.md")


def identity(loaded: LoadedModel) -> dict[str, Any]:
    """Return the identity of a base: a hash of its weights in memory, their format and its revision."""
    config = loaded.model.config
    quantised = getattr(config, "quantization_config", None)
    return {
        "weights": weights_digest(loaded.model),
        "dtype": loaded.dtype,
        "quantization": None if quantised is None else str(getattr(quantised, "quant_method", "")),
        "revision": getattr(config, "_commit_hash", None),
    }


def empty(output: Path, base: LoadedModel) -> None:
    """Remove an earlier training's files from a folder, so that no later resume or load mistakes them for this one's.

    Raises:
        UsageProblem: the base itself is there.
    """
    if not any((output / name).exists() for name in ("training_settings.json", SPACE_CONFIG_NAME)):
        return
    named = [base.source, base.space.base_model if base.space is not None else None]
    if any(name is not None and Path(name).exists() and Path(name).resolve() == output.resolve() for name in named):
        raise UsageProblem(f"--output {output}: is the folder of the model to be trained", hint="give another folder")
    for pattern in (*_OF_A_MODEL, *_OF_A_TRAINING, *_ANSWERS, *ADAPTER_FILES, SPACE_CONFIG_NAME):
        for file in output.glob(pattern):
            shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()


def mend_generation_config(loaded: LoadedModel) -> str | None:
    """Put the ids that end a turn into a model's generation config, and make that config valid for saving.

    Returns:
        What was repaired, in words, or None.

    Raises:
        UsageProblem: it cannot be saved.
    """
    config = loaded.model.generation_config
    stops = sorted(loaded.eos_token_ids)
    config.eos_token_id = stops[0] if len(stops) == 1 else stops or None
    return repair(config)


def fitting(prompts: Sequence[list[int]], answer_tokens: int, limit: int | None) -> tuple[list[list[int]], int]:
    """Return the prompts that leave room for an answer in the context, and how many do not."""
    found = [ids for ids in prompts if limit is None or len(ids) + answer_tokens <= limit]
    return found, len(prompts) - len(found)
