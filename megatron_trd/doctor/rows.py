"""Outcomes of checks, their merging over nodes into one table, and the verdict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

Verdict = Literal["ok", "warning", "fails"]

_VERDICTS: tuple[Verdict, ...] = ("ok", "warning", "fails")
_STYLES = {"ok": "green", "warning": "yellow", "fails": "bold red"}


@dataclass(frozen=True)
class Row:
    """One check of one node or rank."""

    check: str
    found: str
    needed: str
    verdict: Verdict = "ok"
    says: str = ""  # of a row that is not ok: what is wrong and how to fix it, in one line
    value: float | None = None  # the measured value, if it is a number: the lowest of several nodes is shown
    alike: bool = False  # must be the same on all nodes


@dataclass(frozen=True)
class Line:
    """A row of the table: a result that some nodes have in common."""

    nodes: list[str]
    row: Row


def merge(rows: Iterable[tuple[str, Row]]) -> list[Line]:
    """(node, row) of every node -> lines in the order of the checks."""
    checks: dict[str, list[tuple[str, Row]]] = {}
    for node, row in rows:
        checks.setdefault(row.check, []).append((node, row))
    return [line for found in checks.values() for line in _merge_check(found)]


def _merge_check(rows: Sequence[tuple[str, Row]]) -> list[Line]:
    groups: dict[tuple[Verdict, str, str], list[tuple[str, Row]]] = {}
    for node, row in rows:
        said = (row.found, row.says) if row.value is None else ("", "")
        groups.setdefault((row.verdict, *said), []).append((node, row))
    lines = [
        Line(sorted({node for node, _ in group}), min((row for _, row in group), key=lambda row: row.value or 0.0))
        for group in groups.values()
    ]
    lines.sort(key=lambda line: _VERDICTS.index(line.row.verdict))
    return [*lines, *_difference([line for line in lines if line.row.verdict == "ok" and line.row.alike])]


def _difference(fine: Sequence[Line]) -> list[Line]:
    """A failing line if nodes that each pass differ in something that must be the same for the whole job."""
    if len(fine) < 2:
        return []
    check = fine[0].row.check
    nodes = sorted({node for line in fine for node in line.nodes})
    found = "; ".join(f"{line.row.found} on {', '.join(line.nodes)}" for line in fine)
    says = f"{check} differs between nodes: {found}: give all nodes one environment"
    return [Line(nodes, Row(check, f"{len(fine)} different", "one for all nodes", "fails", says))]


def show(lines: Sequence[Line], ranks: int) -> int:
    """Print the table, the problems and the verdict; returns the exit code."""
    nodes = sorted({node for line in lines for node in line.nodes})
    title = f"{len(nodes)} node{'s' if len(nodes) > 1 else ''}, {ranks} rank{'s' if ranks > 1 else ''}"
    columns = ["check", "found", "needed", "verdict", *(["nodes"] if len(nodes) > 1 else [])]
    table = Table(*columns, title=title, title_justify="left")
    for line in lines:
        row = line.row
        where = "all" if len(line.nodes) == len(nodes) else ", ".join(line.nodes)
        cells = [Text(row.check), Text(row.found), Text(row.needed), Text(row.verdict, _STYLES[row.verdict])]
        table.add_row(*cells, *([where] if len(nodes) > 1 else []))
    console = Console()
    console.print(table)
    count = dict.fromkeys(_VERDICTS, 0)
    for line in lines:
        count[line.row.verdict] += 1
        if line.row.verdict != "ok":
            where = f" on {', '.join(line.nodes)}" if len(nodes) > 1 else ""
            console.print(Text(f"{line.row.verdict}{where}: {line.row.says}"), soft_wrap=True)
    warnings = f", {count['warning']} warning{'s' if count['warning'] > 1 else ''}" if count["warning"] else ""
    if count["fails"]:
        console.print(f"not ready: {count['fails']} of {len(lines)} checks failed{warnings}")
        return 1
    console.print(f"ready: {len(lines)} checks{warnings}")
    return 0
