"""The command `space`: wiring, errors in one line, exit codes. Nothing here imports torch."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from space_cli.errors import SpaceError, first_line

_EXIT_CODES = "Exit codes: 0 done; 1 a check failed; 2 wrong use or bad input; 3 the run failed; 130 interrupted."
_PAGES = (
    "Documentation, in docs/ of the project: chat.md, serve.md, bench.md, lossless.md, train.md, models.md;"
    " how-it-works.md, drafts.md, engines.md."
)

_INTERRUPTED = 130

# names that mlx-lm's users type; understood, and kept out of the help
_ALIASES = {"temp": "temperature", "max-tokens": "max-new-tokens"}

app = typer.Typer(
    name="space",
    help="Several tokens per model call from local language models, without changing a single token.",
    epilog=f"{_EXIT_CODES}\n\n{_PAGES}",
    no_args_is_help=True,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: _ALIASES.get(name, name),
    },
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(value: bool) -> None:
    if value:
        from space_cli import __version__

        typer.echo(f"space {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and leave.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and the libraries' warnings (also SPACE_DEBUG=1).")
    ] = False,
) -> None:
    """Several tokens per model call from local language models, without changing a single token."""
    del version
    if debug:
        os.environ["SPACE_DEBUG"] = "1"
    if not os.environ.get("SPACE_DEBUG"):
        # library warnings are for developers; -W and PYTHONWARNINGS take precedence
        warnings.simplefilter("ignore", append=True)


def _register() -> None:
    from space_cli.cli.bench import bench
    from space_cli.cli.chat import EPILOG as CHAT_EPILOG
    from space_cli.cli.chat import chat
    from space_cli.cli.models import models
    from space_cli.cli.serve import EPILOG as SERVE_EPILOG
    from space_cli.cli.serve import serve
    from space_cli.cli.train import EPILOG as TRAIN_EPILOG
    from space_cli.cli.train import train
    from space_cli.cli.verify import EPILOG as VERIFY_EPILOG
    from space_cli.cli.verify import verify_lossless

    app.command(epilog=CHAT_EPILOG)(chat)
    app.command(epilog=SERVE_EPILOG)(serve)
    app.add_typer(bench)
    app.command(epilog=VERIFY_EPILOG)(verify_lossless)
    app.command(epilog=TRAIN_EPILOG)(train)
    app.add_typer(models)


_register()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and leave with its exit code."""
    code = run(sys.argv[1:] if arguments is None else list(arguments))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # another Ctrl-C ends it at once, without a traceback from what libraries do when Python leaves
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run the command; print an error as one line and return the exit code."""
    from space_cli.cli.streams import never_fail_for_a_character

    never_fail_for_a_character()
    try:
        returned = app(args=list(arguments), prog_name="space", standalone_mode=False)
        sys.stdout.flush()
    except BaseException as error:  # noqa: BLE001  # the single place where errors become a line and an exit code
        # typer leaves with 1, our failed check, where a command meets a closed pipe
        cause = error.__context__ if isinstance(error, SystemExit) else error
        if isinstance(cause, BrokenPipeError):
            # the reader has closed the pipe (as `| head` does); flushing at exit must not fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        line, code = _line_and_code(error)
        if os.environ.get("SPACE_DEBUG") and not isinstance(error, (typer.TyperException, SystemExit)):
            traceback.print_exception(error)
        if line:
            print(line, file=sys.stderr)  # noqa: T201  # the one line of an error
        return code
    if returned == _INTERRUPTED:  # typer makes an exit code of Ctrl-C before we see it
        print("space: interrupted", file=sys.stderr)  # noqa: T201  # the one line of an error
    return returned if isinstance(returned, int) else 0


def _line_and_code(error: BaseException) -> tuple[str, int]:
    """Return the line and the exit code of an error, the most specific kinds first."""
    from space_cli.text import visible

    if isinstance(error, SystemExit):
        return "", error.code if isinstance(error.code, int) else 3
    # notes that commands add to errors: what was kept, and how to resume
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return visible(f"space: interrupted{notes}"), _INTERRUPTED
    if isinstance(error, SpaceError):
        return visible(f"space: {' '.join(str(error).split())}{notes}"), error.exit_code
    if isinstance(error, typer.TyperException):
        # pydantic, which checks values for typer, says first what kind of error it found
        message = " ".join(error.format_message().split()).replace(": Value error, ", ": ")
        # typer shows help in place of a message where a command is missing
        return (visible(f"space: {message}") if not _is_help(message) else error.format_message()), 2
    if _is_full_disk(error):
        return visible(f"space: the disk is full: {getattr(error, 'filename', None) or 'a file was cut off'}{notes}"), 3
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"space: out of memory; use a smaller model, --quantization, or a lower --max-new-tokens{notes}", 3
    what = f"{type(error).__name__}: {first_line(error)}"
    line = f"space: {what}{notes} (rerun with `space --debug ...` for the traceback)"
    return visible(line), 3


def _is_full_disk(error: BaseException) -> bool:
    """Return whether the disk is full; safetensors and torch say so only in their message."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError):
        return error.errno in codes
    message = str(error)
    return any(f"(os error {code})" in message for code in codes) or "PytorchStreamWriter failed writing" in message


def _is_help(message: str) -> bool:
    return message.startswith("Usage:")
