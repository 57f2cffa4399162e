"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_whole(file: Path, text: str) -> None:
    """Write `text` under a temporary name in the same folder, then put it in place of `file`.

    A link stays a link: what it points to is replaced. A device or pipe takes the text as it comes.

    Raises:
        OSError: it could not be written; a file that was there before is untouched.
    """
    if file.exists() and not file.is_file():
        # /dev/null, /dev/fd/63: put in place of these, a file would be the end of the device
        file.write_text(text, "utf-8")
        return
    file = file.resolve()
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        # mkstemp makes files private; these are results for others to read
        Path(name).chmod(0o644)
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
