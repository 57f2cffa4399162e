"""Lists which named models are on this machine and which were trained for SPACE; offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from space_cli.errors import UsageProblem
from space_cli.models.checkpoint import ADAPTER_FILES, SPACE_CONFIG_NAME, SpaceConfig
from space_cli.models.gguf_file import shards_of
from space_cli.models.gguf_names import PACKAGE, cached_gguf, is_gguf, is_on_hub, package_file
from space_cli.models.registry import ModelEntry, read_models

_WEIGHTS = "model.safetensors"
_SHARDS = "model.safetensors.index.json"


class ModelStatus(BaseModel):
    """The status of one entry of models.toml.

    Attributes:
        kind: what `source` is.
        present: whether configuration and all weights are on this machine.
        size_bytes: of the weights that are here; an adapter's are its own.
        trained: whether it was trained for SPACE; None where only a download would tell.
        problem: what is wrong with what is here.
    """

    name: str
    description: str
    kind: Literal["bundled", "folder", "file", "package", "hub"]
    source: str
    revision: str | None
    present: bool
    size_bytes: int | None = None
    trained: bool | None
    candidates: int | None = None
    masks_per_group: int | None = None
    problem: str | None = None


def inventory(models_file: Path | None = None) -> list[ModelStatus]:
    """Return the status of every name, in the order of the files.

    Raises:
        UsageProblem: a models.toml is missing or malformed.
    """
    return [_status(name, entry) for name, entry in read_models(models_file).items()]


def _status(name: str, entry: ModelEntry) -> ModelStatus:
    path = Path(entry.source)
    is_local = path.is_dir() or path.is_absolute()
    status = ModelStatus(
        name=name,
        description=entry.description,
        kind=_kind(entry, is_local=is_local),
        source=entry.source,
        revision=entry.revision,
        present=False,
        trained=True if entry.mask_token_ids and entry.candidates else None,
        candidates=entry.candidates,
        masks_per_group=entry.masks_per_group or entry.candidates,
    )
    try:
        if is_gguf(entry.source):
            return status.model_copy(update=_gguf_found(entry))
        folder = (path if path.is_dir() else None) if is_local else _snapshot(entry)
        return status.model_copy(update=_found(folder, entry)) if folder else status
    except (UsageProblem, OSError, ValueError) as error:
        return status.model_copy(update={"problem": str(error)})


def _kind(entry: ModelEntry, *, is_local: bool) -> Literal["bundled", "folder", "file", "package", "hub"]:
    if entry.source.startswith(PACKAGE):
        return "package"
    if is_gguf(entry.source) and not is_on_hub(entry.source):
        return "file"
    return "bundled" if entry.is_bundled else "folder" if is_local else "hub"


def _gguf_found(entry: ModelEntry) -> dict[str, object]:
    """Return the status of a GGUF file, whose masks come from models.toml or an adapter."""
    if entry.source.startswith(PACKAGE):
        file = package_file(entry.source)
    elif is_on_hub(entry.source):
        file = cached_gguf(entry.source, entry.revision)
    else:
        file = Path(entry.source)
    trained: dict[str, object] = {} if entry.mask_token_ids else {"trained": False}
    if entry.checkpoint != entry.source:
        config = SpaceConfig.load(Path(entry.checkpoint))
        trained = {"trained": True, "candidates": config.candidates, "masks_per_group": config.masks_per_group}
    if file is None or not file.is_file():
        return trained
    return trained | {"present": True, "size_bytes": sum(shard.stat().st_size for shard in shards_of(file))}


def _found(folder: Path, entry: ModelEntry) -> dict[str, object]:
    """Return the status of a model's files; space_config.json overrides models.toml, as in loading."""
    config = SpaceConfig.load(folder) if (folder / SPACE_CONFIG_NAME).is_file() else None
    missing = _missing(folder, is_adapter=config is not None and config.method == "adapter")
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    found: dict[str, object] = {
        "present": not missing,
        "size_bytes": size or None,
        "problem": f"no {missing}" if missing else None,
    }
    if config is not None:
        return found | {
            "trained": True,
            "candidates": config.candidates,
            "masks_per_group": config.masks_per_group,
        }
    return found if entry.mask_token_ids or not _known_absent(entry) else found | {"trained": False}


def _known_absent(entry: ModelEntry) -> bool:
    """Return whether the cache knows that the model has no space_config.json on the Hub."""
    if Path(entry.source).is_dir():
        return True
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(entry.source, SPACE_CONFIG_NAME, revision=entry.revision)
    return found is not None and not isinstance(found, str)


def _missing(folder: Path, *, is_adapter: bool) -> str | None:
    """Return the first missing file."""
    names = ["config.json"]
    if is_adapter:
        return next((name for name in ADAPTER_FILES if not (folder / name).is_file()), None)
    if (folder / _SHARDS).is_file():
        shards = json.loads((folder / _SHARDS).read_text("utf-8")).get("weight_map", {})
        names += sorted(set(shards.values()))
    else:
        names.append(_WEIGHTS)
    return next((name for name in names if not (folder / name).is_file()), None)


def _snapshot(entry: ModelEntry) -> Path | None:
    """Return the folder of a Hub model in the local cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(entry.source, "config.json", revision=entry.revision)
    return Path(found).parent if isinstance(found, str) else None
