"""TRD-OPSD of Qwen3-30B-A3B, a mixture of experts, on DeepScaleR. Two 8×80 GB nodes; not a model of the paper."""

from __future__ import annotations

import dataclasses

from megatron_trd.config import SamplerConfig, TeacherConfig, TrainConfig
from recipes.common import paper_run, run_as_program


def recipe() -> TrainConfig:
    """A pipeline of two nodes, experts over the 8 GPUs of each; the student as it is teaches itself.

    29 of its 30.5 G parameters are in the experts, 1.8 G a GPU. By the arithmetic of `paper_run`, 1e9 bytes a GPU:
    student 35, activations and loss 5, one engine of 25, of which 15 are weights, since vLLM's TP is limited by the 4
    key/value heads: 65 of 85. The paper's frozen teacher takes a copy and an engine of its own, and with them four
    nodes: teacher.weights=frozen teacher.tp=4 teacher.pp=2 teacher.ep=8 sampler.memory_fraction=0.25
    """
    base = paper_run("opsd_qwen3_30b_a3b", "Qwen3-30B-A3B", tp=4)
    return dataclasses.replace(
        base,
        student=dataclasses.replace(base.student, pp=2, ep=8),
        teacher=TeacherConfig(weights="live"),
        sampler=SamplerConfig(tp=4),
    )


if __name__ == "__main__":
    run_as_program(__file__)
