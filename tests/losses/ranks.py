"""What each rank of a tensor-parallel group does in the tests of the losses.

Imports neither pytest nor hypothesis: every rank imports this module, and they take a second each.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_trd.losses import fused_linear_divergence, vocab_parallel_divergence, vocab_parallel_log_prob
from tests.losses.reference import Case, Outcome, heads, logits, shard

Group = dist.ProcessGroup | None
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where the losses run; the reference is on a CPU


class LogProbs(NamedTuple):
    """Inputs of `vocab_parallel_log_prob`, whole vocabulary."""

    hidden: Tensor
    weight: Tensor
    token_ids: Tensor


def fused(rank: int, ranks: int, cases: list[Case], group: Group = None) -> list[Outcome]:
    """`fused_linear_divergence` of each case on this rank's shard."""
    return [_fused(rank, ranks, case, _world(ranks, group)) for case in cases]


def _fused(rank: int, ranks: int, case: Case, group: Group) -> Outcome:
    width = case.columns(ranks)
    hidden, weight, teacher_hidden, teacher_weight, token_weights = (tensor.to(DEVICE) for tensor in heads(case))
    weight, teacher_weight = (shard(whole, rank, ranks, width) for whole in (weight, teacher_weight))
    trained = {"student_hidden": hidden, "student_weight": weight, "token_weights": token_weights}
    result = fused_linear_divergence(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        teacher_hidden,
        teacher_weight,
        token_weights.requires_grad_(),
        group=group,
        vocab_size=case.vocabulary,
        chunk_tokens=case.chunk_tokens,
        **case.objective(),
    )
    gradients = torch.autograd.grad(result.loss, list(trained.values()))
    return _outcome(result.per_token, result.loss, dict(zip(trained, gradients, strict=True)))


def on_logits(rank: int, ranks: int, cases: list[Case], group: Group = None) -> list[Outcome]:
    """`vocab_parallel_divergence` of each case on this rank's shard."""
    return [_on_logits(rank, ranks, case, _world(ranks, group)) for case in cases]


def _on_logits(rank: int, ranks: int, case: Case, group: Group) -> Outcome:
    width = case.columns(ranks)
    student, teacher, upstream = (tensor.to(DEVICE) for tensor in logits(case))
    student, teacher = (shard(whole, rank, ranks, width, dim=1) for whole in (student, teacher))
    student.requires_grad_()
    objective = case.objective()
    per_token = vocab_parallel_divergence(student, teacher, group=group, vocab_size=case.vocabulary, **objective)
    loss = (per_token * upstream).sum()
    (gradient,) = torch.autograd.grad(loss, student)
    return _outcome(per_token, loss, {"student_logits": gradient})


def _outcome(per_token: Tensor, loss: Tensor, gradients: dict[str, Tensor]) -> Outcome:
    on_host = {name: gradient.cpu() for name, gradient in gradients.items()}
    return Outcome(per_token.detach().cpu(), loss.detach().cpu(), on_host)


def log_prob_inputs(case: Case) -> LogProbs:
    """The student's side of the case, its logits moved by `offset`; ids at both ends of the vocabulary and outside."""
    hidden, weight, *_ = heads(case)
    ids = torch.arange(case.tokens) * 7 % case.vocabulary
    ids[:4] = torch.tensor([0, case.vocabulary - 1, case.vocabulary, -1])[: case.tokens]
    constant = torch.ones(case.tokens, 1, dtype=case.dtype)
    moved = torch.full((case.vocabulary, 1), case.offset, dtype=case.dtype)
    return LogProbs(torch.cat([hidden, constant], dim=1), torch.cat([weight, moved], dim=1), ids)


def log_probs(rank: int, ranks: int, cases: list[Case]) -> list[Tensor]:
    """`vocab_parallel_log_prob` of each case on this rank's shard."""
    found = []
    for case in cases:
        hidden, weight, ids = (tensor.to(DEVICE) for tensor in log_prob_inputs(case))
        log_prob = vocab_parallel_log_prob(
            hidden,
            shard(weight, rank, ranks, case.columns(ranks)),
            ids,
            group=_world(ranks, None),
            temperature=case.temperature,
            vocab_size=case.vocabulary,
            chunk_tokens=case.chunk_tokens,
        )
        found.append(log_prob.cpu())
    return found


def moved_columns(rank: int, ranks: int, cases: list[Case]) -> list[Tensor]:
    """Which columns of this rank's shard some token's gradient moves, under a teacher without preferences."""
    found = []
    for case in cases:
        whole = logits(case).student.to(DEVICE)
        student = shard(whole, rank, ranks, case.columns(ranks), dim=1).requires_grad_()
        per_token = vocab_parallel_divergence(
            student, torch.zeros_like(student), group=_world(ranks, None), vocab_size=case.vocabulary, top_k=case.top_k
        )
        (gradient,) = torch.autograd.grad(per_token.sum(), student)
        found.append(gradient.ne(0).any(dim=0).cpu())
    return found


def in_pairs(rank: int, ranks: int, cases: list[Case]) -> list[Outcome]:
    """Two groups of two, each with a case of its own, as under data parallelism."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    return fused(rank % 2, 2, [cases[rank // 2]], groups[rank // 2])


class Memory(NamedTuple):
    """Bytes allocated beyond the inputs: at most at any time during a call, and still when it returned."""

    peak: int
    left: int


def memory(rank: int, ranks: int, calls: list[dict[str, Any]]) -> list[Memory]:
    """What `fused_linear_divergence` allocates on this rank with each set of sizes and options."""
    return [_memory(rank, ranks, **call) for call in calls]


def _memory(rank: int, ranks: int, *, tokens: int, vocabulary: int, hidden: int, **options: Any) -> Memory:
    width = vocabulary // ranks
    student = (torch.randn(tokens, hidden, requires_grad=True), torch.randn(width, hidden, requires_grad=True))
    teacher = (torch.randn(tokens, hidden), torch.randn(width, hidden))
    weights, group = torch.ones(tokens), _world(ranks, None)
    return allocated(lambda: fused_linear_divergence(*student, *teacher, weights, group=group, **options))


def allocated(call: Callable[[], Any]) -> Memory:
    """What the CPU allocator did during `call`, scratch of the matrix library included, as the profiler saw it."""
    # Blocks have a fixed size, far below that of a real chunk; a test's chunk would be one block, and double the peak.
    small_blocks = mock.patch("megatron_trd.losses.torch_kernels.HOST_BLOCK_BYTES", 1)
    with small_blocks, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    del result  # until here, so that what it holds counts as left
    now = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return Memory(peak, now)


def _world(ranks: int, group: Group) -> Group:
    return group if group is not None or ranks == 1 else dist.group.WORLD
