"""The C++ kernels, built and loaded when a model first needs them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from platformdirs import user_cache_path

from space_cli.compile.toolchain import build_kernels, load_kernels
from space_cli.errors import RunFailed


def engine_folder() -> Path:
    """Return the cache folder of compiled models, kernels and their measurements."""
    return user_cache_path("space") / "engines"


@lru_cache(maxsize=1)
def kernels_problem() -> str | None:
    """Load the kernels, building them if needed; return in a line why that fails, or None."""
    folder = engine_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        load_kernels(build_kernels(folder))
    except (OSError, RunFailed) as error:
        return str(error)
    return None


def problem_met() -> str | None:
    """Return why the kernels could not be had when a model of this process needed them, or None."""
    return kernels_problem() if kernels_problem.cache_info().currsize else None
