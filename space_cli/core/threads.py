"""OpenMP's threads, which each thread that runs a model has to itself.

Idle ones wait actively, so that the next loop of a step starts at once, as long as there are no more of them than
processors. Those that another thread left behind count: beside them every loop waits for the kernel's scheduler, and a
step takes two to three times as long.

Source: GCC's libgomp (`gomp_managed_threads` in `config/linux/wait.h`).
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

_HARD = 2  # omp_pause_hard


def release_threads() -> None:
    """End the idle threads of the calling thread; its next loop starts them again within a tenth of a millisecond."""
    for library in _libraries():
        library.omp_pause_resource_all(_HARD)


@cache
def _libraries() -> tuple[ctypes.CDLL, ...]:
    """Return the OpenMP libraries in this process: PyTorch's own, and that of our kernels where it is another."""
    found = {}
    for name in ("libgomp.so.1", *map(str, Path(torch.__file__).parent.glob("lib/libgomp*"))):
        # only what is loaded already
        with suppress(OSError, AttributeError):
            library = ctypes.CDLL(name, mode=os.RTLD_NOLOAD)
            found[ctypes.cast(library.omp_pause_resource_all, ctypes.c_void_p).value] = library
    return tuple(found.values())
