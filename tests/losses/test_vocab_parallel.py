"""`vocab_parallel_divergence` against the float64 reference, at every tensor-parallel size."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_trd.losses import Divergence, vocab_parallel_divergence
from megatron_trd.losses.kernels import kernels_for
from tests.distributed import run_ranks
from tests.losses import cases, ranks, reference
from tests.losses.reference import Case, Outcome, check, check_gradient

CASES = cases.for_logits()


@pytest.fixture(scope="module", params=cases.WORLDS)
def outcomes(request: pytest.FixtureRequest) -> dict[str, list[Outcome]]:
    """By the case's name, what every rank of a world found."""
    world, listed = request.param, list(CASES.values())
    by_rank = [ranks.on_logits(0, 1, listed)] if world == 1 else run_ranks(ranks.on_logits, world, listed)
    return {name: [found[number] for found in by_rank] for number, name in enumerate(CASES)}


@pytest.mark.parametrize("name", CASES)
def test_divergence_and_gradient_equal_the_dense_reference(name: str, outcomes: dict[str, list[Outcome]]) -> None:
    reference.check_on_logits(CASES[name], outcomes[name])


@pytest.mark.parametrize("name", CASES)
def test_every_rank_returns_the_same_bits(name: str, outcomes: dict[str, list[Outcome]]) -> None:
    first, *others = outcomes[name]
    assert all(torch.equal(other.per_token, first.per_token) for other in others)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.clip])
def test_the_clipped_cases_have_tokens_on_both_sides_of_the_bound(name: str) -> None:
    clipped = reference.on_logits(CASES[name]).per_token.eq(CASES[name].clip or 0)
    assert clipped.any()
    assert not clipped.all()


@pytest.mark.parametrize("name", [*cases.THREE, "jsd(0.001)", "jsd(0.999)"])
@pytest.mark.parametrize(
    "options", [{}, {"top_k": 4}, {"top_k": 3, "tail": True}, {"clip": 0.6, "temperature": 1.5}], ids=str
)
def test_gradcheck(name: str, options: dict[str, Any]) -> None:
    case = Case(**cases.DIVERGENCES[name].objective() | options, tokens=5, vocabulary=7, dtype=torch.float64, seed=5)
    student, teacher, _ = reference.logits(case)

    def divergence(logits: Tensor) -> Tensor:
        return vocab_parallel_divergence(logits, teacher, vocab_size=6, **case.objective())

    assert torch.autograd.gradcheck(divergence, student.requires_grad_())


NAMES: tuple[Divergence, ...] = ("forward_kl", "reverse_kl", "jsd")
NUMBERS = st.one_of(st.floats(-1e4, 1e4, width=32), st.sampled_from([-math.inf, -1e4, 0.0, 1e4]))
OBJECTIVES = st.fixed_dictionaries(
    {
        "divergence": st.sampled_from(NAMES),
        "beta": st.floats(0.001, 0.999),
        "temperature": st.floats(0.05, 20),
        "clip": st.one_of(st.none(), st.floats(0.01, 100)),
        "top_k": st.one_of(st.none(), st.integers(1, 7)),
        "tail": st.booleans(),
    }
)


def rows(numbers: st.SearchStrategy[float]) -> st.SearchStrategy[Tensor]:
    """`[rows, 6]` logits."""
    row = st.lists(numbers, min_size=6, max_size=6)
    return st.lists(row, min_size=1, max_size=3).map(lambda values: torch.tensor(values, dtype=torch.float32))


@settings(max_examples=150, deadline=None)
@given(rows(NUMBERS), rows(NUMBERS), OBJECTIVES)
def test_nothing_is_ever_nan_whatever_is_masked(student: Tensor, teacher: Tensor, options: dict[str, Any]) -> None:
    """Also where the divergence is infinite, or a row has no column left."""
    count = min(len(student), len(teacher))
    student, teacher = student[:count].clone().requires_grad_(), teacher[:count]
    found = vocab_parallel_divergence(student, teacher, **options)
    found.sum().backward()
    assert found.isfinite().all()
    assert (found >= 0).all()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES[:2])
def test_an_infinite_divergence_is_very_large(name: Divergence) -> None:
    student, teacher = torch.zeros(1, 4), torch.zeros(1, 4)
    (student if name == "forward_kl" else teacher)[0, 1] = -torch.inf
    assert 1e20 < vocab_parallel_divergence(student, teacher, divergence=name).item() < math.inf


@settings(max_examples=60, deadline=None)
@given(rows(st.floats(-20, 20, width=32)), st.floats(0.001, 0.999))
def test_identities_between_the_divergences(student: Tensor, beta: float) -> None:
    teacher = student.flip(1) * 0.5
    found = {name: vocab_parallel_divergence(student, teacher, divergence=name, beta=beta) for name in NAMES}
    swapped = {name: vocab_parallel_divergence(teacher, student, divergence=name, beta=1 - beta) for name in NAMES}
    assert torch.allclose(found["forward_kl"], swapped["reverse_kl"], rtol=1e-5, atol=2e-6)
    assert torch.allclose(found["jsd"], swapped["jsd"], rtol=1e-5, atol=2e-6)
    entropy = -sum(p * math.log(p) for p in (beta, 1 - beta))  # of which side a token was drawn from
    assert (found["jsd"] <= entropy + 1e-6).all()
    for name in NAMES:
        assert (vocab_parallel_divergence(student, student, divergence=name, beta=beta) <= 2e-6).all()


