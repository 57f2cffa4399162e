import re
from xml.etree import ElementTree

import pytest
from reports import compared, report, sample
from running import refusal

from space_cli.bench.profile import Profile
from space_cli.errors import RunFailed
from space_cli.report.drawing import inline_svg, write_plots
from space_cli.report.plots import plots


def test_every_figure_of_a_plot_is_there_in_words():
    drawn = {plot.name: plot for plot in plots(report(compared({"space": 2.0, "hf": 0.5}, repetitive=1)))}

    assert list(drawn) == ["speedup", "step-tokens", "acceptance", "costs"]
    assert ("humaneval", "all", "space", "2.00", "2.00 to 2.00") in drawn["speedup"].rows
    assert ("humaneval", "without repetitive", "hf", "0.50", "0.50 to 0.50") in drawn["speedup"].rows
    assert drawn["step-tokens"].rows == [("humaneval, space", "50.0%", "0.0%", "50.0%")]
    assert drawn["step-tokens"].caption.endswith("Always one: ar, hf.")
    assert drawn["acceptance"].rows == [("humaneval, space", "100.0%", "100.0%", "0.0%")]
    assert drawn["costs"].rows == [("1", "1.00", "1.00"), ("8", "1.20", "1.20"), ("32", "2.00", "2.00")]


def test_a_plot_without_data_is_left_out():
    run = report([sample("ar", 1.0)])
    run.environment = run.environment | {"step_costs": None}

    assert plots(run) == []


def test_a_sweep_names_the_best_k_of_each_suite():
    speeds = {"space-k1": 1.5, "space-k2": 1.9, "space-k10": 1.2}

    sweep = plots(report(compared(speeds), sweep="candidates=1,2,10"))[0]

    assert "k = 2 for humaneval" in sweep.caption
    assert [row[2] for row in sweep.rows] == ["1", "2", "10"]
    assert "k = 2, 1.90" in inline_svg(sweep)


def test_a_profile_gives_costs_by_length_and_the_roofline():
    run = report([sample("space", 1.0)])
    costs = {256: {1: 0.001, 8: 0.002}, 512: {1: 0.002, 8: 0.003}}
    run.profile = Profile(weight_bytes=1, bytes_per_second=1.0, roofline_seconds=0.0005, seconds=costs)

    plot = plots(run)[-1]

    assert plot.headings == ("slots", "prefix 256, ms", "prefix 512, ms", "over 1 slot")
    assert plot.rows[1] == ("8", "2.00", "3.00", "2.00")
    assert "0.50 ms" in plot.caption


def test_a_drawing_in_a_page_has_a_name_its_own_ids_and_the_colours_of_the_page():
    drawn = [inline_svg(plot) for plot in plots(report(compared({"space": 2.0})))]

    ids = [found for svg in drawn for found in re.findall(r'\bid="([^"]+)"', svg)]
    references = {found for svg in drawn for found in re.findall(r'(?:href="#|url\(#)([^")]+)', svg)}
    assert len(ids) == len(set(ids))
    assert references <= set(ids)
    assert all(ElementTree.fromstring(svg).find("title").text for svg in drawn)
    assert "var(--series-1, #0072b2)" in drawn[0]
    assert not [svg for svg in drawn if re.search(r"(?<!, )#[0-9a-f]{6}", svg)]
    assert not [svg for svg in drawn if "font-family" in svg or "metadata" in svg or "<style" in svg]


@pytest.mark.parametrize("name", ["$x^2$ & <b>", "\ufffe\ud800\x00\u202e", "a\n\tb", "漢字 🎉", "_hidden", ""])
def test_any_name_can_be_drawn(name, tmp_path):
    run = report([*compared({"space": 2.0}, suite=name), *compared({"space": 2.0}, suite="other")])

    write_plots(tmp_path / "plot.svg", plots(run)[:1])

    assert ElementTree.parse(tmp_path / "plot.svg").getroot().tag.endswith("svg")


def test_nothing_to_draw_is_reported(tmp_path):
    with pytest.raises(RunFailed, match="this run has nothing to draw"):
        write_plots(tmp_path / "plot.png", [])


def test_a_missing_matplotlib_is_refused_before_the_run(monkeypatch, run_space):
    monkeypatch.setattr("space_cli.cli.options.find_spec", lambda _: None)

    line = refusal(run_space("bench", "--plot", "plot.png"))

    assert line == "space: --plot: needs matplotlib; pip install 'space-decoding[plot]'"
