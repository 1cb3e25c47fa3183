"""The report of one or more runs: one self-contained HTML file, made from their folders."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from megatron_trd.errors import UserError
from megatron_trd.files import replace_text
from megatron_trd.reporting import figures, tables
from megatron_trd.reporting.metrics import HELD_OUT_FILE, METRICS_FILE, read_metrics
from megatron_trd.reporting.pairs import Pair, make_pair, newest_pairs, with_refinement
from megatron_trd.reporting.progress import PHASES

PAIRS_SHOWN = 3
HELD_OUT_SCORE = re.compile("held_out/avg@[0-9]+")


@dataclass(frozen=True)
class RunData:
    """Data of a run folder that the report uses. colour: CSS variable of its curves; config: text of config.yaml."""

    name: str
    colour: str
    rows: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    config: str | None

    @property
    def times(self) -> tables.Times:
        return tables.times(self.rows)

    @property
    def use(self) -> tables.Use:
        return tables.use(self.rows)


@dataclass(frozen=True)
class Panel:
    """A titled figure."""

    title: str
    caption: str
    svg: Markup


@dataclass(frozen=True)
class _Plot:
    """A panel of curves: the first metric is solid, the second dashed."""

    title: str
    caption: str
    keys: tuple[str, ...]
    scale: figures.Scale = "linear"


_PLOTS = (
    _Plot("Divergence", "mean over response tokens, nats", ("divergence/mean",)),
    _Plot("Right answers", "share of the step’s trajectories", ("right/rollout", "right/refinement"), "fraction"),
    _Plot("Length", "mean tokens of a trajectory", ("length/rollout", "length/refinement")),
    _Plot("Gradient norm", "before clipping", ("grad_norm",)),
    _Plot("Drift", "mean |Δ log p| of sampler and trainer, nats", ("drift/mean", "drift/rollout"), "log"),
)


def report_runs(run_dirs: Sequence[Path]) -> Path:
    """Write `report.html` of a run into its folder, or of several into the folder that holds them; returns its path.

    Raises `UserError` as `write_report` does.
    """
    if len(run_dirs) == 1:
        [folder], name = run_dirs, run_dirs[0].resolve().name
        runs = {name: folder}
    else:
        folder = Path(os.path.commonpath([path.resolve().parent for path in run_dirs]))
        name = folder.name
        runs = {str(path.resolve().relative_to(folder)): path for path in run_dirs}  # unlike their names, all differ
    path = folder / "report.html"
    write_report(path, runs, title=name)
    return path


def write_report(
    path: Path,
    runs: dict[str, Path],
    *,
    title: str,
    scores: dict[str, Any] | None = None,
    pairs: list[dict[str, Any]] | None = None,
) -> None:
    """Write the report of `runs` (name -> run folder; the first has the accent colour) to `path`.

    scores: content of an evaluation's `summary.json`:
        {"task", "samples", "problems", "seeds", "results": {model: {"avg@k": {"value", "low", "high"}, "pass@k": …,
        "seconds", "train_seconds"}}} with k = samples, values in [0, 1], and the model before training named "base".
    pairs: y_o / y_r pairs as `samples/` holds them, each with `first_wrong_line`, the index (from 0) of the rollout's
        first wrong line, or None. Without them, those of the first run's last step.

    Raises `UserError` if a run folder has no metrics, or the report cannot be written.
    """
    colours = _colours(list(runs), list(scores["results"]) if scores else [])
    loaded = [_load(name, folder, colours[name]) for name, folder in runs.items()]
    if pairs is None:
        pairs = newest_pairs(next(iter(runs.values())))
    table = tables.scores_table(scores, colours) if scores else []
    window = max(1, round(max(len(run.rows) for run in loaded) / 12))  # steps averaged for a smoothed curve
    template = _environment().get_template("report.html.j2")
    html = template.render(
        title=title,
        runs=loaded,
        scores=scores,
        table=table,
        score_panels=_score_panels(scores["samples"], table) if scores else [],
        curve_panels=[*_held_out_panels(loaded), *_curve_panels(loaded, window)],
        window=window,
        refines=any("length/refinement" in row for run in loaded for row in run.rows),
        pairs=_pairs(pairs),
        parts=[*PHASES, "rest"],
        time_figure=figures.stacked([run.name for run in loaded], [run.times.parts for run in loaded]),
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, html)
    except OSError as error:
        raise UserError(f"'{path}' cannot be written: {error.strerror}") from None


def _load(name: str, folder: Path, colour: str) -> RunData:
    rows = read_metrics(folder)
    if not rows:
        raise UserError(f"{folder}: {METRICS_FILE} has no step yet; a report needs one")
    held_out = read_metrics(folder, HELD_OUT_FILE) if (folder / HELD_OUT_FILE).is_file() else []
    config = folder / "config.yaml"
    return RunData(name, colour, rows, held_out, config.read_text(encoding="utf-8") if config.is_file() else None)


def _colours(runs: Sequence[str], models: Sequence[str]) -> dict[str, str]:
    """CSS variable of each run and model: one name has one colour throughout, and the base has none."""
    names = dict.fromkeys([*runs, *(model for model in models if model != "base")])
    series = {name: f"series-{index % figures.SERIES_COLOURS}" for index, name in enumerate(names)}
    return {"base": "base"} | series


def _score_panels(samples: int, table: Sequence[tables.Score]) -> list[Panel]:
    return [
        Panel(f"avg@{samples}", "mean share of right responses", figures.bars([score.avg for score in table])),
        Panel(f"pass@{samples}", "problems with a right response", figures.bars([score.passed for score in table])),
    ]


def _held_out_panels(runs: Sequence[RunData]) -> list[Panel]:
    """avg@k on the held-out problems over steps, for runs that were evaluated on some."""
    lines = []
    for run in runs:
        points = [(row["step"], row[key]) for row in run.held_out for key in row if HELD_OUT_SCORE.fullmatch(key)]
        if points:
            steps, values = zip(*points, strict=True)
            lines.append(figures.Curve(run.colour, steps, values))
    caption = "mean share of right responses"
    return [Panel("Held-out problems", caption, figures.curves(lines, "fraction", 1))] if lines else []


def _curve_panels(runs: Sequence[RunData], window: int) -> list[Panel]:
    """The plots whose metric at least one run has."""
    panels = []
    for plot in _PLOTS:
        curves = [
            figures.Curve(run.colour, [row["step"] for row in rows], tables.column(rows, key), dashed=index > 0)
            for run in runs
            for index, key in enumerate(plot.keys)
            if (rows := [row for row in run.rows if key in row])
        ]
        if curves:
            panels.append(Panel(plot.title, plot.caption, figures.curves(curves, plot.scale, window)))
    return panels


def _pairs(pairs: list[dict[str, Any]]) -> list[Pair]:
    return [make_pair(pair) for pair in with_refinement(pairs)[:PAIRS_SHOWN]]


def _environment() -> Environment:
    """Templates of this folder. Everything is escaped: text from a model may contain any markup."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda value: f"{100 * value:.1f}"
    environment.filters["points"] = lambda value: f"{100 * value:+.1f}".replace("-", "−")
    environment.filters["number"] = lambda value, digits=0: "–" if value is None else f"{value:,.{digits}f}"
    return environment
