"""The header of a GGUF file: metadata and the table of tensors, read and checked without reading a weight.

Source: ggml's `docs/gguf.md`.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from space_cli.errors import UsageProblem, opening

TENSOR_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
"""Types whose weights are read: name, weights in a block, bytes of a block."""

_VERSIONS = (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where a tensor lies.

    Attributes:
        shape: as torch has it, rows first.
        type: name in `TENSOR_TYPES`.
        offset: of its first byte in `file`.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    file: Path
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The header of a GGUF file, or of the first of several shards.

    Attributes:
        files: the shards in order, or the one file.
        tensors: of all shards.
    """

    files: tuple[Path, ...]
    metadata: dict[str, Any]
    tensors: tuple[Tensor, ...]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of it."""
        return str(self.metadata["general.architecture"])

    @property
    def is_quantized(self) -> bool:
        """Whether any tensor is stored in blocks."""
        return any(tensor.type not in ("F32", "F16", "BF16") for tensor in self.tensors)

    def own(self, key: str, default: Any = None) -> Any:
        """Return a metadata value whose key is prefixed by the architecture."""
        return self.metadata.get(f"{self.architecture}.{key}", default)


def read_gguf(file: Path) -> GgufFile:
    """Read the header of a file and of the shards beside it.

    Raises:
        UsageProblem: absent, damaged or cut off, of another byte order or version, or of tensor types that are not
            supported.
    """
    metadata, tensors = _read_one(file)
    if metadata.get("split.count", 0) > 1:
        files = shards_of(file)
        for number, shard in enumerate(files):
            more, found = ({}, []) if shard == file else _read_one(shard)
            tensors += found
            if shard == file and metadata.get("split.no") != number:
                raise UsageProblem(f"{file}: is not shard {number + 1}, as its name says")
            del more
    else:
        files = [file]
    if "general.architecture" not in metadata:
        raise _damaged(file, "its metadata name no architecture")
    if not tensors:
        raise UsageProblem(f"{file}: holds no weights", hint="it may be a vocabulary alone")
    return GgufFile(tuple(files), metadata, tuple(tensors))


def shards_of(file: Path) -> list[Path]:
    """Return all shards that a file named NAME-00001-of-00003.gguf belongs to, in order; another file alone.

    Raises:
        UsageProblem: shards are missing.
    """
    match = _SHARD.fullmatch(file.name)
    if match is None:
        return [file]
    count = int(match[3])
    files = [file.with_name(f"{match[1]}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = [each.name for each in files if not each.is_file()]
    if missing:
        raise UsageProblem(
            f"{file}: {len(missing)} of its {count} shards are missing", hint=f"put {missing[0]} beside it"
        )
    return files


def _read_one(file: Path) -> tuple[dict[str, Any], list[Tensor]]:
    with opening(file), file.open("rb") as stream:
        if file.stat().st_size < 24:
            raise _damaged(file, "it ends within its header")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Reader(file, content).read()


class _Reader:
    """Reads one file from front to back."""

    def __init__(self, file: Path, content: mmap.mmap) -> None:
        self._file, self._content, self._place = file, content, 0

    def read(self) -> tuple[dict[str, Any], list[Tensor]]:
        """Return metadata and tensors."""
        count, pairs = self._counts()
        try:
            metadata = {self._string(): self._value(self._number("I")) for _ in range(pairs)}
            table = [self._tensor() for _ in range(count)]
        except (struct.error, UnicodeDecodeError, OverflowError, MemoryError) as error:
            raise _damaged(self._file, "its header cannot be read") from error
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            raise _damaged(self._file, "its alignment makes no sense")
        start = -(-self._place // alignment) * alignment
        return metadata, [self._located(start, *entry) for entry in table]

    def _counts(self) -> tuple[int, int]:
        """Return the numbers of tensors and of metadata."""
        if self._content[:4] != b"GGUF":
            raise UsageProblem(f"{self._file}: is no GGUF file", hint="it does not begin with GGUF")
        self._place = 4
        version = self._number("I")
        if version in (version_ << 24 for version_ in (1, 2, 3)):
            raise UsageProblem(f"{self._file}: is big-endian", hint="convert it for little-endian machines")
        if version not in _VERSIONS:
            raise UsageProblem(f"{self._file}: is of GGUF version {version}", hint="versions 2 and 3 are supported")
        count, pairs = self._number("Q"), self._number("Q")
        # each takes more bytes than one
        if count + pairs > len(self._content):
            raise _damaged(self._file, "its header cannot be read")
        return count, pairs

    def _number(self, kind: str) -> Any:
        (value,) = struct.unpack_from(f"<{kind}", self._content, self._place)
        self._place += struct.calcsize(f"<{kind}")
        return value

    def _string(self) -> str:
        length = self._number("Q")
        end = self._place + length
        if end > len(self._content):
            raise struct.error("a string reaches over the end")
        text = self._content[self._place : end].decode("utf-8")
        self._place = end
        return text

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind != _ARRAY:
            raise struct.error(f"unknown type {kind}")
        element, count = self._number("I"), self._number("Q")
        if count > len(self._content):
            raise struct.error("an array reaches over the end")
        if element in _NUMBERS:
            values = struct.unpack_from(f"<{count}{_NUMBERS[element]}", self._content, self._place)
            self._place += struct.calcsize(f"<{count}{_NUMBERS[element]}")
            return list(values)
        return list(self._values(element, count))

    def _values(self, element: int, count: int) -> Iterator[Any]:
        for _ in range(count):
            yield self._value(element)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._string(), self._number("I")
        if dimensions > 8:
            raise struct.error("too many dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))
        return name, shape[::-1], self._number("I"), self._number("Q")

    def _located(self, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> Tensor:
        if kind not in TENSOR_TYPES:
            names = ", ".join(known for known, _, _ in TENSOR_TYPES.values())
            raise UsageProblem(
                f"{self._file}: tensor {name} is of type {_type_name(kind)}, which is not supported",
                hint=f"supported: {names}",
            )
        type_, weights, num_bytes = TENSOR_TYPES[kind]
        if not shape or shape[-1] % weights:
            raise _damaged(self._file, f"tensor {name} has a shape that its type cannot have")
        size = prod(shape) // weights * num_bytes
        if start + offset + size > len(self._content):
            raise _damaged(self._file, f"it is cut off before the end of tensor {name}")
        return Tensor(name, shape, type_, self._file, start + offset, size)


def _type_name(kind: int) -> str:
    from gguf import GGMLQuantizationType  # not needed to read a header

    try:
        return GGMLQuantizationType(kind).name
    except ValueError:
        return f"number {kind}"


def _damaged(file: Path, reason: str) -> UsageProblem:
    return UsageProblem(f"{file}: is damaged: {reason}", hint="copy or download it again")
