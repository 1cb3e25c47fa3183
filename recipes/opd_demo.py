"""TRD-OPD on the embedded world: a larger teacher that sees no reference solution."""

from __future__ import annotations

import dataclasses

from megatron_trd.config import TrainConfig
from megatron_trd.demo import TEACHER
from recipes import opsd_demo
from recipes.common import run_as_program


def recipe() -> TrainConfig:
    """As `opsd_demo`, with a teacher of another width and depth."""
    base = opsd_demo.recipe()
    teacher = dataclasses.replace(base.teacher, model=str(TEACHER))
    return dataclasses.replace(base, method="trd-opd", run_dir="runs/opd_demo", teacher=teacher)


if __name__ == "__main__":
    run_as_program(__file__)
