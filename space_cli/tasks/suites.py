"""Suites by name or from a file: where their rows come from, and which format they have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from space_cli.errors import UsageProblem, did_you_mean, opening
from space_cli.files import expanded
from space_cli.rows import HubDataset, SourceRow, read_file, read_hub, read_rows
from space_cli.tasks.formats import SUITES, DatasetFormat, each_row, plain_prompt
from space_cli.tasks.prompts import Prompt, Suite


def load_suite(name: str, *, field: str | None = None) -> Suite:
    """Return the prompts of a suite.

    Args:
        name: one of `SUITES`; NAME=SOURCE, its format read from a file or from another dataset of the Hub, laid out as
            its own is; or a file, whose format is recognised by its fields.
        field: of a file, the field that holds the prompt, whatever its format. Without it a file of no known format has
            `prompt`. Fields `task_id` and `category` are kept.

    Raises:
        UsageProblem: unknown suite or source; empty or malformed rows, with the line number.
    """
    suite, equals, source = name.partition("=")
    if suite in SUITES:
        dataset_format = SUITES[suite]
        if equals and not source:
            raise UsageProblem(f"{name}: nothing follows the =", hint="give a file or a dataset id of the Hub")
        rows = (
            read_rows(source, dataset_format.hub or HubDataset(source)) if equals else _own_rows(suite, dataset_format)
        )
    else:
        # a format can show in the last row alone
        held = list(_file_rows(name))
        dataset_format, rows = _recognise(held, field, stem=Path(name.removesuffix(".gz")).stem), iter(held)
    prompts = tuple(_distinct(dataset_format.read(_complete(rows, dataset_format.fields))))
    if not prompts:
        raise UsageProblem(f"{name}: no prompts in it", hint='each line is an object like {"prompt": "..."}')
    return Suite(
        name,
        prompts,
        dataset_format.stop_strings,
        dataset_format.chat,
        dataset_format.metric,
        dataset_format.instruction,
    )


def _own_rows(name: str, dataset_format: DatasetFormat) -> Iterator[SourceRow]:
    if dataset_format.package is not None:
        return dataset_format.package.read()
    give = f"give a file: --suite {name}=FILE"
    if dataset_format.hub is None:
        raise UsageProblem(f"{name}: comes with no package and stands in no dataset of the Hub", hint=give)
    try:
        return read_hub(dataset_format.hub)
    except UsageProblem as problem:
        raise UsageProblem(f"{name}: {dataset_format.hub.id}: {problem.message}", hint=give) from problem


def _file_rows(name: str) -> Iterator[SourceRow]:
    file = Path(expanded(name))
    with opening(name):  # a name can be too long for the file system
        there = file.exists()
    if there:
        return read_file(file)
    otherwise = f"known suites: {', '.join(SUITES)}; or a file of prompts"
    suite, equals, _ = name.partition("=")
    what = f"{name}: no suite named {suite!r}" if equals else f"no suite and no file named {name!r}"
    raise UsageProblem(what, hint=did_you_mean(suite, SUITES, otherwise=otherwise))


def _recognise(rows: Sequence[SourceRow], field: str | None, *, stem: str) -> DatasetFormat:
    """Return the first format in `SUITES` that the rows have, or that of plain prompts."""
    objects = [row.value for row in rows if isinstance(row.value, dict)]
    if field is None and objects:
        for dataset_format in SUITES.values():
            if set(dataset_format.fields) <= objects[0].keys() and dataset_format.is_of(objects):
                return dataset_format
    return DatasetFormat("", (), each_row(plain_prompt, stem, field=field or "prompt"))


def _complete(rows: Iterator[SourceRow], fields: Sequence[str]) -> Iterator[SourceRow]:
    """Yield the rows, each found to have the fields of its format."""
    for row in rows:
        if fields and not isinstance(row.value, dict):
            raise UsageProblem(f"{row.where}: not a JSON object")
        if missing := [field for field in fields if field not in row.value]:
            raise UsageProblem(f"{row.where}: no field {missing[0]!r}", hint=f"each row needs {', '.join(fields)}")
        yield row


def _distinct(prompts: Iterator[tuple[SourceRow, Prompt]]) -> Iterator[Prompt]:
    first: dict[str, SourceRow] = {}
    for row, prompt in prompts:
        if prompt.task_id in first:
            other = first[prompt.task_id]
            stands = f"stands in {other.unit} {other.number} already"
            raise UsageProblem(f"{row.where}: task_id {prompt.task_id!r} {stands}")
        first[prompt.task_id] = row
        yield prompt
