"""`space models`: lists, adds and checks models."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from space_cli.cli import options
from space_cli.cli.groups import grouped
from space_cli.errors import UsageProblem
from space_cli.files import expanded

if TYPE_CHECKING:
    from space_cli.models.inventory import ModelStatus

models = typer.Typer(name="models", help="Names for models, and what is on this machine.", no_args_is_help=True)

_HEADINGS = ("name", "here", "size", "SPACE", "where")
_Name = Annotated[str, typer.Argument(help="What `--model` will understand.", show_default=False)]
_Source = Annotated[str, typer.Argument(help="A folder, a GGUF file, or a Hub id.", show_default=False)]
_MaskTokenIds = Annotated[
    str | None,
    typer.Option("--mask-token-ids", help="Without space_config.json: one id, or one per mask, as 5,6,7."),
]
_Candidates = Annotated[int | None, typer.Option("--candidates", min=1, help="The same: k, and masks of a group.")]
_Description = Annotated[str, typer.Option("--description", help="A line about it.")]


@models.command(
    "list", epilog="Example: space models list    Example: space models list --models-file mine.toml --json -"
)
def list_models(models_file: options.ModelsFile = None, json: options.Json = None) -> None:
    """List the names of models.toml: whether the model is here, what it was trained for, where it is.

    Looks at this machine alone: nothing is downloaded or loaded.
    """
    from space_cli.cli.console import write_json
    from space_cli.models.inventory import inventory

    statuses = inventory(models_file)
    if json is None:
        _show(statuses)
        return
    found = {"models": [status.model_dump() for status in statuses]}
    write_json(lambda: dumps(found, indent=2) + "\n", json)


@models.command("add", epilog="Example: space models add mine ./checkpoint    Example: space models add q org/model")
def add(
    name: _Name,
    source: _Source,
    mask_token_ids: _MaskTokenIds = None,
    candidates: _Candidates = None,
    template: options.Template = None,
    description: _Description = "",
    revision: options.Revision = None,
    models_file: options.ModelsFile = None,
) -> None:
    """Give a model a name of your own, in your models.toml or in --models-file."""
    from space_cli.models.gguf_names import is_gguf
    from space_cli.models.registry import ModelEntry, add_model, located, own_models_file

    if (mask_token_ids is None) != (candidates is None):
        raise UsageProblem("--mask-token-ids and --candidates belong together")
    try:
        ids = [int(part) for part in mask_token_ids.split(",")] if mask_token_ids else None
    except ValueError as error:
        raise UsageProblem(f"--mask-token-ids {mask_token_ids}: not numbers", hint="give them as 5,6,7") from error
    source = expanded(source)
    place = located(source)
    if is_gguf(source):
        _check_gguf(place)
    elif not Path(source).is_dir() and (source.startswith((".", "/", "~")) or source.count("/") != 1):
        raise UsageProblem(f"{source}: neither a folder, nor a GGUF file, nor a Hub id (org/model)")
    entry = ModelEntry(
        source=place,
        description=description,
        revision=revision,
        mask_token_ids=ids,
        candidates=candidates,
        prompt_template=template,
    )
    file = models_file or own_models_file()
    add_model(name, entry, file)
    typer.echo(f"{name} stands in {file}; try `space models check {name}`")


def _check_gguf(source: str) -> None:
    """Refuse a file that is not there or not readable; one of the Hub is not asked for."""
    from space_cli.models.gguf_file import read_gguf
    from space_cli.models.gguf_names import gguf_path, is_on_hub

    if not is_on_hub(source):
        read_gguf(gguf_path(source))


@models.command("check", epilog="Example: space models check org/model    Example: space models check nano --json -")
@grouped
def check(
    *,
    model: Annotated[str, typer.Argument(help=f"{options.MODEL_NAMES}.", show_default=False)],
    load: options.LoadOptions,
    revision: options.Revision = None,
    json: options.Json = None,
) -> None:
    """Load a model, try whether decoding in blocks works on it, and say what it is.

    Downloads a Hub model that is not here.
    """
    from space_cli.cli.console import out, plain, quiet_libraries, write_json

    quiet_libraries()

    from space_cli.core.engine import default_numerics

    loaded = load.load(model, revision=revision)
    facts = {
        "name": loaded.name,
        "source": loaded.source,
        "architecture": type(loaded.model).__name__,
        "parameters": loaded.num_parameters,
        "dtype": loaded.dtype,
        "device": loaded.device,
        "context_length": loaded.context_length,
        "chat_template": bool(loaded.tokenizer.chat_template),
        "numerics": default_numerics(loaded.model),
        "method": loaded.space.method if loaded.space else None,
        "mask_token_ids": list(loaded.mask_token_ids),
        "candidates": loaded.candidates,
        "masks_per_group": loaded.masks_per_group,
    }
    write_json(lambda: dumps(facts, indent=2) + "\n", json)
    if json != "-":
        for name, value in facts.items():
            out().print(plain(f"{name:<16} {'-' if value in (None, []) else value}"), soft_wrap=True)
        verdict = "decodes in blocks" if loaded.mask_token_ids else "could be trained for SPACE: it decodes in blocks"
        out().print(plain(f"{loaded.name} {verdict}"), soft_wrap=True)


def _show(statuses: list[ModelStatus]) -> None:
    """Print a table in a terminal, and elsewhere rows with tabs between, which cut and awk can read."""
    from space_cli.cli.console import is_screen, out, plain, table

    console = out()
    rows = [_row(status) for status in statuses]
    if not is_screen(console):
        for row in (_HEADINGS, *rows):
            typer.echo("\t".join(row))
        return

    shown = table(*_HEADINGS)
    for column in shown.columns:
        column.justify, column.overflow = "left", "fold"
    for row in rows:
        shown.add_row(*map(plain, row))
    console.print(shown)


def _row(status: ModelStatus) -> tuple[str, ...]:
    """Return the cells of a model, each a single line whatever the files hold."""
    from space_cli.text import visible

    places = {"bundled": "in this package", "hub": f"Hub: {status.source}"}
    where = places.get(status.kind, status.source) + (f" @ {status.revision}" if status.revision else "")
    here = "yes" if status.present else "no"
    if status.problem:
        here += f" ({status.problem})"
    cells = (status.name, here, _size(status.size_bytes), _trained(status), where)
    return tuple(visible(" ".join(cell.split())) for cell in cells)


def _size(size_bytes: int | None) -> str:
    if size_bytes is None:
        return ""
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"


def _trained(status: ModelStatus) -> str:
    if status.trained:
        return f"k = {status.candidates}, m = {status.masks_per_group}"
    return "unknown" if status.trained is None else "no"
