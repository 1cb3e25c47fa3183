"""The passes over the columns of a chunk of rows, and the choice of backend: torch on a CPU, Triton on a GPU."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from megatron_trd.losses.objective import Objective


class Kernels(ABC):
    """The three passes over one chunk of logits, `[rows, columns]` of student and teacher, which they may overwrite.

    x and y denote a rank's shifted logits (each row minus its maximum over this rank's columns).
    """

    def __init__(self, student: Tensor, teacher: Tensor, objective: Objective) -> None:
        self.student, self.teacher, self.objective = student, teacher, objective

    @abstractmethod
    def statistics(self) -> Tensor:
        """`[5, rows]`: maximum and sum of e^x of the student, of the teacher, and this rank's share of a KL: sum of
        e^y (y - x) for `forward_kl`, of e^x (x - y) for `reverse_kl`, 0 for `jsd`."""

    @abstractmethod
    def mixture(self, log_s: Tensor, log_t: Tensor) -> Tensor:
        """`[2, rows]`: this rank's shares of KL(t || m) and KL(s || m), log s = x + `log_s`, log t = y + `log_t`."""

    @abstractmethod
    def gradient(self, factor: Tensor, other: Tensor, out: Tensor) -> None:
        """Write the gradient of the student's logits into `out`, `[rows, columns]`, which may be those logits:
        `forward_kl` factor e^x - other e^y; `reverse_kl` factor e^x (x - y + other); `jsd`, after `mixture`, factor s
        (log s - log m + other)."""


def kernels_for(student: Tensor, teacher: Tensor, objective: Objective) -> Kernels:
    """Triton kernels for float32 logits on a GPU with at least one column, torch kernels otherwise."""
    from megatron_trd.losses.torch_kernels import TorchKernels

    if student.is_cuda and student.dtype == torch.float32 and student.shape[1] > 0:
        from megatron_trd.losses.triton_kernels import TritonKernels

        return TritonKernels(student, teacher, objective)
    return TorchKernels(student, teacher, objective)
