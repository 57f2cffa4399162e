"""The prompt loop of `space chat`: reads input, runs commands, shows answers."""

from __future__ import annotations

import base64
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.output import ColorDepth
from rich.table import Table
from rich.text import Text

from space_cli.chat.conversation import load_turns
from space_cli.chat.templates import Turn
from space_cli.cli.answer import counted, greeting, summary, view_of
from space_cli.cli.console import loading, out, plain, print_wrapped, unechoed
from space_cli.cli.live import tally_of
from space_cli.cli.repl_input import QUOTES, CommandCompleter, input_history, key_bindings, unquoted
from space_cli.core.stream import Generation
from space_cli.errors import SpaceError, UsageProblem, did_you_mean, first_line, opening, system_reason
from space_cli.models.registry import located
from space_cli.report.wording import named_histogram
from space_cli.text import visible, well_formed

if TYPE_CHECKING:
    from rich.console import Console

    from space_cli.chat.session import Session
    from space_cli.models.loading import LoadedModel


class Repl:
    """Reads prompts and commands until the user leaves.

    Args:
        session: the model in conversation.
        load: loads another model by name.
        state: folder for the input's history and the newest conversation, or None to keep neither.
    """

    def __init__(self, session: Session, load: Callable[[str], LoadedModel], state: Path | None) -> None:
        self._session = session
        self._load = load
        self._newest = state / "newest.json" if state else None
        self._own_files: set[Path] = set()
        self._commands: dict[str, tuple[Callable[[str], None], str]] = {
            "/help": (self._help, "this list"),
            "/system": (self._system, "TEXT  set the system prompt; without TEXT: show it"),
            "/reset": (self._reset, "forget the conversation"),
            "/undo": (self._undo, "forget the last request and its answer"),
            "/retry": (self._retry, "answer the last request again, sampled under the next seed"),
            "/race": (self._race, "answer it one token at a time and by SPACE, side by side"),
            "/stats": (self._stats, "tokens and model calls of this session"),
            "/mode": (partial(self._set_one, "mode"), "ar|space  one token at a time, or several"),
            "/live": (
                partial(self._set_one, "live"),
                "text|steps  show the answer, or every step with what was guessed",
            ),
            "/color": (partial(self._set_one, "color"), "on|off"),
            "/set": (self._set, "KEY VALUE  temperature, max_new_tokens, ...; without: show all"),
            "/model": (self._model, "NAME  go on with another model"),
            "/save": (self._save, "FILE  write the conversation"),
            "/load": (self._load_file, "FILE  go on with a saved conversation"),
            "/copy": (self._copy, "the last answer to the clipboard"),
            "/exit": (self._leave, "as Ctrl-D"),
        }
        self._input: PromptSession[str] = PromptSession(
            history=input_history(state),
            completer=CommandCompleter(self._commands),
            complete_while_typing=False,
            multiline=True,
            key_bindings=key_bindings(),
            bottom_toolbar=self._toolbar,
            prompt_continuation="... ",
            color_depth=ColorDepth.DEPTH_1_BIT if out().no_color else None,
        )

    def run(self) -> None:
        """Run until Ctrl-D, a second Ctrl-C or /exit."""
        self._greet()
        wants_out = False
        while True:
            try:
                text = unquoted(self._input.prompt(self._prompt))
                wants_out = False
                self._take(text)
            except SpaceError as error:
                self._say(str(error), style="red")
            except EOFError:
                return
            except KeyboardInterrupt:
                if wants_out:
                    return
                wants_out = True
                # the second Ctrl-C may come before the next prompt
                with suppress(KeyboardInterrupt):
                    self._say("Ctrl-C again or Ctrl-D leaves")
                    continue
                return

    def _greet(self) -> None:
        """Print the introduction and how to begin."""
        console = self._console()
        print_wrapped(console, greeting(self._session, console))
        self._say("Ask something; /help lists commands, Ctrl-D leaves. Alt-Enter begins a new line.")

    def _take(self, text: str) -> None:
        if not well_formed(text, "what was typed").strip():
            return
        if not text.startswith("/") or "\n" in text.split(" ")[0]:
            self._session.chat.turns.append(Turn("user", text))
            self._answer()
            return
        name, _, rest = text.strip().partition(" ")
        name = {"/clear": "/reset", "/?": "/help", "/quit": "/exit", "/bye": "/exit"}.get(name, name)
        if name not in self._commands:
            otherwise = "/help lists them; a text with a space in front is sent"
            raise UsageProblem(f"no command {name}", hint=did_you_mean(name, self._commands, otherwise=otherwise))
        self._commands[name][0](rest.strip())

    # Answers

    def _answer(self) -> None:
        """Answer the last turn and show it; take back a request that cannot be answered."""
        session, console = self._session, self._console()
        generation = Generation()
        try:
            turns = len(session.chat.turns)
            asked = session.request()
            if dropped := turns - len(session.chat.turns):
                self._say(f"the context is full: {dropped} oldest turns were dropped")
        except SpaceError:
            session.chat.undo()
            raise
        stopped, broke = False, ""
        try:
            with unechoed(), view_of(session, console, asked.token_ids) as view:
                for step in session.steps(asked):
                    generation.steps.append(step)
                    view.step(step)
        except KeyboardInterrupt:
            stopped = True
        except (MemoryError, RuntimeError) as error:  # out of memory, most likely; the conversation goes on
            broke = f"the answer broke off: {first_line(error)}"
        session.conclude(asked, generation)
        if generation.steps:
            self._after(console, generation, stopped=stopped or bool(broke))
        elif not broke:
            self._say("stopped before the first token; the request is taken back")
        if broke:
            self._say(broke, style="red")

    def _after(self, console: Console, generation: Generation, *, stopped: bool) -> None:
        """Print the cost of the answer, and save the conversation."""
        session, why = self._session, ""
        if stopped:
            why = "stopped; what was said stays"
        elif generation.finish_reason == "length":
            full = session.loaded.context_length is not None and session.tokens >= session.loaded.context_length
            why = (
                "the context is full: /reset, or `/set context shift`"
                if full
                else "cut at max_new_tokens; /set changes it"
            )
        speedup = None if stopped else session.speedup()
        line = summary(session, generation, speedup=speedup, context=self._context())
        print_wrapped(console, Text(line, style="dim"))
        if why:
            self._say(why)
        if self._newest is not None:
            try:
                session.chat.save(self._newest)
            except OSError as error:
                self._say(f"the conversation could not be kept: {system_reason(error)}")
                self._newest = None

    # Commands

    def _help(self, _: str) -> None:
        table = Table.grid(padding=(0, 2, 0, 0))
        for name, (_run, help_text) in self._commands.items():
            table.add_row(name, help_text)
        self._console().print(table)
        self._say(f"{QUOTES} opens and closes a text of several lines; Alt-Enter begins a new line", style="")

    def _system(self, text: str) -> None:
        if text:
            self._session.chat.system = "" if text == "none" else text
        self._say(self._session.chat.system or "no system text; /system TEXT sets one")

    def _reset(self, _: str) -> None:
        system = self._session.chat.system
        self._session.chat.turns = []
        self._session.chat.system = system
        self._session.last = None
        self._say("forgotten; the system text stays" if system else "forgotten")

    def _undo(self, _: str) -> None:
        asked = self._session.chat.undo()
        self._session.last = None
        self._say("nothing to undo" if asked is None else f"forgotten: {_short(asked)}")

    def _retry(self, _: str) -> None:
        asked = self._session.chat.undo()
        if asked is None:
            raise UsageProblem("nothing to answer again")
        if self._session.settings.temperature:
            self._session.settings.seed += 1
        else:
            self._say("greedy, so the answer stays the same; `/set temperature 0.8` makes others")
        self._session.chat.turns.append(Turn("user", asked))
        self._answer()

    def _race(self, _: str) -> None:
        from space_cli.cli.race import race

        if self._session.last is None:
            raise UsageProblem("nothing to race with", hint="ask something first")
        with unechoed():
            race(self._session, self._session.last[0], self._console())

    def _stats(self, _: str) -> None:
        done = self._session.done
        if not done:
            raise UsageProblem("no answer yet")
        tally = tally_of(done)
        prefilled = sum(step.prefilled for each in done for step in each.steps)
        answers = "1 answer" if len(done) == 1 else f"{len(done)} answers"
        self._say(f"{answers}: {counted(tally)}", style="")
        self._say(f"tokens per call: {named_histogram(tally.accepted)}", style="")
        self._say(f"{tally.rate:.0f} tokens/s, the reading of {prefilled} prompt tokens included", style="")

    def _set_one(self, name: str, value: str) -> None:
        name = name.replace("-", "_")
        if value or name not in dict(self._session.settings):
            self._session.change(name, value)
        now = dict(self._session.settings)[name]
        self._say(f"{name} {'auto' if now is None else now}")

    def _set(self, words: str) -> None:
        if words:
            name, _, value = words.partition(" ")
            self._set_one(name, value.strip())
            return
        for name, value in self._session.settings:
            self._say(f"{name:<20} {'auto' if value is None else value}", style="")

    def _model(self, name: str) -> None:
        if not name:
            raise UsageProblem("/model needs a name", hint="`space models list` shows some")
        with loading(name, self._console()):
            loaded = self._load(name)
        self._session.take(loaded, self._session.chat.turns)
        self._say(f"{name}; the conversation goes on")

    def _save(self, name: str) -> None:
        if not name:
            raise UsageProblem("/save needs a file")
        file = Path(name).expanduser()
        if file.exists() and file.resolve() not in self._own_files:
            raise UsageProblem(f"{name}: is there already", hint="give another name")
        with opening(name):
            self._session.chat.save(file)
        self._own_files.add(file.resolve())
        self._say(f"saved {name}")

    def _load_file(self, name: str) -> None:
        if not name:
            raise UsageProblem("/load needs a file")
        turns, partner = load_turns(Path(name).expanduser())
        self._session.chat.turns = turns
        self._session.last = None
        self._own_files.add(Path(name).expanduser().resolve())
        self._say(f"{len(turns)} turns; the last: {_short(turns[-1].content) if turns else ''}")
        if partner != located(self._session.loaded.name):
            self._say(f"they were had with {partner}; `/model {partner}` goes on with that")

    def _copy(self, _: str) -> None:
        answer = next((turn.content for turn in reversed(self._session.chat.turns) if turn.role == "assistant"), None)
        if answer is None:
            raise UsageProblem("no answer to copy")
        # OSC 52: the terminal's own clipboard, through ssh too; base64 lets nothing of the answer act
        sys.stdout.write(f"\x1b]52;c;{base64.b64encode(answer.encode('utf-8', 'replace')).decode()}\x07")
        sys.stdout.flush()
        self._say("handed to the terminal's clipboard")

    def _leave(self, _: str) -> None:
        raise EOFError

    # Looks

    def _console(self) -> Console:
        console = out()
        console.no_color = console.no_color or self._session.settings.color == "off"
        return console

    def _say(self, text: str, *, style: str = "dim") -> None:
        print_wrapped(self._console(), plain(text, style=style))

    def _prompt(self) -> FormattedText:
        return FormattedText([("" if self._console().no_color else "bold", "> ")])

    def _toolbar(self) -> FormattedText:
        session = self._session
        fixed = session.settings.candidates
        space = f"SPACE k={fixed}" if fixed else "SPACE"
        how = space if session.settings.mode == "space" else "one token at a time"
        heat = f"temperature {session.settings.temperature:g}" if session.settings.temperature else "greedy"
        where = f"{Path(session.loaded.name).name} {session.loaded.dtype} {session.loaded.device}"
        return FormattedText([("", visible(" · ".join((self._context(), how, heat, where))))])

    def _context(self) -> str:
        limit = self._session.loaded.context_length
        return f"context {self._session.tokens}/{limit}" if limit else f"context {self._session.tokens}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:57]}..."
