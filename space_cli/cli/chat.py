"""`space chat`: talk with a model in the terminal, or have one prompt answered."""

from __future__ import annotations

import gc
import sys
from contextlib import contextmanager, nullcontext
from functools import partial
from json import loads
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import Field

from space_cli.cli import options
from space_cli.cli.groups import grouped
from space_cli.cli.texts import with_corpora, with_past_answers
from space_cli.errors import Interrupted, UsageProblem, opening
from space_cli.text import prose, well_formed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from space_cli.chat.session import Session
    from space_cli.chat.templates import Turn
    from space_cli.models.loading import LoadedModel

EPILOG = (
    "Example: space chat    Example: space chat --prompt 'def add(a, b):' --raw    Example: cat notes.txt | space chat"
)

_Prompt = Annotated[
    str | None,
    typer.Option("--prompt", "-p", help="Answer this and leave; what is piped in follows it. - is standard input."),
]
_Raw = Annotated[bool, typer.Option("--raw", help="No chat template: the model continues the prompt.")]
_System = Annotated[str | None, typer.Option("--system", help="System prompt.")]
_SystemFile = Annotated[Path | None, options.path_option("--system-file", "The same, from a file.")]
_Continue = Annotated[bool, typer.Option("--continue", "-c", help="Go on with the newest conversation.")]
_Load = Annotated[Path | None, options.path_option("--load", "Go on with a saved conversation.")]
_Schema = Annotated[
    Path | None, options.path_option("--schema", "Answers are JSON that matches the schema in this file.")
]
_JsonMode = Annotated[bool, typer.Option("--json-mode", help="Answers are JSON objects.")]
_Stats = Annotated[bool, typer.Option("--stats", help="Say on standard error what one answer cost.")]


class AnswerOptions(options.SamplingOptions):
    """How a chat answers, and how it looks: what `/set` changes."""

    max_new_tokens: options.MaxNewTokens = 512
    candidates: Annotated[options.Candidates, Field(ge=1)] = None
    mode: Literal["space", "ar"] = Field("space", description="space, or one token at a time.")
    context: Literal["stop", "shift"] = Field("stop", description="When it is full: stop, or drop the oldest turns.")
    live: Literal["text", "steps"] = Field("text", description="Show the answer, or every step with what was guessed.")


class ChatModelOptions(options.LoadOptions):
    """How the models of a chat are loaded, what runs them, and what they copy from."""

    engine: options.Engine = "auto"
    corpus: options.Corpus = None
    memory: options.Memory = True

    def prepared(self, name: str, *, revision: str | None, quiet: bool) -> LoadedModel:
        """Load a model with its engine and texts; the first answer measures step costs, so the prompt comes sooner."""
        from space_cli.cli.console import note
        from space_cli.cli.live import COMPILING, EAGER
        from space_cli.models.engines import prepare

        loaded = self.load(name, revision=revision)
        tell = partial(note, quiet=quiet)
        loaded = prepare(
            loaded,
            engine=self.engine,
            on_compile=lambda: tell(COMPILING),
            on_eager=lambda reason: tell(f"{EAGER}: {reason}"),
        )
        return with_corpora(with_past_answers(loaded, kept=True) if self.memory else loaded, self.corpus, quiet=quiet)


