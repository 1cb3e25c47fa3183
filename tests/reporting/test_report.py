"""The report as a reader's browser gets it."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megatron_trd.errors import UserError
from megatron_trd.reporting.metrics import MetricsWriter, SampleWriter
from megatron_trd.reporting.report import report_runs, write_report

VOID = {"meta", "link", "br", "hr", "img", "input"}
ATTACK = "<script>alert('x')</script>"


class Page(HTMLParser):
    """Checks that tags nest; collects texts by (tag, class), ids, and references to the outside."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.texts: list[tuple[list[tuple[str, str]], str]] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.ids += [values["id"]] if "id" in values else []
        self.references += [values[key] for key in ("src", "href", "xlink:href") if key in values]
        if tag not in VOID:
            self.open.append((tag, values.get("class", "")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert [name for name, *_ in self.open[-1:]] == [tag], f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((list(self.open), data.strip()))

    def within(self, tag: str, css_class: str | None = None) -> list[str]:
        """Texts inside elements of a tag (and class)."""
        return [
            text
            for path, text in self.texts
            if any(name == tag and css_class in (None, classes) for name, classes in path)
        ]

    def rows(self) -> list[str]:
        return [re.sub(r"\s+", " ", text) for text in self.within("td")]


def metrics(step: int, *, refines: bool = True) -> dict[str, Any]:
    values: dict[str, Any] = {
        "divergence/mean": 1 / (step + 1),
        "grad_norm": 1.0,
        "drift/mean": 2e-6,
        "right/rollout": 0.25,
        "length/rollout": 60.0,
        "tokens/trained": 500,
        "time/refit": 0.1,
        "time/sample": 0.5,
        "time/teacher": 0.2,
        "time/train": 0.7,
        "time/step": 2.0,
        "throughput/sample": 1500.0,
        "throughput/train": 900.0,
        "memory/host_gib": 1.0 + step,
        "memory/sample/host_gib": 0.5 + step,
    }
    return values | ({"right/refinement": 0.9, "length/refinement": 58.0} if refines else {})


def make_run(folder: Path, steps: int = 3, *, refines: bool = True, last: dict[str, Any] | None = None) -> Path:
    writer = MetricsWriter(folder, tensorboard=False, resume_from=0)
    for step in range(steps):
        writer.write(step, metrics(step, refines=refines) | (last if last and step == steps - 1 else {}))
    writer.close()
    (folder / "config.yaml").write_text(f"model: {ATTACK}\nsteps: {steps}\n")
    return folder


def make_pair(**values: Any) -> dict[str, Any]:
    return {
        "problem": f"What is 1 + 1? {ATTACK}",
        "answer": "2",
        "reference": "+1=2",
        "rollout": "start\nslip\nlater\nend",
        "refinement": "start\nmended\nend",
        "rollout_right": False,
        "refinement_right": True,
        **values,
    }


def score(value: float, passed: float, **values: Any) -> dict[str, Any]:
    return {
        "avg@16": {"value": value, "low": value - 0.031, "high": value + 0.032},
        "pass@16": {"value": passed, "low": passed - 0.011, "high": passed + 0.012},
        "seconds": 12.3,
        **values,
    }


SCORES = {
    "task": "sums",
    "samples": 16,
    "problems": 64,
    "seeds": [0, 1],
    "results": {"trd-opsd": score(0.823, 0.951, train_seconds=83.4), "base": score(0.411, 0.704)},
}


def render(path: Path, runs: dict[str, Path], **arguments: Any) -> tuple[str, Page]:
    write_report(path, runs, title="A report", **arguments)
    html = path.read_text()
    return html, Page(html)


def test_runs_of_one_name_are_compared_in_the_folder_that_holds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in "first", "second":
        make_run(tmp_path / folder / "seed=0")
    monkeypatch.chdir(tmp_path / "first")
    assert report_runs([Path("seed=0")]) == Path("seed=0/report.html")
    path = report_runs([Path("seed=0"), Path("../second/seed=0")])
    assert path == tmp_path / "report.html"
    page = Page(path.read_text())
    assert [text for text in page.within("b") if "seed" in text] == ["first/seed=0", "second/seed=0"]


def test_one_run_without_scores_or_samples(tmp_path: Path) -> None:
    html, page = render(tmp_path / "out" / "report.html", {"only": make_run(tmp_path / "run")})
    assert page.within("h1") == ["A report"]
    assert page.within("h2") == ["Training", "Where the time went", "Memory and throughput", "Configuration"]
    assert html.count("<svg") == 6  # five plots of curves, and the time
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]


def test_held_out_scores_have_a_panel(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for file, rows in {
        "metrics.jsonl": [{"loss": 1.0}],
        "held_out.jsonl": [{"held_out/avg@4": 0.25, "held_out/avg@4/low": 0.1}, {"held_out/avg@2": 0.5}],
    }.items():
        writer = MetricsWriter(folder, tensorboard=False, resume_from=0, file=file)
        for step, row in enumerate(rows):
            writer.write(step, row)
        writer.close()
    write_report(tmp_path / "report.html", {"run": folder}, title="a run")
    html = (tmp_path / "report.html").read_text()
    assert html.count('aria-label="Held-out problems: mean share of right responses"') == 1
    writer = MetricsWriter(tmp_path / "other", tensorboard=False, resume_from=0)
    writer.write(0, {"loss": 1.0})
    write_report(tmp_path / "report.html", {"run": tmp_path / "other"}, title="a run")
    assert "Held-out" not in (tmp_path / "report.html").read_text()


def test_it_needs_nothing_but_itself(tmp_path: Path) -> None:
    runs = {"a": make_run(tmp_path / "a"), "b": make_run(tmp_path / "b", refines=False)}
    html, page = render(tmp_path / "report.html", runs, scores=SCORES, pairs=[make_pair(first_wrong_line=1)])
    assert not re.search(r"https?://|@import|<link|<script", html)
    assert all(reference.startswith("#") for reference in page.references)
    assert len(page.ids) == len(set(page.ids)), "an id is used twice"
    used = {reference.removeprefix("#") for reference in page.references} | set(re.findall(r"url\(#([^)]*)\)", html))
    assert used <= set(page.ids), "a figure refers to what is not there"


def test_every_colour_of_a_figure_follows_the_theme(tmp_path: Path) -> None:
    html, _ = render(tmp_path / "report.html", {"a": make_run(tmp_path / "a")}, scores=SCORES)
    light, dark = (set(re.findall(r"(--[\w-]+):", part)) for part in html.split("prefers-color-scheme: dark")[:2])
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        assert not re.search(r"#[0-9a-f]{6}\b", svg), "a fixed colour"
        assert set(re.findall(r"var\((--[\w-]+)\)", svg)) <= light
    assert {"--ink", "--paper", "--muted", "--rule", "--accent", "--base", "--series-5"} <= light & dark


def test_scores_stand_in_table_and_bars(tmp_path: Path) -> None:
    html, page = render(tmp_path / "report.html", {"trd-opsd": make_run(tmp_path / "a")}, scores=SCORES)
    cells = page.rows()
    base = cells.index("base")
    method = cells.index("trd-opsd")
    assert cells[base : base + 7] == ["base", "41.1", "38.0 – 44.3", "70.4", "69.3 – 71.6", "–", "12.3"]
    assert cells[method : method + 9] == [
        *("trd-opsd", "82.3", "79.2 – 85.5", "+41.2"),
        *("95.1", "94.0 – 96.3", "+24.7"),
        *("83.4", "12.3"),
    ]
    assert base < method, "before comes before after"
    average, passed = re.findall(r"<svg.*?</svg>", html, re.DOTALL)[:2]
    assert ">41.1<" in average
    assert ">82.3<" in average
    assert ">70.4<" in passed
    assert ">95.1<" in passed
    assert "sums: 64 problems, 16 responses each" in html


def test_a_method_worse_than_the_base_shows_its_loss(tmp_path: Path) -> None:
    scores = SCORES | {"results": {"base": score(0.5, 0.5), "worse": score(0.4, 0.45)}}
    _, page = render(tmp_path / "report.html", {"worse": make_run(tmp_path / "a")}, scores=scores)
    assert page.within("td", "gain") == ["−10.0", "−5.0"]


def test_model_output_is_escaped_everywhere(tmp_path: Path) -> None:
    pair = make_pair(rollout=ATTACK, refinement=ATTACK, reference=ATTACK, answer=ATTACK, first_wrong_line=0)
    html, page = render(tmp_path / "report.html", {ATTACK: make_run(tmp_path / "run")}, pairs=[pair])
    assert "<script" not in html
    assert page.within("ol") == [ATTACK, "first wrong line", ATTACK]
    assert page.within("p", "answer") == [f"Answer: {ATTACK}"]
    assert page.within("h3") == [f"What is 1 + 1? {ATTACK}"]
    assert f"model: {ATTACK}\nsteps: 3" in page.within("pre")


def test_the_slip_and_what_follows_it_are_marked(tmp_path: Path) -> None:
    pairs = [make_pair(first_wrong_line=1)]
    _, page = render(tmp_path / "report.html", {"a": make_run(tmp_path / "run")}, pairs=pairs)
    assert page.within("li", "slip") == ["slip", "first wrong line"]
    assert page.within("li", "after") == ["later", "after the slip", "end"]
    assert page.within("li", "changed") == ["mended"]
    assert page.within("span", "verdict wrong") == ["✗ wrong"]
    assert page.within("span", "verdict right") == ["✓ right"]


def test_lines_are_numbered_from_one(tmp_path: Path) -> None:
    html, _ = render(tmp_path / "report.html", {"a": make_run(tmp_path / "run")}, pairs=[make_pair(first_wrong_line=1)])
    assert re.findall(r'<li class="slip" data-n="(\d+)"><span>(.*?)</span>', html) == [("2", "slip")]
    assert re.findall(r'<li class="changed" data-n="(\d+)"><span>(.*?)</span>', html) == [("2", "mended")]


def test_a_missing_line_is_marked_after_the_last(tmp_path: Path) -> None:
    pairs = [make_pair(rollout="start", first_wrong_line=1)]
    html, page = render(tmp_path / "report.html", {"a": make_run(tmp_path / "run")}, pairs=pairs)
    assert page.within("li", "slip") == ["a line is missing"]
    assert '<li class="slip" data-n="2">' in html


def test_a_right_rollout_has_no_mark(tmp_path: Path) -> None:
    pairs = [make_pair(rollout_right=None, refinement_right=None, first_wrong_line=None)]
    _, page = render(tmp_path / "report.html", {"a": make_run(tmp_path / "run")}, pairs=pairs)
    assert page.within("li", "slip") == page.within("li", "after") == []
    assert page.within("span", "verdict wrong") == page.within("span", "verdict right") == []


def test_pairs_come_from_the_last_step_of_the_first_run(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    SampleWriter(second, resume_from=0).write(200000, [make_pair(problem="of the second run")])
    samples = SampleWriter(first, resume_from=0)
    samples.write(99999, [make_pair(problem="an earlier step")])
    samples.write(100000, [make_pair(problem="raw", refinement=None), *(make_pair(problem=f"p{n}") for n in range(4))])
    _, page = render(tmp_path / "report.html", {"a": first, "b": second})
    assert page.within("h3") == ["p0", "p1", "p2"]
    assert page.within("li", "slip") == []


def test_times_sum_to_the_step_and_memory_is_the_peak(tmp_path: Path) -> None:
    _, page = render(tmp_path / "report.html", {"a": make_run(tmp_path / "run")})
    cells = page.rows()
    assert cells[: cells.index("2.00 s") + 1] == [
        *("a", "0.10 s", "5.0 %", "0.50 s", "25.0 %", "0.20 s", "10.0 %", "0.70 s", "35.0 %", "0.50 s", "25.0 %"),
        "2.00 s",
    ]
    peaks = ["–", "3.00", "–", "2.50", "–", "–"]  # device, host, and in each part of a step
    assert cells[cells.index("2.00 s") + 1 :] == ["a", *peaks, "1,500", "900", "1,500", "3", "0.1"]


def test_a_diverged_run_of_one_step_still_has_a_report(tmp_path: Path) -> None:
    last = {"divergence/mean": math.nan, "grad_norm": math.inf, "drift/mean": 0.0}
    run = make_run(tmp_path / "run", 1, last=last)
    html, _ = render(tmp_path / "report.html", {"a": run})
    assert html.count("<svg") == 6


def test_a_run_that_trained_on_nothing_has_the_plots_it_can_have(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False, resume_from=0)
    writer.write(0, {"length/rollout": 3.0, "time/step": 0.5})
    writer.close()
    html, page = render(tmp_path / "report.html", {"a": tmp_path})
    assert page.within("figcaption")[0] == "Length"
    assert html.count("<svg") == 2
    assert "The run folder has no config.yaml." in html


def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    runs = {"a": make_run(tmp_path / "run")}
    first, _ = render(tmp_path / "1.html", runs, scores=SCORES)
    second, _ = render(tmp_path / "2.html", runs, scores=SCORES)
    assert first == second


def test_a_folder_without_metrics_is_a_user_error_and_leaves_no_report(tmp_path: Path) -> None:
    runs = {"good": make_run(tmp_path / "good"), "bad": tmp_path / "bad"}
    with pytest.raises(UserError, match=r"bad: no metrics\.jsonl"):
        write_report(tmp_path / "report.html", runs, title="t")
    assert not (tmp_path / "report.html").exists()


def test_a_run_without_a_step_is_a_user_error(tmp_path: Path) -> None:
    MetricsWriter(tmp_path, tensorboard=False, resume_from=0).close()
    with pytest.raises(UserError, match="no step yet"):
        write_report(tmp_path / "report.html", {"a": tmp_path}, title="t")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"report\.html' cannot be written: File exists"):
        write_report(tmp_path / "file" / "report.html", {"a": tmp_path}, title="t")


def test_a_broken_sample_file_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    newest = run / "samples" / "step_00001.jsonl"
    newest.parent.mkdir(exist_ok=True)
    newest.write_text("{")
    with pytest.raises(UserError, match=newest.name):
        write_report(tmp_path / "report.html", {"a": run}, title="t")
