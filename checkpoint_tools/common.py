"""Code shared by the commands: options, the progress bar, the mapping table, and one-line errors."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from megatron_trd.errors import UserError, in_one_line
from megatron_trd.models.architecture import Architecture
from megatron_trd.models.weights import Slot, exported_slots

_DTYPES = {"fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}

DtypeOption = Annotated[str | None, typer.Option("--dtype", help="fp32 or bf16; left out: as stored")]
ForceOption = Annotated[bool, typer.Option("--force", help="replace the output if it exists")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="check, print the mapping, write nothing")]


def run(command: Callable[..., None], program: str) -> None:
    """Run one command as a program of its own."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    in_one_line(app, program)


def tools() -> typer.Typer:
    """All commands, for `megatron-trd convert`."""
    from checkpoint_tools import hf_to_megatron, megatron_to_hf, verify

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
    for module in (hf_to_megatron, megatron_to_hf, verify):
        app.command(module.__name__.rpartition(".")[2].replace("_", "-"))(module.command)
    return app


def parse_dtype(name: str | None) -> torch.dtype | None:
    """Dtype by name. Raises `UserError` for an unknown name."""
    if name is not None and name not in _DTYPES:
        raise UserError(f"--dtype {name} is not known; use one of {', '.join(_DTYPES)}")
    return None if name is None else _DTYPES[name]


def check_places(out: Path, *sources: Path | None) -> None:
    """Raise `UserError` for an output that is an input, is inside one, or contains one."""
    out = out.resolve()
    for source in (source.resolve() for source in sources if source is not None):
        if source == out or source in out.parents or out in source.parents:
            raise UserError(f"the output '{out}' and the input '{source}' overlap; give a folder apart from it")


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar of bytes with speed and remaining time on stderr; yields a function that advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)


@contextlib.contextmanager
def summary(out: Path, tensors: int, size: int) -> Iterator[None]:
    """Print what was written, how much, and how fast."""
    begin = time.perf_counter()
    yield
    seconds = time.perf_counter() - begin
    print(f"{out}: {tensors} tensors, {decimal(size)} in {seconds:.1f} s ({decimal(int(size / seconds))}/s)")


def pattern(name: str) -> str:
    """A tensor's name without layer and expert indices."""
    return re.sub(r"\.\d+\.", ".*.", name)


def print_mapping(arch: Architecture, dtype: Callable[[Slot], torch.dtype]) -> None:
    """Print the mapping of a model, one row for each kind of tensor, with shapes, counts and sizes."""
    table = Table(title=f"{arch.family}, {arch.layers} layers", title_justify="left")
    for column in ("Hugging Face", "shape", "Megatron", "stacked shape", "layout", "dtype"):
        table.add_column(column, overflow="fold")
    table.add_column("tensors", justify="right")
    table.add_column("size", justify="right")
    exported = exported_slots(arch)
    count = Counter(slot.key for slot in exported)
    total = 0
    for slot in reversed({slot.key: slot for slot in reversed(exported)}.values()):
        size = slot.size * dtype(slot).itemsize * count[slot.key]
        total += size
        table.add_row(
            "\n".join(pattern(name) for name in slot.hf),
            "\n".join(str(list(shape)) for shape in slot.shapes),
            slot.key,
            str([*slot.stack, *slot.whole]),
            slot.kind,
            str(dtype(slot)).removeprefix("torch."),
            str(count[slot.key] * len(slot.hf)),
            decimal(size),
        )
    width = None if sys.stdout.isatty() else 200  # a file has no width of its own
    Console(width=width).print(table, f"{sum(len(slot.hf) for slot in exported)} tensors, {decimal(total)}")
