"""The plain reference that the package ships, against the definitions and numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron_trd.losses import dense_divergence
from tests.losses import cases, reference
from tests.losses.reference import Case, check, check_gradient

CASES = {name: replace(case, dtype=torch.float64) for name, case in cases.common().items()}


def test_two_tokens_by_hand() -> None:
    """Teacher (1/2, 1/2), student (1/4, 3/4): which side is which, and whose weight beta is."""
    teacher, student = torch.tensor([[0.5, 0.5]]).double().log(), torch.tensor([[0.25, 0.75]]).double().log()
    assert dense_divergence(student, teacher).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    reverse = 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
    assert dense_divergence(student, teacher, "reverse_kl").item() == pytest.approx(reverse)
    m = [0.2 * 0.5 + 0.8 * 0.25, 0.2 * 0.5 + 0.8 * 0.75]
    of_teacher = 0.5 * math.log(0.5 / m[0]) + 0.5 * math.log(0.5 / m[1])
    of_student = 0.25 * math.log(0.25 / m[0]) + 0.75 * math.log(0.75 / m[1])
    jsd = 0.2 * of_teacher + 0.8 * of_student
    assert dense_divergence(student, teacher, "jsd", beta=0.2).item() == pytest.approx(jsd)


@pytest.mark.parametrize("name", CASES)
def test_divergence_and_gradient_follow_the_definitions(name: str) -> None:
    case, want = CASES[name], reference.on_logits(CASES[name])
    student, teacher, upstream = reference.logits(case)
    per_token = dense_divergence(student.requires_grad_(), teacher, **case.objective())
    check(case, per_token.detach(), want.per_token, 1e-6)
    (gradient,) = torch.autograd.grad((per_token * upstream).sum(), student)
    check_gradient(case, gradient, want.gradients["student_logits"])


def test_equal_logits_are_kept_by_the_lower_index() -> None:
    teacher = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0]])
    student = torch.zeros(1, 5, requires_grad=True)
    dense_divergence(student, teacher, top_k=3).sum().backward()
    assert student.grad is not None
    assert student.grad[0].ne(0).tolist() == [True, True, False, True, False]


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher, _ = reference.logits(Case())
    dense_divergence(student.requires_grad_(), teacher.requires_grad_()).sum().backward()
    assert teacher.grad is None


def test_an_unknown_divergence_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown divergence 'kl'"):
        dense_divergence(torch.ones(1, 2), torch.ones(1, 2), "kl")
