"""Lossless multi-token decoding for language models on your own machine (SPACE, arXiv 2402.11809)."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("space-decoding")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"
