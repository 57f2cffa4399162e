"""The report of `space verify-lossless`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from space_cli.report.page import Part, escaped, fenced, table
from space_cli.report.wording import by_place, evidence, heading, verdict, verification_settings

if TYPE_CHECKING:
    from space_cli.verify.record import Divergence, Verification

_LEGEND = "Tie: rounding errors as measured at that place explain either token. Violation: they do not."


def verification_page(record: Verification) -> list[Part]:
    """Return a verification as the parts of a report; its title is the verdict."""
    where = record.environment
    rows = [(row.suite, row.against, row.answers, row.identical, row.ties, row.violations) for row in record.rows]
    parts = [
        f"# {escaped(verdict(record))}",
        "" if record.complete else "The run was cut short; this is what was done by then.",
        escaped(" · ".join(verification_settings(record))),
        table(("suite", "against", "answers", "identical", "ties", "violations"), rows),
        *[escaped(line) for line in evidence(record)],
        _LEGEND,
        *[_place(place) for place in by_place(record.divergences)],
        escaped(
            f"space {where['space']} ({where['commit'] or 'no checkout'}), torch {where['torch']}, transformers"
            f" {where['transformers']}, {where['processor']}, {where['date']}"
        ),
    ]
    return [part for part in parts if part]


def _place(place: list[Divergence]) -> str:
    found = place[0]
    sides = table(
        ("", "token id", "text"),
        [
            ("expected", _shown(found.expected), repr(found.expected_text)),
            ("got", _shown(found.got), repr(found.got_text)),
        ],
    )
    title = escaped(f"{found.verdict}: {heading(place)}")
    return "\n\n".join([f"## {title}", fenced(found.context), sides, escaped(found.reason)])


def _shown(token: int | None) -> str:
    return "ended" if token is None else str(token)
