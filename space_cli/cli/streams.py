"""Output streams that accept any text; imported by every command, so without Rich."""

from __future__ import annotations

import codecs
import io
import sys

_LOOK_ALIKES = dict(zip("▁▂▃▄▅▆▇█━─│·…↵→✓", "._:-=+*##-|-.>>v", strict=True))


def _escaped(character: str) -> str:
    return character.encode("ascii", "backslashreplace").decode()


def _replaced(error: UnicodeError) -> tuple[str, int]:
    """Stand in for characters that a stream cannot encode: by a look-alike, or by an escape that loses nothing."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    return "".join(_LOOK_ALIKES.get(each) or _escaped(each) for each in characters), error.end


def never_fail_for_a_character() -> None:
    """Make standard output and error take any text, whatever their encoding: a long run must not end at a character."""
    codecs.register_error("space", _replaced)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="space")
