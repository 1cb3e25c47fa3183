"""Ours and the public losses, behind one signature for `benchmarks.loss` and `near`: mean divergence over tokens.

A rival's package is imported when its case is loaded, in the process that measures it and before memory is measured:
none is a dependency of this project, and missing ones are left out. Each is called with its defaults, as in its own
trainer; the matrix products of those that start from logits are computed here, as their trainers' models would compute
them. `benchmarks/requirements.txt` has the versions.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_trd.losses import Divergence, dense_divergence, fused_linear_divergence

# The student's hidden states and weight shard, the teacher's, and the group of the shards.
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, dist.ProcessGroup | None], Tensor]


class Case(NamedTuple):
    """One thing to measure."""

    name: str
    divergence: str
    load: Callable[[], Loss]
    top_k: int | None = None
    tail: bool = False
    package: str = "torch"
    sharded: bool = False  # works on a vocabulary sharded over ranks
    main_grad: bool = False  # adds the weight's gradient to the `main_grad` of its parameter, as Megatron does


def loaded(case: Case) -> Loss | str:
    """The loss, or in one line why this environment lacks it."""
    try:
        return case.load()
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        return "not installed" if missing == case.package else f"its import fails: no module {missing!r}"
    except (ImportError, OSError, RuntimeError) as error:  # a library or a driver that it needs
        return f"its import fails: {str(error).splitlines()[0][:120]}"


def cases(chunk_tokens: int | None) -> list[Case]:
    """All cases, ours first and with this many tokens per chunk."""
    ours: list[tuple[Divergence, int | None, bool]] = [
        ("forward_kl", None, False),
        ("reverse_kl", None, False),
        ("jsd", None, False),
        ("reverse_kl", 32, False),
        ("reverse_kl", 32, True),
    ]
    return [*(_our_case(*what, chunk_tokens) for what in ours), *_RIVALS]


def _our_case(divergence: Divergence, top_k: int | None, tail: bool, chunk_tokens: int | None) -> Case:
    def loss(
        student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, group: dist.ProcessGroup | None
    ) -> Tensor:
        weights = torch.full((len(student),), 1 / len(student), device=student.device)
        return fused_linear_divergence(
            student, weight, teacher, teacher_weight, weights,
            group=group, divergence=divergence, top_k=top_k, tail=tail, chunk_tokens=chunk_tokens,
            accumulate=True,
        ).loss  # fmt: skip

    name = f"ours {divergence}" + (f" top-{top_k}" if top_k else "") + (" and tail" if tail else "")
    return Case(name, divergence, lambda: loss, top_k, tail, sharded=True, main_grad=True)


def _plain(divergence: str) -> Loss:
    def loss(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, _: object) -> Tensor:
        logits, teacher_logits = _logits(student, weight, teacher, teacher_weight)
        return dense_divergence(logits.float(), teacher_logits.float(), divergence).mean()

    return loss


def _liger(beta: float, compiled: bool) -> Loss:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    fused = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=compiled)

    def loss(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, _: object) -> Tensor:
        labels = torch.zeros(len(student), dtype=torch.long, device=student.device)  # only marks all tokens as counted
        return fused(student, weight, teacher, teacher_weight, labels)

    return loss


def _trl_chunked(beta: float) -> Loss:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, _: object) -> Tensor:
        divergence, _ = ChunkedDivergenceFunction.apply(student, weight, None, teacher, teacher_weight, None, beta)
        return divergence.mean()

    return loss


def _trl_generalized(beta: float) -> Loss:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    def loss(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, _: object) -> Tensor:
        logits = _logits(student, weight, teacher, teacher_weight)
        return GKDTrainer.generalized_jsd_loss(*logits, beta=beta, num_items_in_batch=len(student))

    return loss


def _modelopt(reverse: bool) -> Loss:
    from megatron.core import parallel_state
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    def loss(
        student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, group: dist.ProcessGroup | None
    ) -> Tensor:
        ranks = 1 if group is None else group.size()
        if ranks > 1 and not parallel_state.model_parallel_is_initialized():  # where it takes its group from
            parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
        logits, teacher_logits = _logits(student, weight, teacher, teacher_weight, group)
        criterion = LogitsKLLoss(SimpleNamespace(tensor_model_parallel_size=ranks), reverse=reverse)
        per_token, *_ = criterion(logits.unsqueeze(1), teacher_logits.unsqueeze(1))  # [sequence, batch, vocabulary]
        return _Shown.apply(per_token.mean(), group)

    return loss


class _Shown(torch.autograd.Function):
    """A rank's part of a sum over ranks, reported as the whole, as Megatron's loss function does for its report."""

    @staticmethod
    def forward(_: object, part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        whole = part.clone()
        if group is not None:
            dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(_: object, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream, None


def _logits(
    student: Tensor,
    weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Both sides' logits; over several ranks the student's by Megatron's output layer, whose backward sums."""
    with torch.no_grad():
        teacher_logits = teacher @ teacher_weight.t()
    if group is None:
        return student @ weight.t(), teacher_logits
    from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce as linear

    return linear(student, weight, None, False, True, False, tp_group=group), teacher_logits


_RIVALS = (
    *(Case(f"plain torch {name}", name, partial(_plain, name)) for name in ("forward_kl", "jsd")),
    *(
        Case(f"Liger {name}{how}", name, partial(_liger, beta, not how), package="liger_kernel")
        for name, beta in (("forward_kl", 0.0), ("jsd", 0.5))
        for how in ("", " eager")
    ),
    *(
        Case(f"TRL chunked {name}", name, partial(_trl_chunked, beta), package="trl")
        for name, beta in (("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.5))
    ),
    *(
        Case(f"TRL generalized {name}", name, partial(_trl_generalized, beta), package="trl")
        for name, beta in (("forward_kl", 0.0), ("jsd", 0.5))
    ),
    *(
        Case(f"ModelOpt {name}", name, partial(_modelopt, reverse), package="modelopt", sharded=True)
        for name, reverse in (("forward_kl", False), ("reverse_kl", True))
    ),
)
