"""models.toml: names for models, and the SPACE fields of checkpoints without space_config.json."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import tomlkit
from platformdirs import user_config_path
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from tomlkit.exceptions import TOMLKitError

from space_cli.errors import UsageProblem, did_you_mean, first_invalid, opening
from space_cli.files import atomic_write, expanded
from space_cli.models.checkpoint import SPACE_CONFIG_NAME
from space_cli.models.gguf_names import PACKAGE, has_package_file, is_gguf, is_on_hub
from space_cli.text import read_text, well_formed

_PACKAGE = Path(__file__).parent.parent
_BUNDLED = "bundled:"
BUNDLED_MODEL, REAL_MODEL = "nano", "smollm2"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class ModelEntry(BaseModel):
    """One model: its source, and its SPACE fields if it has no space_config.json.

    Attributes:
        otherwise: where it is if `source` names a package that is not installed.
        completes: it is a base model: suites that have two forms give it texts to go on with.
        adapter: folder of an adapter that belongs on it, "bundled:NAME" inside this package; unused while it is empty.
    """

    model_config = ConfigDict(extra="forbid")

    source: str = Field(min_length=1)
    otherwise: str | None = None
    adapter: str | None = None
    description: str = ""
    revision: str | None = None
    mask_token_ids: list[int] | None = None
    candidates: int | None = Field(default=None, ge=1)
    masks_per_group: int | None = Field(default=None, ge=1)
    prompt_template: str | None = None
    completes: bool = False

    @field_validator("prompt_template")
    @classmethod
    def _has_one_gap(cls, template: str | None) -> str | None:
        if template is not None and template.count("{}") != 1:
            raise ValueError("must hold {} once, where the user's text goes")
        return template

    @property
    def checkpoint(self) -> str:
        """Where its space_config.json would be: the folder of its adapter if there is one, else the model itself."""
        has_adapter = self.adapter is not None and Path(self.adapter, SPACE_CONFIG_NAME).is_file()
        return str(self.adapter) if has_adapter else self.source

    @property
    def is_bundled(self) -> bool:
        """Whether the model came with this package."""
        return self.source.startswith(str(_PACKAGE))


class _ModelsFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    models: dict[str, ModelEntry]


def shipped_models_file() -> Path:
    """Return models.toml: inside the installed package, or at the top of a checkout."""
    inside = _PACKAGE / "models.toml"
    return inside if inside.is_file() else _PACKAGE.parent / "models.toml"


def own_models_file() -> Path:
    """Return the path of the user's own models file, existing or not."""
    return user_config_path("space") / "models.toml"


def read_models(models_file: Path | None = None) -> dict[str, ModelEntry]:
    """Return all entries; a given file overrides the user's own, which override the shipped ones.

    Raises:
        UsageProblem: a file is missing or malformed; names file, table and key.
    """
    entries = _read(shipped_models_file())
    for file in (own_models_file(), models_file):
        if file is not None and (file == models_file or file.is_file()):
            entries |= _read(file)
    return entries


def add_model(name: str, entry: ModelEntry, file: Path) -> None:
    """Add a name to a models file, which is made if there is none.

    Raises:
        UsageProblem: the file is malformed, has the name already, or cannot be written; a value is no text. The file
            is then as it was.
    """
    fields = entry.model_dump(exclude_none=True, exclude_defaults=True)
    for field, value in {"name": name, **fields}.items():
        well_formed(value if isinstance(value, str) else "", field)
    before = _read(file) if file.is_file() else {}
    if name in before:
        raise UsageProblem(f"{file} has the name {name!r} already", hint="choose another, or edit the file")
    with opening(file):
        content = read_text(file) if file.is_file() else ""
    try:
        document = tomlkit.parse(content)
        document.setdefault("models", tomlkit.table(is_super_table=True))[name] = fields
        text = tomlkit.dumps(document)
    except TOMLKitError as error:
        raise UsageProblem(f"{file}: cannot be added to: {error}", hint="edit it by hand") from error
    # what would be written is read as it will be, before it takes the place of the old file
    if _parsed(text, file) != before | {name: _located(entry, file)}:
        raise UsageProblem(f"{file}: {name!r} would not be read as it was given; nothing was written")
    with opening(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, text)


def resolve(name: str, models_file: Path | None = None) -> ModelEntry:
    """Return the entry of `name`: an alias first, then an existing folder, then a GGUF file, then a Hub id.

    Raises:
        UsageProblem: none of these; suggests aliases that look alike.
    """
    entries = read_models(models_file)
    if name in entries:
        return entries[name]
    if Path(expanded(name)).is_dir():
        return ModelEntry(source=expanded(name))
    if is_gguf(name):
        return ModelEntry(source=located(name))
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if _HUB_ID.fullmatch(name) and not looks_local:
        return ModelEntry(source=name)
    hint = did_you_mean(name, entries, most=2, otherwise=f"known names: {', '.join(entries)}")
    raise UsageProblem(f"no model named {name!r}, and no such folder", hint=hint)


def _read(file: Path) -> dict[str, ModelEntry]:
    with opening(file):
        text = read_text(file)
    return _parsed(text, file)


def _parsed(text: str, file: Path) -> dict[str, ModelEntry]:
    try:
        entries = _ModelsFile.model_validate(tomllib.loads(text)).models
    except tomllib.TOMLDecodeError as error:
        raise UsageProblem(f"{file}: not TOML: {error}") from error
    except ValidationError as error:
        raise UsageProblem(f"{file}: {first_invalid(error)}") from error
    return {name: _located(entry, file) for name, entry in entries.items()}


def located(name: str) -> str:
    """Return a source that does not depend on the working folder: paths become absolute."""
    if Path(expanded(name)).is_dir():
        return str(Path(expanded(name)).resolve())
    is_file = is_gguf(name) and not is_on_hub(name) and not name.startswith(PACKAGE)
    return str(Path(expanded(name)).absolute()) if is_file else name


def name_with_masks(source: str) -> str | None:
    """Return a name that puts an adapter on this model, if there is one."""
    entries = read_models().items()
    return next((name for name, entry in entries if entry.source == source != entry.checkpoint), None)


def default_model() -> str:
    """Return the default model: a real one if installed, else the bundled one."""
    is_installed = read_models()[REAL_MODEL].source.startswith(PACKAGE)
    return REAL_MODEL if is_installed else BUNDLED_MODEL


def _located(entry: ModelEntry, file: Path) -> ModelEntry:
    """Resolve bundled, relative and package sources; a missing package's file is taken from the Hub.

    A relative path counts from the file it stands in.
    """
    if entry.adapter is not None:
        bundled = entry.adapter.startswith(_BUNDLED)
        folder = _PACKAGE / entry.adapter.removeprefix(_BUNDLED) if bundled else file.parent / entry.adapter
        entry = entry.model_copy(update={"adapter": str(folder.expanduser())})
    if entry.source.startswith(PACKAGE) and entry.otherwise and not has_package_file(entry.source):
        return entry.model_copy(update={"source": entry.otherwise})
    if entry.source.startswith(_BUNDLED):
        return entry.model_copy(update={"source": str(_PACKAGE / entry.source.removeprefix(_BUNDLED) / "weights")})
    if entry.source.startswith((".", "~")):
        return entry.model_copy(update={"source": str((file.parent / Path(entry.source).expanduser()).resolve())})
    return entry
