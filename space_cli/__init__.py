"""Lossless multi-token decoding for language models on your own machine (SPACE, arXiv 2402.11809).

`from space_cli import load`: see `space_cli.api`. The names below are imported when first asked for, so that
`import space_cli` itself imports no torch.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from space_cli.api import Answer, Model, Piece, Stream, load
    from space_cli.errors import RunFailed, SpaceError, UsageProblem

__all__ = ["Answer", "Model", "Piece", "RunFailed", "SpaceError", "Stream", "UsageProblem", "__version__", "load"]

try:
    __version__ = version("space-decoding")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'space_cli' has no attribute {name!r}")
    home = "space_cli.errors" if name in ("RunFailed", "SpaceError", "UsageProblem") else "space_cli.api"
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
