"""TRD-OPSD of Qwen3-30B-A3B, a mixture of experts, on DeepScaleR. Two 8×80 GB nodes; not a model of the paper."""

from __future__ import annotations

import dataclasses

from megatron_trd.config import TrainConfig
from recipes.common import paper_run, run_as_program


def recipe() -> TrainConfig:
    """A pipeline over two nodes, with experts over the 8 GPUs of each, for the student and its frozen copy.

    29 of its 30.5 G parameters are in the experts, 1.8 G per GPU. By the arithmetic of `paper_run`, in 1e9 bytes per
    GPU: student 35, teacher 4, an engine of 25 during sampling, 15 of which are weights, since vLLM's TP is limited by
    the 4 key/value heads, and the transfer of weights to it 3: 67 of 85; in training 44 with activations and loss. With
    `teacher.weights=live` there is no copy, and no exchange of weights in the middle of sampling.
    """
    base = paper_run("opsd_qwen3_30b_a3b", "Qwen3-30B-A3B", tp=4)
    return dataclasses.replace(
        base,
        student=dataclasses.replace(base.student, pp=2, ep=8),
        teacher=dataclasses.replace(base.teacher, pp=2, ep=8),
    )


if __name__ == "__main__":
    run_as_program(__file__)
