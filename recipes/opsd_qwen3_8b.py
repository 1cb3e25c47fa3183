"""TRD-OPSD of Qwen3-8B on DeepScaleR, one of the paper's students. One 8×80 GB node."""

from __future__ import annotations

from megatron_trd.config import TrainConfig
from recipes.common import paper_run, run_as_program


def recipe() -> TrainConfig:
    """The student teaches itself: its frozen weights, shown the reference solution, correct the rollouts."""
    return paper_run("opsd_qwen3_8b", "Qwen3-8B", tp=4)


if __name__ == "__main__":
    run_as_program(__file__)
