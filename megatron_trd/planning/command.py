"""Implementation of `megatron-trd plan`: forecast a recipe and other layouts of it, and print both."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_trd.config import TrainConfig
from megatron_trd.planning import tables
from megatron_trd.planning.case import make_case
from megatron_trd.planning.devices import find_cluster
from megatron_trd.planning.forecast import forecast
from megatron_trd.planning.search import alternatives
from megatron_trd.planning.workload import mean_lengths

_PLAIN_WIDTH = 240  # of a file or a pipe, where no line should be folded


def run_plan(
    name: str, config: TrainConfig, *, gpu: str, nodes: int, gpus_per_node: int, mean_response: int | None
) -> bool:
    """Print the forecast of a recipe; returns whether it fits. Raises `UserError` for bad input."""
    case = make_case(config, find_cluster(gpu, nodes, gpus_per_node), mean_lengths(config, mean_response))
    recipe, found = forecast(case), alternatives(case)
    printer = _Printer()
    for line in tables.headline(name, case):
        printer.text(line)
    printer.table(tables.memory_table(recipe))
    printer.text(tables.verdict(recipe))
    printer.table(tables.time_table(recipe))
    printer.text(tables.throughput(recipe))
    printer.table(tables.layouts_table(recipe, found))
    printer.text(tables.advice(config, recipe, found))
    if found.too_large:
        printer.table(tables.too_large_table(found))
    return recipe.fits


class _Printer:
    """Prints tables and lines on a terminal, and the same as Markdown anywhere else."""

    def __init__(self) -> None:
        self._console = Console()
        self._plain = not self._console.is_terminal
        if self._plain:
            self._console = Console(width=_PLAIN_WIDTH)

    def text(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def table(self, table: Table) -> None:
        if self._plain:
            table.box = box.MARKDOWN
        with self._console.capture() as captured:
            self._console.print(table, markup=False, highlight=False)
        lines = [line.rstrip() for line in captured.get().splitlines()]
        self._console.file.write("\n" + "\n".join(line for line in lines if line) + "\n\n")
