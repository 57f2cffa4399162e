"""Style of plots, and how they are written to a file or a page.

A plot is drawn in light colours, for a file of its own and for a page alike; in a page each colour becomes a CSS
variable that `templates/page.css` sets for dark. A line has a marker of its own besides its colour.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from space_cli.errors import RunFailed, writing
from space_cli.files import atomic_write
from space_cli.text import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

PAPER, INK, GRID = "#ffffff", "#1f2328", "#d1d9e0"
# distinguishable with most colour blindness, contrast of at least 3 to the paper
_SERIES = ("#0072b2", "#d55e00", "#117733", "#aa3377", "#8c6d00", "#332288", "#0e7c86")
_VARIABLES = {PAPER: "--paper", INK: "--ink", GRID: "--grid"} | {
    colour: f"--series-{number}" for number, colour in enumerate(_SERIES, start=1)
}
_MARKERS = "osD^vPX<"
_WIDTH = 4.6
"""Inches: what a phone shows at its natural size."""
_SETTINGS: dict[Any, Any] = {
    "text.parse_math": False,  # a dollar in a name is a dollar
    "svg.fonttype": "none",
    "svg.hashsalt": "space",
    "font.size": 10,
    "legend.frameon": False,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "lines.markersize": 5,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
_LABEL_LENGTH = 22
LEGEND_COLUMNS = 3


@dataclass(frozen=True, slots=True)
class Plot:
    """One plot.

    Attributes:
        name: unique on a page.
        title: what it shows.
        caption: how to read it.
        headings: of the same in figures; the first column holds names.
        rows: of it.
        height: inches.
        draw: fills a figure.
    """

    name: str
    title: str
    caption: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    height: float
    draw: Callable[[FigureBase], None]


@dataclass(frozen=True, slots=True)
class Style:
    """How the line of one method looks."""

    colour: str
    marker: str


def write_plots(file: Path, drawn: Sequence[Plot]) -> None:
    """Write plots as one figure, PNG or SVG by the file's name, whole or not at all.

    Raises:
        RunFailed: nothing to draw, or the file cannot be written.
    """
    if not drawn:
        raise RunFailed(f"{file}: this run has nothing to draw")
    columns = _columns(drawn)
    heights = [sum(plot.height for plot in column) for column in columns]
    with _drawing(_WIDTH * len(columns), max(heights)) as figure:
        for column, place in zip(columns, figure.subfigures(1, len(columns), squeeze=False)[0], strict=True):
            rest = max(heights) - sum(plot.height for plot in column)
            ratios = [plot.height for plot in column] + ([rest] if rest else [])
            rows = place.subfigures(len(ratios), 1, squeeze=False, height_ratios=ratios)[:, 0]
            for plot, part in zip(column, rows, strict=False):
                plot.draw(part)
                part.suptitle(plot.title, fontsize=12)
        data = io.BytesIO()
        figure.savefig(data, format=file.suffix[1:], dpi=160)
    with writing(file):
        atomic_write(file, data.getvalue())


def _columns(drawn: Sequence[Plot]) -> list[list[Plot]]:
    """Return plots in at most two columns of about one height."""
    columns: list[list[Plot]] = [[], []]
    for plot in drawn:
        min(columns, key=lambda column: sum(each.height for each in column)).append(plot)
    return [column for column in columns if column]


def inline_svg(plot: Plot) -> str:
    """Return a plot as an element of a page, in the page's font and colours."""
    with _drawing(_WIDTH, plot.height) as figure:
        plot.draw(figure)
        data = io.BytesIO()
        figure.savefig(data, format="svg")
    root = ElementTree.fromstring(data.getvalue())
    for child in [each for each in root if each.tag.endswith(("metadata", "defs")) and not each.get("id")]:
        if child.find(".//{*}style") is not None or child.tag.endswith("metadata"):
            root.remove(child)  # a style for all elements of the page, and who made it when
    for element in root.iter():
        _fit(element, plot.name)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    described = f"{plot.name}-title"
    root.attrib |= {"role": "img", "aria-labelledby": described}
    title = ElementTree.Element("title", id=described)
    title.text = f"{plot.title}. {plot.caption}"
    root.insert(0, title)
    return ElementTree.tostring(root, encoding="unicode")


def _fit(element: ElementTree.Element, prefix: str) -> None:
    """Make an element of a drawing one of a page: names apart from other plots', the page's colours and font."""
    element.tag = element.tag.rpartition("}")[2]
    for name, value in list(element.attrib.items()):
        if name == "id":
            element.set(name, f"{prefix}-{value}")
        elif name.endswith("}href"):
            del element.attrib[name]
            element.set("href", value.replace("#", f"#{prefix}-"))
        elif name == "clip-path":
            element.set(name, value.replace("#", f"#{prefix}-"))
        elif name == "style":
            value = re.sub(r"font-family:[^;]*;?", "", value)
            element.set(name, re.sub(r"#[0-9a-f]{6}", lambda found: _variable(found[0]), value))


def _variable(colour: str) -> str:
    return f"var({_VARIABLES[colour]}, {colour})" if colour in _VARIABLES else colour


@contextmanager
def _drawing(width: float, height: float) -> Iterator[Any]:
    """Give a figure of our look, without touching what others draw."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        # a name in a script that the font lacks: boxes in a PNG, the page's own font in SVG
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def styles(names: Iterable[str]) -> dict[str, Style]:
    """Return a style for each name; seven colours and eight markers make 56 distinct ones."""
    looks = zip(cycle(_SERIES), cycle(_MARKERS), strict=False)
    return {name: Style(*look) for name, look in zip(dict.fromkeys(names), looks, strict=False)}


def label(text: str) -> str:
    """Return an untrusted name for a drawing: one short line without characters that XML forbids."""
    shown = re.sub("[\ufffe\uffff]", "\N{REPLACEMENT CHARACTER}", visible(" ".join(text.split())))
    return shown if len(shown) <= _LABEL_LENGTH else f"{shown[: _LABEL_LENGTH - 1]}…"


def legend(figure: FigureBase, panels: Iterable[Axes]) -> None:
    """Put one legend below all panels of a figure."""
    lines = {name: line for axes in panels for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    if lines:
        figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=LEGEND_COLUMNS)
