"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def expanded(name: str) -> str:
    """Return a path with the home folder in place of `~`; a shell leaves the one in `--option=~/file` as it is."""
    try:
        return str(Path(name).expanduser()) if name.startswith("~") else name
    except RuntimeError:  # nobody of that name
        return name


def atomic_write(file: Path, content: str | bytes) -> None:
    """Write `content` under a temporary name in the same folder, then put it in place of `file`.

    A link stays a link: what it points to is replaced. A device or pipe takes it as it comes.

    Raises:
        OSError: it could not be written; a file that was there before is untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    if file.exists() and not file.is_file():
        # /dev/null, /dev/fd/63: put in place of these, a file would be the end of the device
        file.write_bytes(data)
        return
    file = file.resolve()
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        # mkstemp makes files private; these are results for others to read
        Path(name).chmod(0o644)
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
