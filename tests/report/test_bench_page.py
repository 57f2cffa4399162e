from html.parser import HTMLParser
from unittest import mock

import pytest
from browser import Browser, find_browser
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from reports import compared, report, sample

from space_cli.cli.tables import show_bench
from space_cli.report.bench_page import bench_page
from space_cli.report.headline import headline, remarks
from space_cli.report.page import as_html, as_markdown, code, escaped, fenced, table, write_page
from space_cli.text import visible

PIECES = st.sampled_from(
    [
        "<script>alert(1)</script>",
        '" onload="alert(1)',
        "'><img src=http://example.org/x>",
        "</pre></details></style>",
        "<!--",
        "]]>",
        "&lt;b&gt;&#0;",
        "|",
        "\\|",
        "`",
        "```\n",
        "~~~",
        "\n# heading\n",
        "\n- item\n\n    code",
        "[a](javascript:alert(1))",
        "![a](http://example.org)",
        "<http://example.org>",
        "@someone #1 $x$",
        "\x1b]0;x\x07\x00\r",
        "\u202e\u2066\u200f",
        "\ud800",
        "\ufffe\uffff",
        "\u2028",
        "var(--ink)",
    ]
)
HOSTILE = st.lists(st.one_of(PIECES, st.text(st.characters(), max_size=8)), max_size=4).map("".join)


