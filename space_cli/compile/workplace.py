"""The folder that compilations write to: each has a place of its own in it, and what nobody needs any more is removed.

A place is locked while its process lives, so that others know a killed one by its free lock.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from space_cli.errors import RunFailed, writing

MOST_BYTES = 2**28
"""Files in the folder that take more are removed, those first that were not used for longest."""
_UNUSED_SECONDS = 30 * 24 * 3600
# a place just made may not be locked yet; where the file system knows no locks, no compilation takes a day
_YOUNG_SECONDS, _OLD_SECONDS = 60, 24 * 3600
_PLACE, _UNLOCKED = "compiling-", "tmp"  # the second of versions that did not lock theirs
# a dot in front of what a killed process was writing
_FILES = re.compile(r"\.?(kernels|program|costs|speeds)-")


@contextmanager
def workplace(folder: Path, needed_bytes: int) -> Iterator[Path]:
    """Make a place to compile in, and remove it in the end; the folder is tidied before.

    Raises:
        RunFailed: there is no room for it, or the folder cannot be written to.
    """
    with writing(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        tidy(folder)
        free = shutil.disk_usage(folder).free
        place = TemporaryDirectory(prefix=_PLACE, dir=folder) if free >= needed_bytes else None
    if place is None:
        raise RunFailed(
            f"{folder}: {free / 2**20:.1f} MiB are free, compiling needs {needed_bytes / 2**20:.0f}",
            hint="make room, or let XDG_CACHE_HOME name another folder",
        )
    with place as name:
        handle = os.open(name, os.O_RDONLY)
        try:
            with suppress(OSError):  # of a file system without locks
                _lock(handle)
            yield Path(name)
        finally:
            os.close(handle)


def used(*files: Path) -> None:
    """Note that files of the folder are in use."""
    with suppress(OSError):
        for file in files:
            os.utime(file)


def tidy(folder: Path) -> None:
    """Remove places of dead processes, files that were not used for a month, and those beyond `MOST_BYTES`."""
    now, kept = time.time(), 0
    for entry, age, size in sorted(_entries(folder, now), key=lambda each: each[1]):
        if entry.is_dir():
            if entry.name.startswith((_PLACE, _UNLOCKED)) and _is_abandoned(entry, age):
                shutil.rmtree(entry, ignore_errors=True)
        elif _FILES.match(entry.name):
            kept += size
            if age > _UNUSED_SECONDS or kept > MOST_BYTES:
                with suppress(OSError):
                    entry.unlink()


def _entries(folder: Path, now: float) -> Iterator[tuple[Path, float, int]]:
    """Yield what is in a folder, with the seconds since it was used and its bytes."""
    for entry in folder.iterdir():
        with suppress(OSError):  # another process has removed it
            status = entry.lstat()
            yield entry, now - status.st_mtime, status.st_size


def _is_abandoned(place: Path, age: float) -> bool:
    """Return whether the process that made a place has ended."""
    if age < _YOUNG_SECONDS:
        return False
    if place.name.startswith(_UNLOCKED):
        return age > _OLD_SECONDS
    try:
        handle = os.open(place, os.O_RDONLY)
    except OSError:
        return False
    try:
        _lock(handle)
    except BlockingIOError:
        return False
    except OSError:
        return age > _OLD_SECONDS
    finally:
        os.close(handle)
    return True


def _lock(handle: int) -> None:
    import fcntl  # not on Windows, where nothing is compiled

    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
