"""Which of the teacher's tokens are kept, whatever the ties."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_trd.losses import vocab_parallel_divergence
from tests.distributed import run_ranks
from tests.losses import ranks, reference
from tests.losses.reference import Case


def kept(teacher: list[float], k: int) -> list[int]:
    """Columns with a gradient, under a student that disagrees with every teacher used here on every column."""
    student = torch.arange(len(teacher), dtype=torch.float32).mul(0.37).sin()[None].requires_grad_()
    vocab_parallel_divergence(student, torch.tensor([teacher]), top_k=k).sum().backward()
    assert student.grad is not None
    return student.grad[0].nonzero().flatten().tolist()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0]), min_size=2, max_size=24), st.integers(2, 24))
def test_the_most_probable_are_kept_and_the_lower_index_among_equals(teacher: list[float], k: int) -> None:
    order = sorted(range(len(teacher)), key=lambda column: (-teacher[column], column))
    assert kept(teacher, k) == sorted(order[:k])


@pytest.mark.parametrize("columns", [1537, 1664, 5000])  # only some segments are ranked; once the last is whole
@pytest.mark.parametrize("levels", [2, 40, 10**6])
@pytest.mark.parametrize("k", [2, 3])
def test_the_same_are_kept_of_many_columns(columns: int, levels: int, k: int) -> None:
    draw = torch.Generator().manual_seed(columns + levels)
    teacher = torch.randint(levels, (20, columns), generator=draw).float().sub(levels)
    teacher[0, :-2], teacher[1, ::2], teacher[2] = -torch.inf, -torch.inf, -torch.inf
    teacher[3, -1] = 1.0
    student = torch.arange(columns, dtype=torch.float32).mul(0.37).sin().expand(20, -1).clone().requires_grad_()
    # The gradient is not 0 at the columns that are kept, NaN where all are masked.
    vocab_parallel_divergence(student, teacher, top_k=k).sum().backward()
    assert student.grad is not None
    order = teacher.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    assert [row.nonzero().flatten().tolist() for row in student.grad] == order.tolist()


def test_masked_columns_are_kept_last() -> None:
    assert kept([-torch.inf, 1.0, -torch.inf, 0.0, 2.0], 3) == [1, 3, 4]


@pytest.mark.parametrize("world", [2, 4])
def test_a_tie_across_ranks_goes_to_the_lower_column(world: int) -> None:
    """All the teacher's logits equal: exactly the first k columns of the whole vocabulary."""
    case = Case(top_k=7, tokens=3, vocabulary=23, teacher_hidden=4)
    found = run_ranks(ranks.moved_columns, world, [replace(case, top_k=k) for k in (1, 2, 7, 12, 22)])
    for number, k in enumerate((1, 2, 7, 12, 22)):
        columns = torch.cat([rank[number] for rank in found])
        assert columns.nonzero().flatten().tolist() == (list(range(k)) if k > 1 else [])


@pytest.mark.parametrize("k", [1, 2, 3])
def test_nan_logits_give_nan_and_no_index_error(k: int) -> None:
    student, teacher, _ = reference.logits(Case())
    teacher[1, 5] = torch.nan
    teacher[2, :] = torch.nan
    found = vocab_parallel_divergence(student, teacher, top_k=k)
    assert found.isnan().tolist() == [False, True, True, False, False, False]


def test_the_whole_vocabulary_is_the_divergence_without_top_k() -> None:
    (found,), (want,) = ranks.fused(0, 1, [Case(top_k=24)]), ranks.fused(0, 1, [Case()])
    assert torch.equal(found.per_token, want.per_token)