class Parsed(HTMLParser):
    """The elements of a page outside drawings, with the names of their attributes, and all of its text."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.text, self.within_svg = [], "", 0
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.within_svg += tag == "svg"
        if not self.within_svg:
            self.elements.append((tag, *sorted(name for name, _ in attributes)))
        else:
            assert tag in {"svg", "title", "g", "path", "use", "text", "defs", "clippath", "rect", "style"}
            assert not [name for name, _ in attributes if name.startswith("on")]

    def handle_endtag(self, tag):
        self.within_svg -= tag == "svg"

    def handle_data(self, data):
        self.text += data


def hostile_report(text):
    answers = [
        sample(
            method,
            1.0 if method == "ar" else 0.5,
            suite=text,
            task_id=f"{text}{number}",
            category=f"{number % 2}{text}",
            text_by_step=[text, text],
            rejected_by_step=[[text], []],
            outcome=f"failed: {text}",
            score=0.0,
        )
        for number in range(3)
        for method in ("ar", "space")
    ]
    return report(answers, metrics={text: "pass@1"}, model=text, source=text, command=["space", text])


def as_page(run):
    return as_html(headline(run), bench_page(run))


@given(HOSTILE)
def test_what_a_model_wrote_makes_no_element_and_no_attribute(text):
    # drawings take time, and have a test of their own
    with mock.patch("space_cli.report.bench_page.find_spec", return_value=None):
        page, tame = as_page(hostile_report(text)), as_page(hostile_report("tame"))

    parsed = Parsed(page)
    assert parsed.elements == Parsed(tame).elements
    assert visible(text) in parsed.text
    assert page == visible(page)


@pytest.mark.parametrize("name", ["<script>1</script>", "</svg><b>", '" onload="x', "\u202e\x1b\ud800\ufffe"])
def test_a_name_in_a_drawing_makes_no_element(name):
    page = as_page(hostile_report(name))

    assert Parsed(page).elements == Parsed(as_page(hostile_report("tame"))).elements
    assert page == visible(page)


@given(HOSTILE, HOSTILE)
def test_a_table_keeps_its_cells_and_shows_names_as_they_are(name, other):
    page = (
        MarkdownIt("commonmark").enable("table").render(table(("a", "b"), [(code(name), other), (other, code(name))]))
    )

    parsed = Parsed(page)
    assert [element for element in parsed.elements if element[0] not in ("th", "td")] == [
        ("table",), ("thead",), ("tr",), ("tbody",), ("tr",), ("code",), ("tr",), ("code",)
    ]  # fmt: skip
    assert parsed.elements.count(("td",)) == 4
    assert parsed.text.count(visible(" ".join(name.split()))) >= 2


@given(HOSTILE)
def test_markdown_made_of_untrusted_text_stays_one_block(text):
    parsed = Parsed(MarkdownIt("commonmark").render(f"{escaped(text)}x\n\n{fenced(text)}"))

    assert [element[0] for element in parsed.elements] == ["p", "pre", "code"]


def test_answers_show_steps_and_what_was_rejected():
    page = as_page(report(compared({"space": 2.0})))

    assert '<span class="step-0" title="step 1: 3 tokens">a b c</span><del title="rejected in step 1">x</del>' in page
    assert '<span class="step-1" title="step 2: 1 token"> d</span>' in page


def test_markdown_has_the_figures_and_no_drawing():
    text = as_markdown(bench_page(report(compared({"space": 2.0}), command="space bench")))

    assert "| space | 2.00 \\[2.00, 2.00\\] | yes | 2.00 |" in text
    assert "<summary>Acceptance by position, in figures</summary>" in text
    assert "```\nspace bench\n```" in text
    assert "<svg" not in text
    assert "<pre" not in text


def test_quality_stands_beside_that_of_ar():
    answers = compared({"space": 2.0}, score=1.0)
    answers[0] = sample("ar", 1.0, task_id="humaneval/0", score=0.0)

    text = as_markdown(bench_page(report(answers, metrics={"humaneval": "pass@1"})))

    assert "| method | speedup | pass@1 | identical |" in text
    assert "| 1.000 \\(0.833\\) |" in text


def test_the_headline_gives_one_suite_with_and_without_repetitive_answers():
    run = report([*compared({"space": 2.0}, prompts=4, repetitive=4), *compared({"space": 0.8}, prompts=9)[8:]])

    assert headline(run).startswith("space is 1.")
    assert headline(run).endswith("0.80 without repetitive answers; every answer identical")
    assert any("4 of 9 answers of ar repeat themselves" in remark for remark in remarks(run))


def test_the_headline_and_remarks_name_the_worst_suite_as_well_as_the_best():
    run = report([*compared({"space": 2.0, "hf": 0.5}), *compared({"space": 0.5, "hf": 0.9}, suite="xsum")])

    sentence = "space is 0.50 (xsum) to 2.00 (humaneval) times as fast as ar on 2 suites; every answer identical"
    assert headline(run) == sentence
    assert next(remarks(run)) == "Best: 2.00 on humaneval. Worst: 0.50 on xsum, slower than ar."


def test_a_method_that_beat_space_is_named():
    run = report(compared({"space": 1.5, "space-chain": 1.75}))

    assert "Faster in this run: space-chain with 1.75 on humaneval." in remarks(run)


def test_an_interval_that_holds_one_is_too_close_to_call():
    run = report([sample(m, s, task_id=str(n)) for n in range(8) for m, s in (("ar", 1.0), ("space", 0.5 + n / 7))])

    assert any(remark.startswith("Too close to call") for remark in remarks(run))


def test_answers_that_differ_are_reported_first():
    answers = compared({"space": 2.0})
    answers[1] = sample("space", 0.5, task_id="humaneval/0", identical=False)

    assert headline(report(answers)).endswith("; 1 of 6 answers differ from ar's")


def test_without_ar_no_speedup_is_claimed():
    run = report([sample("space", 0.5)])

    assert headline(run).startswith("space reaches 8.0 tokens per second on humaneval, 2.00 per step; no speedup")


def test_a_sweep_is_about_its_best_k():
    run = report(compared({"space-k1": 1.5, "space-k2": 1.9, "space-k3": 1.2}), sweep="candidates=1..3")

    assert headline(run).startswith("space-k2 is 1.90 times as fast as ar")
    assert "Fastest, by a star: k = 2 for humaneval." in as_page(run)


def test_page_and_terminal_name_the_same_k_where_suites_disagree(capsys):
    # k = 2 is the faster on the first suite, k = 3 over both: all tokens over all seconds
    answers = compared({"space-k2": 2.0, "space-k3": 1.9})
    answers += compared({"space-k2": 1.0, "space-k3": 3.0}, suite="mbpp")
    run = report(answers, sweep="candidates=2..3")

    show_bench(run, "all", to_stderr=False)

    assert "Fastest here: k = 3 (1.90x on humaneval)" in capsys.readouterr().out
    assert headline(run).startswith("space-k3 is 1.90 (humaneval) to 3.00 (mbpp) times as fast as ar")
    assert "Fastest, by a star: k = 2 for humaneval, k = 3 for mbpp." in as_page(run)


def test_a_run_cut_short_says_so():
    run = report(compared({"space": 2.0}))
    run.complete = False

    assert "The run was cut short" in as_page(run)


def test_without_matplotlib_a_page_has_the_figures_and_says_what_to_install(monkeypatch):
    monkeypatch.setattr("space_cli.report.bench_page.find_spec", lambda _: None)

    page = as_page(report(compared({"space": 2.0})))

    assert "pip install 'space-decoding[plot]'" in page
    assert "Acceptance by position, in figures" in page
    assert "<svg" not in page


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium on PATH to open a page in")
    with Browser(program, tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def wide_page(tmp_path_factory):
    """A page of several suites with long hostile names, categories, scores and long lines."""
    long = "<script>document.title='owned'</script>" + "unbroken" * 40
    answers = [
        *compared({"space": 2.0, "space-chain": 1.5, "hf": 0.5}, score=1.0, repetitive=2),
        *compared({"space": 0.5, "space-chain": 1.5, "hf": 0.5}, suite=long, text_by_step=[long, long]),
    ]
    for each in answers:
        each.category = f"{each.task_id[-1]} {long}"
    run = report(answers, metrics={"humaneval": "pass@1"}, command=["space", long])
    file = tmp_path_factory.mktemp("page") / "page.html"
    write_page(file, headline(run), bench_page(run))
    return file


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_shows_a_page_without_complaint_request_or_sideways_scrolling(browser, wide_page, scheme, width):
    browser.show(wide_page, width=width, scheme=scheme)

    assert browser.complaints() == []
    assert browser.requests() == [wide_page.as_uri()]
    assert browser.value("document.title").startswith("space is")
    assert browser.value("document.scrollingElement.scrollWidth") <= width
    assert browser.value("document.querySelectorAll('svg').length") == 4


@pytest.mark.browser
def test_a_page_is_light_or_dark_as_its_reader_likes_it(browser, wide_page):
    colours = "(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))"
    line = "getComputedStyle(document.querySelector('svg path[style*=series-1]')).stroke"

    browser.show(wide_page, scheme="light")
    light = [*browser.value(colours), browser.value(line)]
    browser.show(wide_page, scheme="dark")
    dark = [*browser.value(colours), browser.value(line)]

    assert light == ["rgb(31, 35, 40)", "rgb(255, 255, 255)", "rgb(0, 114, 178)"]
    assert dark == ["rgb(230, 234, 239)", "rgb(15, 19, 24)", "rgb(88, 180, 240)"]