@grouped
def chat(
    *,
    model: options.Model = None,
    prompt: _Prompt = None,
    raw: _Raw = False,
    system: _System = None,
    system_file: _SystemFile = None,
    template: options.Template = None,
    schema: _Schema = None,
    json_mode: _JsonMode = False,
    go_on: _Continue = False,
    load: _Load = None,
    stats: _Stats = False,
    answers: AnswerOptions,
    models: ChatModelOptions,
    revision: options.Revision = None,
    json_file: options.Json = None,
    quiet: options.Quiet = False,
) -> int:
    """Talk with a model; with --prompt or piped input, answer once and leave."""
    from platformdirs import user_state_path

    from space_cli.cli.console import err, loading, note, quiet_libraries

    text = _one_prompt(prompt)
    if text is None and json_file is not None:
        raise UsageProblem("--json needs a prompt", hint="give --prompt TEXT, or pipe it in")
    options.exclusive(raw=raw, template=template)
    system = _system(system, system_file)
    answer_schema = _schema(schema, json_mode=json_mode)
    state = user_state_path("space")
    turns, partner = _saved(state / "newest.json" if go_on else load)
    if partner and model is not None and _differ(partner, model):
        note(f"the conversation was with {partner}; {model} goes on with it", quiet=quiet, style="dim")
    # a conversation goes on with the model it was had with
    chosen = options.named_model(model or partner, quiet=quiet)

    with loading(chosen, err(), quiet=quiet), _without_collecting():
        quiet_libraries()

        from space_cli.chat.session import ChatSettings, Session

        def loaded_by(name: str) -> LoadedModel:
            return models.prepared(name, revision=revision if name == chosen else None, quiet=quiet)

        settings = ChatSettings(**answers.model_dump())
        template = "{}" if raw else template
        session = Session(loaded_by(chosen), settings, template=template, turns=turns, schema=answer_schema)
        if system:
            session.chat.system = system
    if text is not None:
        return _answer_once(session, text, json=json_file, stats=stats, quiet=quiet)

    from space_cli.cli.repl import Repl

    Repl(session, loaded_by, state).run()
    return 0


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Do without garbage collection while the libraries are imported: it looks through millions of objects that stay.

    Starting and leaving each take a second less.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


def _one_prompt(prompt: str | None) -> str | None:
    """Return the one prompt to answer, or None to converse: what was given, what is piped in, or both."""
    piped = "" if sys.stdin is None or sys.stdin.isatty() else prose(sys.stdin.buffer.read(), "standard input")
    if prompt is None or prompt == "-":
        if not piped and (prompt == "-" or sys.stdin is None or not sys.stdin.isatty()):
            raise UsageProblem("standard input is empty", hint="give --prompt TEXT, or run it in a terminal")
        return piped or None
    prompt = well_formed(prompt, "--prompt")
    return f"{prompt}\n\n{piped}" if piped and prompt else prompt or piped


def _system(system: str | None, file: Path | None) -> str:
    options.exclusive(system=system, system_file=file)
    if file is None:
        return well_formed(system or "", "--system")
    with opening(f"--system-file {file}"):
        return prose(file.read_bytes(), str(file)).strip()


def _saved(file: Path | None) -> tuple[list[Turn], str | None]:
    """Return the turns of a saved conversation and the model it was had with; nothing without a file."""
    if file is None:
        return [], None

    from space_cli.chat.conversation import load_turns

    return load_turns(file)


def _differ(one: str, other: str) -> bool:
    from space_cli.models.registry import located

    return located(one) != located(other)


def _schema(file: Path | None, *, json_mode: bool) -> dict[str, Any] | None:
    """Return the schema that answers follow, or None."""
    options.exclusive(schema=file, json_mode=json_mode)
    if file is None:
        return {"type": "object"} if json_mode else None
    with opening(f"--schema {file}"):
        content = file.read_bytes()
    try:
        schema = loads(content)
    except (ValueError, RecursionError) as error:
        raise UsageProblem(f"--schema {file}: no JSON: {error}") from error
    if not isinstance(schema, dict):
        raise UsageProblem(f"--schema {file}: a schema is a JSON object")
    return schema


def _answer_once(session: Session, text: str, *, json: str | None, stats: bool, quiet: bool) -> int:
    """Answer one prompt on standard output, or as JSON."""
    from space_cli.chat.session import record_of
    from space_cli.chat.templates import Turn
    from space_cli.cli.answer import summary, view_of
    from space_cli.cli.console import err, is_screen, out, plain, print_wrapped, write_json
    from space_cli.core.stream import Generation

    session.chat.turns.append(Turn("user", text))
    asked, generation = session.request(), Generation()
    try:
        with nullcontext() if json == "-" else view_of(session, out(), asked.token_ids) as view:
            for step in session.steps(asked):
                generation.steps.append(step)
                if view is not None:
                    view.step(step)
    except KeyboardInterrupt as error:
        raise Interrupted("interrupted") from error
    finally:
        # tokens generated so far are kept, whatever ended the answer
        if generation.steps:
            write_json(record_of(session, asked, generation).to_json, json)
    session.conclude(asked, generation)
    if (stats or is_screen(out())) and not quiet:
        cost = summary(session, generation, speedup=session.speedup(), context="")
        print_wrapped(err(), plain(cost, style="dim"))
    return 0
