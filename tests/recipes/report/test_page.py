"""The page of a report: self-contained, escaped, and whole in a browser of any width."""

from __future__ import annotations

import os
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from recipes.__main__ import main
from recipes.report.numbers import read_run
from recipes.report.page import report_at_end
from tests.recipes.report.run_directory import HOSTILE, LABELS, write_data, write_run


@pytest.fixture
def runs(tmp_path):
    data = write_data(tmp_path / "data")
    young = {"weights.jsonl": None, "results.json": None, "extreme_weights.jsonl": None}
    return [
        str(write_run(tmp_path / "runs" / "whole$x$", data)),
        str(write_run(tmp_path / "runs" / "young", data, **young)),
    ]


@pytest.fixture
def drawn():
    pytest.importorskip("matplotlib", reason="the extra `report` is not installed")


class Page(HTMLParser):
    """What a page holds: ids, targets of links, sources of pictures, names of elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.add(value)
            if name == "href":
                self.links.append(value)
            if name == "src":
                self.sources.append(value)


def test_without_the_extra_the_command_says_which_and_a_run_ends_quietly(
    runs, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    output = tmp_path / "report.html"
    assert main(["report", *runs, "--output", str(output)]) == 1
    assert "pip install 'bilevel-prm[report]'" in capsys.readouterr().err
    report_at_end(tmp_path / "runs" / "young")
    assert capsys.readouterr().out == capsys.readouterr().err == ""
    assert not list(tmp_path.glob("report*"))


def test_runs_are_named_once_and_exist(runs, tmp_path, drawn, capsys):
    output = ["--output", str(tmp_path / "r.html")]
    assert main(["report", runs[0], runs[0], *output]) == 2
    assert main(["report", *runs, "--data", "x", *output]) == 2
    assert main(["report", str(tmp_path / "nothing"), *output]) == 2
    assert not (tmp_path / "r.html").exists()


def test_the_page_is_whole_and_holds_no_code_of_the_data(runs, tmp_path, drawn, capsys):
    output = tmp_path / "r.html"
    assert main(["report", *runs, "--output", str(output)]) == 0
    text = output.read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert HOSTILE not in text
    assert "what is 2 &amp; $x$?" in text
    assert ">learned<" not in text
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert page.links
    assert {link.removeprefix("#") for link in page.links} <= page.ids
    assert not re.search(r"(?:src|href)=\"(?!data:|#)|@import|url\(", text)
    drawn_figures = sorted(path.name for path in (tmp_path / "r_figures").iterdir())
    assert drawn_figures == [
        "best-of-k.png", "losses.png", "results-test.png", "run-1-weight-loss.png",
        "run-1-weights-domain.png", "run-1-weights-source.png", "seconds.png", "trajectories.png",
    ]  # fmt: skip
    assert "Not shown: " in text
    assert main(["report", *runs, "--output", str(output)]) == 2
    assert "exists; remove it" in capsys.readouterr().err


def test_learned_labels_are_on_the_page(tmp_path, drawn):
    data = write_data(tmp_path / "data")
    log = [{"step": n, "labels/moved": n / 4, "labels/most": n / 2} for n in (1, 2)]
    changes = {"labels.jsonl": LABELS, "log.jsonl": log, "results.json": None}
    run = write_run(tmp_path / "labels", data, **changes)
    output = tmp_path / "r.html"
    assert main(["report", str(run), "--output", str(output)]) == 0
    text = output.read_text(encoding="utf-8")
    assert "<th>labels turned over</th><td>4 of 12</td>" in text
    assert "The run learned labels of steps, not weights." in text
    # e2, the example of highest weight: label, learned label, score before and after
    numbers = "".join(f'<td class="n">{cell}</td>' for cell in ("0.250", "0.500", "0.250"))
    assert f"<td>+</td>{numbers}" in text
    assert (tmp_path / "r_figures" / "labels-over-steps.png").is_file()


def test_the_development_set_is_drawn_over_the_steps(tmp_path, drawn):
    from recipes.report import drawing

    data = write_data(tmp_path / "data")
    log = [{"step": n, "best_of_n": n / 50, "step_auc": None} for n in range(40)]
    results = {"rows": {}, "model_selection": {"step": 7}}
    changes = {"log.jsonl": log, "results.json": results}
    run = read_run(write_run(tmp_path / "run", data, **changes), "run")
    assert run.kept == 7
    picture = drawing.dev_set([run])
    assert picture is not None
    assert "A vertical line: the step of the model." in picture.caption
    assert "Thin: the lines of the log" in picture.caption  # from 40 lines on
    fewer = read_run(write_run(tmp_path / "fewer", data, **{"log.jsonl": log[1:]}), "fewer")
    assert "hin" not in drawing.dev_set([fewer]).caption
    assert "step of the model" not in drawing.dev_set([fewer]).caption
    assert drawing.losses([run]) is None


def test_one_line_has_no_legend(drawn):
    from recipes.report import drawing

    for names in (["one"], ["one", "two"]):
        _, axes = drawing.blank_axes(2.0)
        for name in names:
            axes.plot([0, 1], label=name)
        drawing.legend(axes)
        texts = axes.get_legend().get_texts() if axes.get_legend() else []
        assert [text.get_text() for text in texts] == (names if len(names) > 1 else [])


def test_a_run_at_its_end_has_its_report(runs, drawn, tmp_path, capsys):
    directory = tmp_path / "runs" / "whole$x$"
    report_at_end(directory)
    assert capsys.readouterr().out == f"report: {directory / 'report.html'}\n"
    assert (directory / "report.html").is_file()


def test_a_browser_shows_every_section_at_two_widths(runs, tmp_path, drawn):
    """``CHROMIUM`` names the browser, if it is not on the path; ``SCREENSHOTS`` keeps pictures."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, (shutil.which(name) for name in names if name)), None)
    if browser is None:
        pytest.skip("no Chromium on the path, and none named by CHROMIUM")
    output = tmp_path / "r.html"
    assert main(["report", *runs, "--output", str(output)]) == 0
    asked: list[str] = []
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for width in (1280, 420):
            page = chromium.new_page(viewport={"width": width, "height": 900})
            page.on("request", lambda request: asked.append(request.url))
            page.on("console", lambda message: asked.append(message.text))
            page.goto(output.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            # What is too wide scrolls in a box of its own; the accuracy is seen without that.
            outside = "[...document.querySelectorAll('table')].filter(t => !t.closest('.wide'))"
            assert page.evaluate(f"{outside}.every(t => t.scrollWidth <= {width})")
            accuracy = page.locator("#results tr").nth(1).locator("td").nth(2).bounding_box()
            assert accuracy["x"] + accuracy["width"] <= width
            broken = "[...document.images].filter(i => !i.naturalWidth).length"
            assert page.evaluate(broken) == 0
            for number in range(page.locator("nav a").count()):
                link = page.locator("nav a").nth(number)
                link.click()
                target = page.locator(link.get_attribute("href"))
                assert target.bounding_box()["y"] < 900
            for number in range(page.locator("details").count()):
                part = page.locator("details").nth(number)
                was = part.evaluate("part => part.open")
                part.locator("summary").click()
                assert part.evaluate("part => part.open") != was
                if was:
                    part.locator("summary").click()
            folder = os.environ.get("SCREENSHOTS", str(tmp_path))
            page.screenshot(path=f"{folder}/report-{width}.png", full_page=True)
        chromium.close()
    assert [url for url in asked if not url.startswith("data:")] == [output.as_uri()] * 2


def test_files_of_the_run_and_figures_of_others_are_kept(runs, tmp_path, drawn, capsys):
    args = Path(runs[0]) / "args.yaml"
    before = args.read_text()
    assert main(["report", runs[0], "--output", str(args), "--overwrite"]) == 2
    assert args.read_text() == before
    (tmp_path / "page_figures").mkdir()
    (tmp_path / "page_figures" / "losses.png").write_text("mine")
    assert main(["report", runs[0], "--output", str(tmp_path / "page.html")]) == 2
    assert "page_figures exists" in capsys.readouterr().err
    assert (tmp_path / "page_figures" / "losses.png").read_text() == "mine"