@pytest.mark.parametrize("name", cases.THREE)
def test_rounding_never_makes_a_divergence_negative(name: str) -> None:
    """Sides so close that the truth is far below the rounding of their probabilities."""
    base = cases.DIVERGENCES[name]
    student = torch.randn(500, 300, generator=torch.Generator().manual_seed(0))
    found = vocab_parallel_divergence(student, student * 1.00001, divergence=name.split("(")[0], beta=base.beta)
    assert (found >= 0).all()
    assert (found < 1e-6).all()


def test_a_small_jsd_keeps_its_digits() -> None:
    """Sides as close as a model and its last version: each column's share is first order, their sum second order."""
    student = 3 * torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    teacher = student + 0.01 * torch.randn(50, 300, generator=torch.Generator().manual_seed(1))
    found = vocab_parallel_divergence(student, teacher, divergence="jsd", beta=0.3)
    exact = vocab_parallel_divergence(student.double(), teacher.double(), divergence="jsd", beta=0.3)
    assert exact.max() < 1e-4
    assert torch.allclose(found.double(), exact, rtol=1e-3)


@pytest.mark.parametrize("name", cases.THREE)
@pytest.mark.parametrize("offset", [30.0, 1e3, -1e4])
def test_a_constant_added_to_every_logit_changes_nothing(name: str, offset: float) -> None:
    """The probabilities do not change, so neither may the error: no log sum exp rounded at the logits' size."""
    case = replace(cases.DIVERGENCES[name], tokens=64, vocabulary=50)
    (moved,), (still,) = ranks.on_logits(0, 1, [replace(case, offset=offset)]), ranks.on_logits(0, 1, [case])
    assert torch.equal(moved.per_token, still.per_token)
    assert torch.equal(moved.gradients["student_logits"], still.gradients["student_logits"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", cases.THREE)
def test_half_precision_logits_lose_nothing_but_the_rounding_of_the_gradient(name: str, dtype: torch.dtype) -> None:
    case = replace(cases.DIVERGENCES[name], spread=1.0, vocabulary=23, dtype=dtype)
    (found,), want = ranks.on_logits(0, 1, [case]), reference.on_logits(case)
    check(case, found.per_token, want.per_token, 1e-6)
    check_gradient(case, found.gradients["student_logits"], want.gradients["student_logits"].to(dtype))
    assert found.per_token.dtype == torch.float32


def test_the_teacher_never_receives_a_gradient_and_neither_input_changes() -> None:
    student, teacher, _ = reference.logits(Case())
    before = student.clone(), teacher.clone()
    vocab_parallel_divergence(student.requires_grad_(), teacher.requires_grad_()).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


def test_without_gradients_the_divergence_is_the_same() -> None:
    student, teacher, _ = reference.logits(Case("jsd", top_k=5))
    options: dict[str, Any] = {"divergence": "jsd", "top_k": 5}
    with torch.no_grad():
        found = vocab_parallel_divergence(student.requires_grad_(), teacher, **options)
    assert not found.requires_grad
    assert torch.equal(found, vocab_parallel_divergence(student, teacher, **options))


@pytest.mark.parametrize(
    ("student", "teacher"), [((3, 4), (3, 5)), ((3, 4), (2, 4)), ((3, 4, 1), (3, 4, 1)), ((4,), (4,))]
)
def test_shapes_that_do_not_fit_are_named(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="logits must both be") as error:
        vocab_parallel_divergence(torch.ones(student), torch.ones(teacher))
    assert str(list(student)) in str(error.value)
    assert str(list(teacher)) in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "kl"}, "divergence must be one of"),
        ({"beta": 2.0}, "beta"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"clip": 0.0}, "clip must be positive"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"vocab_size": 5}, "vocab_size 5 does not fit"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vocab_parallel_divergence(torch.ones(3, 4), torch.ones(3, 4), **options)


@pytest.mark.parametrize("transposed", [(True, False), (False, True), (True, True)])
def test_logits_that_are_a_view_of_others_are_taken_as_they_are(
    transposed: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's kernels want a row's columns side by side."""
    torch.manual_seed(0)
    sides = torch.randn(2, 5, 40)
    expected = vocab_parallel_divergence(*sides)
    seen = []

    def watched(student: Tensor, teacher: Tensor, objective: Any) -> Any:
        seen.append((student.stride(), teacher.stride()))
        return kernels_for(student, teacher, objective)

    monkeypatch.setattr("megatron_trd.losses.rows.kernels_for", watched)
    views = [side.t().contiguous().t() if turn else side for side, turn in zip(sides, transposed, strict=True)]
    assert torch.equal(vocab_parallel_divergence(*views), expected)
    assert seen == [((40, 1), (40, 1))]
