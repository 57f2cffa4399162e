"""The bundled model: its weights, its card and the recipe that makes it."""

from __future__ import annotations

import argparse
from pathlib import Path


def recipe_parser(documentation: str | None) -> argparse.ArgumentParser:
    """Return the options that every script of the recipe has, described by the first line of its documentation."""
    parser = argparse.ArgumentParser(description=str(documentation).splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("build/nano"), help="folder of all the recipe makes")
    return parser
