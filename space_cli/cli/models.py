"""`space models`: which names there are, where they are, and which were trained for SPACE."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from space_cli.cli import options

if TYPE_CHECKING:
    from space_cli.models.inventory import ModelStatus

models = typer.Typer(name="models", help="Names for models, and what is on this machine.", no_args_is_help=True)

_HEADINGS = ("name", "here", "SPACE", "where")


@models.command(
    "list", epilog="Example: space models list    Example: space models list --models-file mine.toml --json -"
)
def list_models(models_file: options.ModelsFile = None, json: options.Json = None) -> None:
    """List the names of models.toml: whether the model is here, what it was trained for, where it is.

    Looks at this machine alone: nothing is downloaded or loaded.
    """
    from space_cli.models.inventory import inventory

    statuses = inventory(models_file)
    if json is None:
        _show(statuses)
        return
    from json import dumps

    from space_cli.files import write_whole

    text = dumps({"models": [status.model_dump() for status in statuses]}, indent=2) + "\n"
    if json == "-":
        typer.echo(text, nl=False)
    else:
        write_whole(Path(json), text)


def _show(statuses: list[ModelStatus]) -> None:
    """Print a table in a terminal, and elsewhere rows with tabs between, which cut and awk can read."""
    from space_cli.cli.console import out, plain

    console = out()
    rows = [_row(status) for status in statuses]
    if not console.is_terminal:
        for row in (_HEADINGS, *rows):
            typer.echo("\t".join(row))
        return

    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for heading in _HEADINGS:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*map(plain, row))
    console.print(table)


def _row(status: ModelStatus) -> tuple[str, ...]:
    """Return the cells of a model, each a single line whatever the files hold."""
    from space_cli.cli.console import visible

    places = {"bundled": "in this package", "folder": status.source, "hub": f"Hub: {status.source}"}
    where = places[status.kind] + (f" @ {status.revision}" if status.revision else "")
    here = "yes" if status.present else "no"
    if status.problem:
        here += f" ({status.problem})"
    return tuple(visible(" ".join(cell.split())) for cell in (status.name, here, _trained(status), where))


def _trained(status: ModelStatus) -> str:
    if status.trained:
        return f"k = {status.candidates}, m = {status.masks_per_group}"
    return "unknown" if status.trained is None else "no"
