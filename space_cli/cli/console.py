"""Output streams, and what may be written to them.

Standard output holds the answer or the data, standard error progress, notes and errors.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from space_cli.errors import writing
from space_cli.files import atomic_write
from space_cli.text import visible


def plain(text: str, style: str = "") -> Text:
    """Return untrusted text for Rich: visible, and never read as markup."""
    return Text(visible(text), style=style)


def print_wrapped(console: Console, text: Text) -> None:
    """Print a text of ours; a terminal wraps it between words."""
    console.print(text, soft_wrap=not is_screen(console))


def note(text: str, *, quiet: bool = False, style: str = "") -> None:
    """Print a line on standard error about what is going on."""
    if not quiet:
        err().print(plain(text, style=style), soft_wrap=True)


def loading(name: str, console: Console, *, quiet: bool = False) -> AbstractContextManager[object]:
    """Show meanwhile that a model is being loaded, if the console is a terminal."""
    return console.status(plain(f"loading {name}")) if is_screen(console) and not quiet else nullcontext()


def table(first: str, *others: str) -> Table:
    """Return a table without lines: the first column to the left, the others to the right if they have a heading."""
    made = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    made.add_column(first)
    for heading in others:
        made.add_column(heading, justify="right" if heading else "left")
    return made


@contextmanager
def unechoed() -> Iterator[None]:
    """Do not echo keys typed meanwhile; the next prompt reads them."""
    if not sys.stdin.isatty() or find_spec("termios") is None:
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def write_json(to_json: Callable[[], str], json: str | None) -> None:
    """Write a record as --json asks: - is standard output; characters its encoding lacks are escaped.

    Raises:
        RunFailed: the file cannot be written.
    """
    if json is None:
        return
    if json != "-":
        with writing(Path(json)):
            atomic_write(Path(json), to_json())
        return
    text, encoding = to_json(), sys.stdout.encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = re.sub(r"[^\x00-\x7f]", _json_escape, text)
    sys.stdout.write(text)
    sys.stdout.flush()


def _json_escape(found: re.Match[str]) -> str:
    units = found[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[place : place + 2].hex()}" for place in range(0, len(units), 2))


def is_screen(console: Console) -> bool:
    """Return whether the console is an interactive terminal, where the cursor can be moved.

    FORCE_COLOR and TTY_COMPATIBLE ask for colour where there is no terminal, as in the log of a CI run.
    """
    return console.is_terminal and not console.is_dumb_terminal and console.file.isatty()


def out() -> Console:
    """Return the console of standard output."""
    return Console(highlight=False, markup=False, emoji=False)


def err() -> Console:
    """Return the console of standard error."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def quiet_libraries() -> None:
    """Silence the model libraries' notes, warnings and bars; a download keeps its bar in a terminal.

    With --debug what they note and warn of is shown.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    debug = bool(os.environ.get("SPACE_DEBUG"))
    quiet = not debug and "TRANSFORMERS_VERBOSITY" not in os.environ
    if quiet:
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    if not debug:
        if logging.lastResort is not None:  # where loggers without a handler of their own write
            logging.lastResort.setLevel(logging.ERROR)
        # bitsandbytes warns of missing kernels even if they are not used
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    if quiet:
        transformers_logging.set_verbosity_error()  # where it was imported before
    transformers_logging.disable_progress_bar()
    if sys.stderr.isatty() and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ:
        enable_progress_bars()
