"""What the package says it needs: bounds that were tested, all of what is imported, the lowest versions in one file."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
OURS_TO_FOLLOW = {"gguf", "peft", "tokenizers", "torch", "transformers", "typer"}
"""Libraries whose insides we use: what they change may break us at any minor version."""
BROUGHT_ALONG = {"llama_cpp", "pydantic_core", "triton"}
"""A peer that a user may install, and what pydantic and torch's builds for CUDA come with."""


def needed():
    """Requirements by name, of the package and of its extras for users: (lower bound, what else is said)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for name, lines in project["optional-dependencies"].items() if name != "dev" for line in lines]
    found = [re.match(r"([\w.-]+)>=([\d.]+)(.*)", line) for line in [*project["dependencies"], *extras]]
    return {match[1]: (match[2], match[3]) for match in found}


def release(version):
    parts = [int(part) for part in version.split(".")]
    return (*parts, 0, 0)[:3]


def test_bounds_stand_at_minor_versions_where_the_insides_are_used():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounded = {line.split(">=")[0]: line.split(",<") for line in project["dependencies"] if ",<" in line}

    assert set(bounded) == OURS_TO_FOLLOW
    assert all(re.fullmatch(r"\d+\.\d+", upper) for _, upper in bounded.values())


def test_the_lowest_versions_are_those_that_are_allowed():
    lines = (ROOT / ".ci" / "lowest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))

    assert {name: release(version) for name, version in pinned.items()} == {
        name: release(lower) for name, (lower, _) in needed().items()
    }


def test_what_is_imported_is_asked_for():
    owners = {module: {_plain(each) for each in names} for module, names in packages_distributions().items()}
    trees = [ast.parse(file.read_text("utf-8")) for file in (ROOT / "space_cli").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    foreign = {name.split(".")[0] for name in modules} - sys.stdlib_module_names - {"space_cli"} - BROUGHT_ALONG

    asked = {_plain(name) for name in needed()}
    assert {name for name in foreign if asked.isdisjoint(owners[name])} == set()


def _plain(name):
    return name.lower().replace("_", "-")
