"""TRD-OPSD on the embedded world: the model and problems that ship with the package. Runs anywhere in minutes."""

from __future__ import annotations

from megatron_trd.config import (
    DataConfig,
    LogConfig,
    OptimizerConfig,
    SamplerConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from megatron_trd.demo import STUDENT, TRAIN_PROBLEMS
from recipes.common import run_as_program


def recipe() -> TrainConfig:
    """Student over two tensor-parallel ranks, a frozen self-teacher and a sampler on each."""
    return TrainConfig(
        model=str(STUDENT),
        run_dir="runs/opsd_demo",
        steps=20,
        batch_size=32,
        student=StudentConfig(tp=2, micro_batch_size=16),
        teacher=TeacherConfig(micro_batch_size=16),
        # Longest solution: 6 operations, 59 tokens. The paper's sampling temperature, 1.0, is the default.
        sampler=SamplerConfig(max_rollout_tokens=80, max_refinement_tokens=80),
        data=DataConfig(path=str(TRAIN_PROBLEMS), max_prompt_tokens=64, max_reference_tokens=64),
        # Full fine-tuning of a model with less than a million parameters needs a larger rate than the paper's 5e-6.
        optimizer=OptimizerConfig(lr=1e-4, schedule="constant"),
        log=LogConfig(samples_per_step=16),
    )


if __name__ == "__main__":
    run_as_program(__file__)
