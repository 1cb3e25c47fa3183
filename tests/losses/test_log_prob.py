"""`vocab_parallel_log_prob` against a dense float64 log-softmax, at every tensor-parallel size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_trd.losses import vocab_parallel_log_prob
from tests.distributed import run_ranks
from tests.losses import cases, ranks
from tests.losses.reference import Case

CASES = {
    "plain": Case(),
    "temperature 0.7": Case(temperature=0.7),
    "temperature 3": Case(temperature=3.0),
    "padded vocabulary": Case(vocabulary=23),
    "a shard of four without columns": Case(vocabulary=9),
    "all columns in the first shard": Case(vocabulary=5, width=6),
    "one column": Case(vocabulary=1),
    "no token": Case(tokens=0),
    "one token": Case(tokens=1),
    "chunks of 1": Case(tokens=13, chunk_tokens=1),
    "chunks of 4": Case(tokens=13, chunk_tokens=4),
    "logits of 1e4": Case(spread=1e4),
    "offset 30": Case(offset=30.0),
    "offset 1e4": Case(offset=1e4),
    "offset -1e4, padded": Case(offset=-1e4, vocabulary=21),
    "float64": Case(dtype=torch.float64),
}


@pytest.fixture(scope="module", params=cases.WORLDS)
def found(request: pytest.FixtureRequest) -> dict[str, list[Tensor]]:
    """By the case's name, what every rank of a world returned."""
    world, listed = request.param, list(CASES.values())
    by_rank = [ranks.log_probs(0, 1, listed)] if world == 1 else run_ranks(ranks.log_probs, world, listed)
    return {name: [one[number] for one in by_rank] for number, name in enumerate(CASES)}


def dense(case: Case) -> Tensor:
    hidden, weight, ids = ranks.log_prob_inputs(case)
    whole = (hidden.double() @ weight.double().t() / case.temperature).log_softmax(dim=1)
    inside = (ids >= 0) & (ids < case.vocabulary)
    chosen = whole.gather(1, ids.where(inside, 0)[:, None]).squeeze(1)
    return chosen.where(inside, -torch.inf)


@pytest.mark.parametrize("name", CASES)
def test_log_probabilities_equal_the_dense_reference_on_every_rank(name: str, found: dict[str, list[Tensor]]) -> None:
    case, want = CASES[name], dense(CASES[name])
    error = 1e-12 if case.dtype == torch.float64 else 5e-7
    for one in found[name]:
        assert one.dtype == case.dtype
        assert torch.allclose(one.double(), want, rtol=error, atol=error)
        assert torch.equal(one, found[name][0])


def test_ids_outside_the_vocabulary_have_probability_zero() -> None:
    """Also those whose column exists as padding."""
    hidden, weight = torch.ones(3, 2), torch.ones(8, 2)
    found = vocab_parallel_log_prob(hidden, weight, torch.tensor([5, 6, -1]), vocab_size=6)
    assert found.tolist() == [pytest.approx(-torch.tensor(6.0).log().item()), -torch.inf, -torch.inf]


def test_probabilities_of_the_whole_vocabulary_sum_to_one_at_any_size_of_the_logits() -> None:
    hidden, weight, _ = ranks.log_prob_inputs(Case(tokens=1, offset=1e4))
    found = vocab_parallel_log_prob(hidden.expand(24, -1), weight, torch.arange(24))
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_ids_of_any_integer_type_are_accepted(dtype: torch.dtype) -> None:
    hidden, weight, ids = ranks.log_prob_inputs(Case())
    want = vocab_parallel_log_prob(hidden, weight, ids)
    assert torch.equal(vocab_parallel_log_prob(hidden, weight, ids.to(dtype)), want)


def test_no_gradient_is_kept() -> None:
    hidden, weight, ids = ranks.log_prob_inputs(Case())
    assert not vocab_parallel_log_prob(hidden.requires_grad_(), weight.requires_grad_(), ids).requires_grad


def test_bf16_is_no_worse_than_a_float32_softmax_of_dense_bf16_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(shape, generator=generator).bfloat16() for shape in ((64, 32), (500, 32)))
    ids = torch.randint(500, (64,), generator=generator)
    want = (hidden.double() @ weight.double().t()).log_softmax(dim=1).gather(1, ids[:, None])[:, 0]
    plain = (hidden @ weight.t()).float().log_softmax(dim=1).gather(1, ids[:, None])[:, 0]
    found = vocab_parallel_log_prob(hidden, weight, ids, chunk_tokens=7)
    assert (found - want).norm() <= 1.05 * (plain - want).norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive, not 0.0"),
        ({"chunk_tokens": 0}, "chunk_tokens must be at least 1"),
        ({"vocab_size": 25}, "vocab_size 25 does not fit"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vocab_parallel_log_prob(*ranks.log_prob_inputs(Case()), **options)
