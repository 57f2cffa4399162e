"""Memory of its own for weights, in large pages where the system has them.

A call reads all weights once. In pages of 4 KiB a part of that time is spent on finding the pages; in pages of 2 MiB,
which Linux gives to whoever asks, weights are read as fast as the memory allows (docs/engines.md has the times).
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from math import prod

import torch

_PAGE = 2 * 2**20
_BLOCK = 64 * 2**20
_CACHE_LINE = 64


def mapped(size: int, *, large: bool = False) -> torch.Tensor:
    """Return bytes that go back to the system as soon as they are free; an allocator may keep them.

    Raises:
        MemoryError: there is not so much.
    """
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    try:
        memory = mmap.mmap(-1, size, **private)
    except OSError as error:
        raise MemoryError(f"{size} bytes") from error
    if large and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


class LargePages:
    """Makes tensors that lie beside each other; what they leave of a block's last page is all that is lost."""

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor on the CPU, not filled. Where there are no large pages it lies in ordinary ones."""
        size = prod(shape) * dtype.itemsize
        taken = -(-size // _CACHE_LINE) * _CACHE_LINE
        if taken > len(self._left):
            self._left = _block(max(taken, _BLOCK))
        memory, self._left = self._left[:size], self._left[taken:]
        return memory.view(dtype).view(*shape)


def _block(size: int) -> torch.Tensor:
    """Return bytes in large pages; what is not written to takes no room."""
    block = mapped(size + _PAGE, large=True)
    start = -block.data_ptr() % _PAGE
    return block[start : start + size]
