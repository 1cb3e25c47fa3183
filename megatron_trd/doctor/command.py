"""Implementation of `megatron-trd doctor`: it starts its own ranks, or is one of those of torchrun or srun."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from torch.distributed import DistError

from megatron_trd import platform
from megatron_trd.config import TrainConfig
from megatron_trd.doctor.network import CHECK, Place, node_name, survey
from megatron_trd.doctor.node import Task, gpu_rows, node_rows
from megatron_trd.doctor.rows import Row, merge, show
from megatron_trd.doctor.waiting import first_line
from megatron_trd.errors import JobFailed, UserError
from megatron_trd.launch import launch

_RANKS_ON_A_CPU = 2  # the fewest with a network between them


def run_doctor(config: TrainConfig | None, *, ranks: int | None, quick: bool, seconds: int) -> int:
    """Run and print the checks; returns the exit code: 0 if nothing fails, else 1.

    seconds: how long a rank, a file system or a data set may take to answer. Raises `UserError` for bad arguments.
    """
    if "RANK" in os.environ:
        if ranks is not None:
            raise UserError(
                "--ranks is for a machine on its own; here RANK and WORLD_SIZE are set already: leave it out"
            )
        _end(_one_of_many(config, quick, seconds))
    ranks = ranks or platform.current().gpu_count() or _RANKS_ON_A_CPU
    rows = node_rows(Task(config, nodes=1, ranks=ranks, quick=quick, seconds=seconds))
    rows += _local_ranks(ranks, quick, seconds)
    return show(merge((node_name(), row) for row in rows), ranks)


def _one_of_many(config: TrainConfig | None, quick: bool, seconds: int) -> int:
    """One rank's part. Rank 0 returns the verdict; another rank fails only if it cannot reach rank 0."""
    place = Place.from_environment()
    if config is not None and config.world_size is None:
        config = dataclasses.replace(config, world_size=place.world)
    task = Task(config, nodes=place.nodes, ranks=place.world, quick=quick, seconds=seconds)
    first_of_node = place.local_rank == 0

    def own() -> list[Row]:
        return [*(node_rows(task) if first_of_node else []), *gpu_rows(place.local_rank, place.local_world)]

    try:
        rows = survey(place, quick, seconds, own)
    except DistError as error:
        if first_of_node:
            says = f"rank {place.rank} cannot reach rank 0 at {os.environ['MASTER_ADDR']}: {first_line(error)}"
            lost = Row(CHECK, "no rank 0", "every rank", "fails", says)
            show(merge((place.node, row) for row in [*own(), lost]), place.world)
        return 1
    return show(merge(rows), place.world) if place.rank == 0 else 0


def _local_ranks(ranks: int, quick: bool, seconds: int) -> list[Row]:
    """Rows for the network between `ranks` processes of this machine, and for their GPUs."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="doctor-"))
        found = folder / "rows.json"
        arguments = ["-m", "megatron_trd.doctor.worker", str(found), str(seconds), *(["--quick"] if quick else [])]
        launch(arguments, ranks, folder / "logs")
    except (JobFailed, OSError) as error:
        return [Row(CHECK, "not measured", f"{ranks} ranks", "fails", f"local ranks cannot run: {error}")]
    if not found.exists():
        raise UserError("stopped before the ranks had answered")
    rows = [Row(**row) for row in json.loads(found.read_text())]
    shutil.rmtree(folder)
    return rows


def _end(code: int) -> NoReturn:
    """End this rank without exit handlers: those would wait for collectives that hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
