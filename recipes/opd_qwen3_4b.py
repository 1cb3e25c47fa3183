"""TRD-OPD of Qwen3-4B-Instruct-2507 on DeepScaleR with Qwen3-8B as the teacher, as in the paper. One 8×80 GB node."""

from __future__ import annotations

import dataclasses

from megatron_trd.config import TeacherConfig, TrainConfig
from recipes import opsd_qwen3_4b
from recipes.common import OF_TWO_ENGINES, run_as_program


def recipe() -> TrainConfig:
    """As `opsd_qwen3_4b`, with a teacher that sees no reference; TP 4 for all engines with its 8 G parameters."""
    base = opsd_qwen3_4b.recipe()
    return dataclasses.replace(
        base,
        method="trd-opd",
        run_dir="runs/opd_qwen3_4b",
        teacher=TeacherConfig(model="models/Qwen3-8B", tp=4),
        sampler=dataclasses.replace(base.sampler, tp=4, memory_fraction=OF_TWO_ENGINES),
    )


if __name__ == "__main__":
    run_as_program(__file__)
