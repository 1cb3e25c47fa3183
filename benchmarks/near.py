"""What a loss of bf16 hidden states and weights makes of a student that is near its teacher.

    pip install --no-deps -r benchmarks/requirements.txt  # the rivals; those missing are left out
    python -m benchmarks.near --write benchmarks/results/loss_near.md

Self-distillation begins near its teacher and ends nearer: the gradient is then the difference of two nearly equal
softmaxes, and what rounds the logits rounds it away. Both sides share one output head here, and the teacher's hidden
states are the student's and a little noise. Errors are norms relative to a float64 computation on the same bf16 inputs;
of the two gradients (hidden states and head) the worse.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import publish, relative_error
from benchmarks.rivals import Loss, cases, loaded
from megatron_trd.losses import dense_divergence

NOISES = (0.5, 0.1, 0.03, 0.01)  # of the teacher's hidden states, whose own size is 1
SPREAD = 2.5  # standard deviation of the logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--write", type=Path, help="also write the table here")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    student = torch.randn(options.tokens, options.hidden, device=options.device)
    weight = torch.randn(options.vocab, options.hidden, device=options.device) * (SPREAD / options.hidden**0.5)
    noise = torch.randn_like(student)
    teachers = [(student + size * noise).bfloat16() for size in NOISES]
    table = _table(student.bfloat16(), weight.bfloat16(), teachers)
    text = (
        f"{options.tokens} tokens, hidden {options.hidden:,}, vocabulary {options.vocab:,}, torch {torch.__version__}, "
        f"{options.device}; bf16.\n\n{table}"
    )
    publish("The loss near the teacher", text, options.write)


def _table(student: Tensor, weight: Tensor, teachers: list[Tensor]) -> str:
    wide = student.double().requires_grad_(), weight.double().requires_grad_()
    exact = [_gradients(_float64, *wide, teacher.double()) for teacher in teachers]
    tokens = "".join(f" {float(value):.1e} nats a token |" for value, *_ in exact)
    lines = [f"| gradient error (loss error) |{tokens}", "|---|" + "---:|" * len(teachers)]
    leaves = student.clone().requires_grad_(), weight.clone().requires_grad_()
    for case in cases(None):
        loss = loaded(case)
        if case.divergence != "forward_kl" or isinstance(loss, str):
            continue
        cells = []
        for teacher, (value, *right) in zip(teachers, exact, strict=True):
            found, *gradients = _gradients(loss, *leaves, teacher)
            error = max(relative_error(ours, theirs) for ours, theirs in zip(gradients, right, strict=True))
            cells.append(f" {error:.1%} ({relative_error(found, value):.1%}) |")
        lines.append(f"| {case.name} |{''.join(cells)}")
    return "\n".join(lines)


def _float64(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, _: object) -> Tensor:
    return dense_divergence(student @ weight.t(), teacher @ teacher_weight.detach().t(), "forward_kl").mean()


def _gradients(loss: Loss, student: Tensor, weight: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    value = loss(student, weight, teacher, weight.detach(), None)
    of_student, of_weight = torch.autograd.grad(value, (student, weight))
    return value.detach(), of_student, of_weight


if __name__ == "__main__":
    main()
