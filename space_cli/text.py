"""Text from outside: bytes of files and pipes, words of a command line.

What is no text is refused here, with its place, before a tokenizer or a file meets it. Text made by a model or read
from a file is untrusted: `visible` turns what a terminal would obey into what a person can see.
"""

from __future__ import annotations

import codecs
from pathlib import Path

from space_cli.errors import UsageProblem

# the longer mark first: that of UTF-32 begins as that of UTF-16 does
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_HINT = "save it as UTF-8"
_BIDI = [*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C]
_VISIBLE = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: "\N{SYMBOL FOR DELETE}",
    **{code: f"\\x{code:02x}" for code in range(0x80, 0xA0)},
    **{code: f"\\u{code:04x}" for code in (*_BIDI, *range(0xD800, 0xE000), 0x2028, 0x2029)},
}


def marked_encoding(content: bytes) -> tuple[str, int]:
    """Return the encoding that a byte order mark tells and the length of the mark; UTF-8 and 0 without one."""
    return next(((name, len(mark)) for mark, name in _MARKS if content.startswith(mark)), ("utf-8", 0))


def decoded(content: bytes, where: str) -> str:
    """Return the text of bytes, in the encoding of their byte order mark or else in UTF-8, without the mark.

    Args:
        content: of a file or a pipe.
        where: as messages begin; a line number is added.

    Raises:
        UsageProblem: they are no such text.
    """
    encoding, start = marked_encoding(content)
    try:
        return content[start:].decode(encoding)
    except UnicodeDecodeError as error:
        line = content[start : start + error.start].decode(encoding, "replace").count("\n") + 1
        raise UsageProblem(f"{where}:{line}: not {encoding.upper()} text", hint=_HINT) from error


def prose(content: bytes, where: str) -> str:
    """Return the text of bytes that a person wrote: `decoded`, and without a NUL character.

    Raises:
        UsageProblem: they are no such text.
    """
    text = decoded(content, where)
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UsageProblem(f"{where}:{line}: holds a NUL character: UTF-16 without its mark, or no text", hint=_HINT)
    return text


def read_text(file: Path) -> str:
    """Return the text of a file.

    Raises:
        OSError: it cannot be read.
        UsageProblem: it is no text.
    """
    return decoded(file.read_bytes(), str(file))


def well_formed(text: str, where: str) -> str:
    """Return a text that was typed, if all of it is characters: bytes that are no UTF-8 come in as half surrogates.

    Raises:
        UsageProblem: it is not.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        what = f"the byte {code - 0xDC00:#04x}" if 0xDC80 <= code <= 0xDCFF else "half of a surrogate pair"
        raise UsageProblem(f"{where}: not UTF-8 text: character {error.start + 1} is {what}") from error
    return text


def visible(text: str) -> str:
    """Return `text` with control, bidi and surrogate characters replaced by visible forms; newline and tab stay."""
    return text.translate(_VISIBLE)
