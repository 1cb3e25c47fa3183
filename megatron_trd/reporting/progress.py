"""Progress of a run: a live display on a terminal, one plain line per step anywhere else."""

from __future__ import annotations

import math
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

# Parts of a step in the order they run; a part not listed here comes after these.
PHASES = ("refit", "sample", "teacher", "train")


class Progress:
    """Shows the steps of a run; a context manager.

    total: steps of the whole run; start: steps done before this process began; title: a few words, e.g. the method.
    """

    def __init__(self, total: int, *, title: str, start: int = 0) -> None:
        self._total = total
        console = Console()
        # A terminal that cannot move its cursor is treated like a file.
        live = console.is_terminal and not console.is_dumb_terminal
        self._display = _Display(console, total, title, start) if live else None

    def __enter__(self) -> Self:
        if self._display is not None:
            self._display.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._display is not None:
            self._display.stop()

    def update(self, step: int, metrics: dict[str, Any]) -> None:
        """Show a finished step (from 0) and those of its metrics that are present."""
        if self._display is not None:
            self._display.update(step + 1, metrics)
        else:
            print(plain_line(step + 1, self._total, metrics), flush=True)

    def note(self, text: str) -> None:
        """Print a line that stays, above the live display if there is one."""
        if self._display is not None:
            self._display.note(text)
        else:
            print(text, flush=True)


class _Display:
    """Bar with the time left, and under it a table of the newest step's metrics."""

    def __init__(self, console: Console, total: int, title: str, start: int) -> None:
        self._console = console
        # A step may take minutes: the time left is estimated from all steps so far, not from the last 30 seconds.
        self._bar = Bar(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left", style="dim"),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=float("inf"),
        )
        self._task: TaskID = self._bar.add_task(title, total=total, completed=start)
        self._live = Live(self._bar, console=console, refresh_per_second=4)

    def start(self) -> None:
        self._live.start()
        # Ranks end without clean-up when a job fails; a hidden cursor would outlive them.
        self._console.show_cursor(True)

    def stop(self) -> None:
        self._live.stop()

    def update(self, done: int, metrics: dict[str, Any]) -> None:
        self._bar.update(self._task, completed=done)
        self._live.update(Group(self._bar, _table(metrics)), refresh=True)

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)


def plain_line(done: int, total: int, metrics: dict[str, Any]) -> str:
    """`step 3/40  loss 0.1234  …  1.9 s (sample 0.8, teacher 0.2, train 0.8)`, without values missing in `metrics`."""
    texts = _texts(metrics, arrow="->")
    parts = [
        f"{label} {texts[label]}" for label in ("loss", "grad", "right", "len", "cut off", "drift") if label in texts
    ]
    if "time" in texts:
        parts.append(texts["time"] + (f" ({texts['parts']})" if "parts" in texts else ""))
    return "  ".join([f"step {done}/{total}", *parts])


def _table(metrics: dict[str, Any]) -> Table:
    """A label and its value per cell; times and speeds have rows of their own."""
    texts = _texts(metrics, arrow="→")

    def cell(label: str) -> Text:
        return Text.assemble((f"{label} ", "dim"), texts[label])

    numbers = Table.grid(padding=(0, 3))
    for labels in ("right", "len", "cut off", "drift"), ("loss", "grad", "lr"):
        numbers.add_row(*(cell(label) for label in labels if label in texts))
    table = Table.grid()
    table.add_row(numbers)
    if "time" in texts:
        table.add_row(Text.assemble(cell("time"), (f"  {texts.get('parts', '')}", "dim")))
    if "tokens/s" in texts:
        table.add_row(cell("tokens/s"))
    return table


def _cut_off(metrics: dict[str, Any]) -> bool:
    """Whether any response ended at its limit."""
    return any(metrics.get(f"overflow/{kind}") for kind in ("rollout", "refinement"))


def _largest(*values: float | None) -> float | None:
    """The largest value, or NaN, the worst, if it is among them; None if there is no value."""
    there = [value for value in values if value is not None]
    return max(there, key=lambda value: (math.isnan(value), value), default=None)


def _texts(metrics: dict[str, Any], arrow: str) -> dict[str, str]:
    """Label -> formatted value for every quantity in `metrics`."""
    texts = {
        "loss": _format(metrics, "loss", ".4f") if metrics.get("samples/trained") != 0 else "none, nothing to train on",
        "grad": _format(metrics, "grad_norm", ".2f"),
        "lr": _scientific(metrics.get("lr"), 1),
        "right": _before_after(metrics, "right", ".2f", arrow),
        "len": _before_after(metrics, "length", ".0f", arrow),
        "cut off": _before_after(metrics, "overflow", ".0f", arrow) if _cut_off(metrics) else "",
        "drift": _scientific(_largest(metrics.get("drift/mean"), metrics.get("drift/rollout")), 0),
        "time": f"{metrics['time/step'] + metrics.get('time/grade', 0.0):.1f} s" if "time/step" in metrics else "",
        "parts": ", ".join(f"{name} {seconds:.1f}" for name, seconds in _phases(metrics) if seconds >= 0.05),
        "tokens/s": ", ".join(
            f"{name} {metrics[f'throughput/{name}']:,.0f}"
            for name in ("sample", "train")
            if f"throughput/{name}" in metrics
        ),
    }
    return {label: text for label, text in texts.items() if text}


def _format(metrics: dict[str, Any], key: str, spec: str) -> str:
    return format(metrics[key], spec) if key in metrics else ""


def _before_after(metrics: dict[str, Any], name: str, spec: str, arrow: str) -> str:
    """The rollout's and the refinement's value; a method that does not refine has only the first."""
    values = [_format(metrics, f"{name}/{part}", spec) for part in ("rollout", "refinement")]
    return f" {arrow} ".join(filter(None, values))


def _scientific(value: float | None, digits: int) -> str:
    """`2e-6` and not `2e-06`."""
    if value is None:
        return ""
    mantissa, e, exponent = f"{value:.{digits}e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if e else mantissa


def _phases(metrics: dict[str, Any]) -> list[tuple[str, float]]:
    """Name and seconds of the parts of a step, in the order they ran."""
    names = [key.removeprefix("time/") for key in metrics if key.startswith("time/") and key != "time/step"]
    names.sort(key=lambda name: PHASES.index(name) if name in PHASES else len(PHASES))
    return [(name, metrics[f"time/{name}"]) for name in names]
