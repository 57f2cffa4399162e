"""Remembers on disk why a model could not be compiled, so that not every start tries again.

A refusal's file is named for the model, the versions and the sources; in it is what else a compilation depends on.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from space_cli.compile.toolchain import compiler
from space_cli.files import atomic_write
from space_cli.models.memory import available_memory

_SECONDS = 7 * 24 * 3600
# room that makes a second try worth it: twice as much as there was, and some more
_MORE_ROOM = 2**28


def note_refusal(file: Path, reason: str) -> None:
    """Write down why a model could not be compiled, if possible."""
    refusal = {"reason": reason, "compiler": _compiler(), "room": _room(file.parent), "time": time.time()}
    try:
        atomic_write(file, json.dumps(refusal))
    except OSError:
        return


def refusal_of(file: Path) -> str | None:
    """Return the reason on record why a model could not be compiled, if nothing relevant has improved since."""
    try:
        refusal = json.loads(file.read_bytes())
        then = [int(free) for free in refusal["room"]]
        is_recent = 0 <= time.time() - float(refusal["time"]) < _SECONDS
        same, reason = refusal["compiler"] == _compiler(), str(refusal["reason"])
    except (OSError, ValueError, TypeError, KeyError):  # not there, or not ours
        return None
    has_more = any(now >= 2 * before + _MORE_ROOM for now, before in zip(_room(file.parent), then, strict=False))
    return reason if is_recent and same and not has_more else None


def _compiler() -> list[str | int]:
    """Return the compiler and its modification time."""
    name = compiler()
    found = shutil.which(name)
    if found is None:
        return [name]
    real = Path(found).resolve()
    return [name, str(real), real.stat().st_mtime_ns]


def _room(folder: Path) -> list[int]:
    """Return bytes free in memory and on the disk of a folder."""
    return [available_memory(), shutil.disk_usage(folder).free]
