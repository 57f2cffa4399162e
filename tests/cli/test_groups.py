from typing import Annotated

import pytest
import typer
from pydantic import Field

from space_cli.cli.groups import Group, grouped
from space_cli.errors import UsageProblem


class Settings(Group):
    batch_size: int = Field(4, ge=1, description="Examples of a batch.")
    share: float = Field(0.5, gt=0, le=1, description="A share.")
    names: Annotated[list[str] | None, typer.Option("--name", "-n", help="Names.")] = None


@pytest.fixture
def command():
    """A command of one group and one option; gives back what it was called with."""
    app = typer.Typer(rich_markup_mode=None)

    @app.command()
    @grouped
    def run(*, settings: Settings, quiet: Annotated[bool, typer.Option("--quiet")] = False) -> tuple[Settings, bool]:
        return settings, quiet

    return lambda *arguments: app(list(arguments), standalone_mode=False)


def test_fields_are_options_with_their_defaults(command):
    assert command() == (Settings(), False)
    given = command("--batch-size", "8", "-n", "a", "-n", "b", "--quiet")
    assert given == (Settings(batch_size=8, names=["a", "b"]), True)


def test_limits_are_shown_and_kept(command, capsys):
    command("--help")

    shown = capsys.readouterr().out
    assert "Examples of a batch.  [default: 4; x>=1]" in shown
    with pytest.raises(typer.TyperException, match="greater than or equal to 1"):
        command("--batch-size", "0")
    with pytest.raises(UsageProblem, match=r"--share 0\.0: Input should be greater than 0"):
        command("--share", "0")
    with pytest.raises(typer.TyperException, match="less than or equal to 1"):
        command("--share", "nan")
