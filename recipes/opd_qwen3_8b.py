"""TRD-OPD of Qwen3-8B on DeepScaleR with Qwen3-32B as the teacher. One 8×80 GB node; the paper says "8B or larger"."""

from __future__ import annotations

import dataclasses

from megatron_trd.config import TeacherConfig, TrainConfig
from recipes import opsd_qwen3_8b
from recipes.common import OF_TWO_ENGINES, run_as_program


def recipe() -> TrainConfig:
    """As `opsd_qwen3_8b`, with everything at TP 8.

    By the arithmetic of `paper_run`, in 1e9 bytes per GPU: student 18, teacher 8, activations, hidden states and loss
    9, two engines of 17: 69 of 85. The teacher's engine then has room for keys and values of 200,000 tokens for 16
    problems, and vLLM queues the rest: a second node halves the problems per engine.
    """
    base = opsd_qwen3_8b.recipe()
    return dataclasses.replace(
        base,
        method="trd-opd",
        run_dir="runs/opd_qwen3_8b",
        student=dataclasses.replace(base.student, tp=8),
        teacher=TeacherConfig(model="models/Qwen3-32B", tp=8),
        sampler=dataclasses.replace(base.sampler, tp=8, memory_fraction=OF_TWO_ENGINES),
    )


if __name__ == "__main__":
    run_as_program(__file__)
