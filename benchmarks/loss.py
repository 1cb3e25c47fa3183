"""Time and memory of the fused loss, against its floor and against plain torch.

    python -m benchmarks.loss --tokens 2048 --hidden 1024 --vocab 151936 --tp 1 --write benchmarks/results/loss_cpu.md

The floor is the four products no head can do without (student logits, teacher logits, gradients of hidden states and
of weight), whole, into buffers already touched. Plain torch is `dense_divergence` on whole logits with autograd. Each
case runs in fresh processes, one a tensor-parallel rank; time is the best of `--repeats` on the slowest rank, memory
the growth of a rank's resident set over one that holds the inputs (its own high-water mark, so gradients are included).
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_trd.losses import dense_divergence, fused_linear_divergence
from tests.distributed import run_ranks

MIB = 2**20
CASES = ("four products alone", "fused forward_kl", "fused reverse_kl", "fused jsd", "plain forward_kl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--chunk-tokens", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip-plain", action="store_true", help="plain torch needs about ten whole logits of memory")
    parser.add_argument("--write", type=Path, help="also write the table here")
    options = parser.parse_args()
    cases = [case for case in CASES if not (options.skip_plain and case.startswith("plain"))]
    if options.tp > 1:  # plain torch has no vocabulary-parallel softmax to compare with
        cases = [case for case in cases if not case.startswith("plain")]
    table = _table(options, cases)
    print(table)
    if options.write:
        command = shlex.join(["python", "-m", "benchmarks.loss", *sys.argv[1:]])
        options.write.write_text(f"# The loss on a CPU\n\n```\n{command}\n```\n\n{table}\n")


def _table(options: argparse.Namespace, cases: list[str]) -> str:
    shape = (options.tokens, options.hidden, options.vocab // options.tp)
    measured = {
        case: run_ranks(_measure, options.tp, case, shape, options.chunk_tokens, options.repeats, timeout=1800)
        for case in cases
    }
    seconds = {case: max(rank[0] for rank in ranks) for case, ranks in measured.items()}
    memory = {case: max(rank[1] for rank in ranks) for case, ranks in measured.items()}
    weight_gradient = 4 * options.hidden * shape[2] / MIB
    lines = [
        f"{options.tokens} tokens, hidden {options.hidden}, vocabulary {options.vocab}, TP {options.tp}, float32; "
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}. A rank's whole logits are "
        f"{4 * shape[0] * shape[2] / MIB:,.0f} MiB a side, its weight gradient {weight_gradient:,.0f} MiB.",
        "",
        "| case | seconds | of the floor | memory of a rank, MiB |",
        "|---|---:|---:|---:|",
    ]
    floor = seconds[CASES[0]]
    lines += [f"| {case} | {seconds[case]:.2f} | {seconds[case] / floor:.2f} | {memory[case]:,.0f} |" for case in cases]
    return "\n".join(lines)


def _measure(
    rank: int, world: int, case: str, shape: tuple[int, int, int], chunk_tokens: int | None, repeats: int
) -> tuple[float, float]:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    tokens, hidden, width = shape
    torch.manual_seed(rank)
    student, teacher = (torch.randn(tokens, hidden) for _ in range(2))
    student_weight, teacher_weight = (torch.randn(width, hidden).div_(hidden**0.5) for _ in range(2))
    student.requires_grad_()
    student_weight.requires_grad_()
    name, _, divergence = case.partition(" ")
    step: Callable[[], object]
    before = _resident_peak()
    if name == "four":
        step = _products(student.detach(), student_weight.detach(), teacher, teacher_weight)
    elif name == "fused":
        weights, group = torch.ones(tokens), dist.group.WORLD if world > 1 else None

        def step() -> object:
            loss, _ = fused_linear_divergence(
                student, student_weight, teacher, teacher_weight, weights,
                group=group, divergence=divergence, chunk_tokens=chunk_tokens,  # type: ignore[arg-type]
            )  # fmt: skip
            return torch.autograd.grad(loss, (student, student_weight))
    else:

        def step() -> object:
            loss = dense_divergence(student @ student_weight.t(), teacher @ teacher_weight.t(), divergence).sum()
            return torch.autograd.grad(loss, (student, student_weight))

    times = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return min(times), (_resident_peak() - before) / MIB


def _products(student: Tensor, student_weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Callable[[], object]:
    logits = student.new_empty(2, student.shape[0], student_weight.shape[0])
    hidden_gradient, weight_gradient = torch.empty_like(student), torch.empty_like(student_weight)

    def step() -> object:
        torch.mm(student, student_weight.t(), out=logits[0])
        torch.mm(teacher, teacher_weight.t(), out=logits[1])
        torch.mm(logits[0], student_weight, out=hidden_gradient)
        return torch.mm(logits[0].t(), student, out=weight_gradient)

    return step


def _resident_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
