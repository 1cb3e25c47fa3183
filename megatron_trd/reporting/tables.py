"""Numbers for the report's tables, from the rows of `metrics.jsonl` and the scores of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from megatron_trd.reporting.figures import Interval
from megatron_trd.reporting.progress import PHASES

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Score:
    """avg@k and pass@k of one model. `*_gain` is the difference from the base, None for the base itself."""

    avg: Interval
    passed: Interval
    avg_gain: float | None
    passed_gain: float | None
    train_seconds: float | None
    seconds: float | None  # of the evaluation


@dataclass(frozen=True)
class Times:
    """Mean seconds per step: for each of `PHASES`, for the rest, and for the whole step."""

    parts: list[float]
    step: float


@dataclass(frozen=True)
class Use:
    """Peak memory in GiB, median tokens/s of sampling and of training, and the run's size."""

    device_gib: float | None
    host_gib: float | None
    phase_gib: list[float | None]  # peak in each of `PHASES`: of the device if there is one, else of the host
    sample: float | None
    train: float | None
    tokens: int  # response tokens trained on
    steps: int
    minutes: float


def scores_table(scores: dict[str, Any], colours: dict[str, str]) -> list[Score]:
    """Scores in the order of `results`, the base first. colours: model -> CSS variable of its bars."""
    samples, results = scores["samples"], scores["results"]
    names = sorted(results, key=lambda name: name != "base")

    def interval(name: str, measure: str) -> Interval:
        value = results[name][f"{measure}@{samples}"]
        return Interval(name, colours[name], value["value"], value["low"], value["high"])

    def gain(name: str, measure: str) -> float | None:
        key = f"{measure}@{samples}"
        return None if name == "base" else results[name][key]["value"] - results["base"][key]["value"]

    return [
        Score(
            interval(name, "avg"),
            interval(name, "pass"),
            gain(name, "avg"),
            gain(name, "pass"),
            results[name].get("train_seconds"),
            results[name].get("seconds"),
        )
        for name in names
    ]


def times(rows: Rows) -> Times:
    """Where a step's time went, on average over the run."""
    parts = [_mean(rows, f"time/{part}") for part in PHASES]
    step = max(_mean(rows, "time/step"), sum(parts))
    return Times([*parts, step - sum(parts)], step)


def use(rows: Rows) -> Use:
    """Memory and throughput of a run."""
    kind = "device" if column(rows, "memory/device_gib") else "host"
    return Use(
        device_gib=max(column(rows, "memory/device_gib"), default=None),
        host_gib=max(column(rows, "memory/host_gib"), default=None),
        phase_gib=[max(column(rows, f"memory/{part}/{kind}_gib"), default=None) for part in PHASES],
        sample=_median(rows, "throughput/sample"),
        train=_median(rows, "throughput/train"),
        tokens=int(sum(column(rows, "tokens/trained"))),
        steps=len(rows),
        minutes=sum(column(rows, "time/step")) / 60,
    )


def column(rows: Rows, key: str) -> list[float]:
    """Values of a metric in the steps that have it."""
    return [row[key] for row in rows if key in row]


def _mean(rows: Rows, key: str) -> float:
    """Mean over all steps; a step that skipped a part took no time for it."""
    return sum(column(rows, key)) / len(rows)


def _median(rows: Rows, key: str) -> float | None:
    values = column(rows, key)
    return median(values) if values else None
