"""Samples to micro-batches: which positions carry loss, with which weight, on which replica."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_trd.data.batching import MicroBatch, Sample, Side, deal, micro_batches, normalize

CPU = torch.device("cpu")
QUICK = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# Token ids from 1: padding is 0, so a padded position can be told from a real one.
_IDS = st.integers(1, 50)


@st.composite
def samples(draw: st.DrawFn, least: int = 1, most: int = 9) -> list[Sample]:
    made = []
    for _ in range(draw(st.integers(least, most))):
        response = tuple(draw(st.lists(_IDS, min_size=1, max_size=12)))
        made.append(
            Sample(
                student_prompt=tuple(draw(st.lists(_IDS, min_size=1, max_size=6))),
                teacher_prompt=tuple(draw(st.lists(_IDS, min_size=1, max_size=15))),
                response=response,
                sampler_log_probs=tuple(-float(place) for place in range(len(response))),
                weight=draw(st.floats(0.125, 1)),
            )
        )
    return made


def prompt_of(sample: Sample, side: Side) -> tuple[int, ...]:
    return sample.student_prompt if side == "student" else sample.teacher_prompt


def batches(
    made: Sequence[Sample], side: Side, *, size: int, multiple: int = 1, indices: Sequence[int] | None = None
) -> list[MicroBatch]:
    chosen = range(len(made)) if indices is None else indices
    return micro_batches(made, list(chosen), side, size=size, multiple=multiple, device=CPU)


SIDES = st.sampled_from(["student", "teacher"])


# Which hidden state predicts which token


@QUICK
@given(samples(), SIDES, st.integers(1, 4), st.integers(1, 8))
def test_select_picks_the_state_that_has_read_all_before_the_token_and_not_the_token(
    made: list[Sample], side: Side, size: int, multiple: int
) -> None:
    for batch in batches(made, side, size=size, multiple=multiple):
        # A stand-in for a causal model: the state at a position knows how much it has read, and a digest of it.
        digest = (batch.tokens.double() * torch.arange(1, batch.tokens.shape[1] + 1)).cumsum(1)
        read = (batch.positions + 1).double()
        selected = batch.select(torch.stack([read, digest], dim=-1).transpose(0, 1))
        expected = []
        for index in batch.samples:
            prompt, response = prompt_of(made[index], side), made[index].response
            for place in range(len(response)):
                before = [*prompt, *response[:place]]
                expected.append([len(before), sum(token * (at + 1) for at, token in enumerate(before))])
        assert selected.tolist() == expected


def test_one_token_response_is_predicted_by_the_prompt_alone() -> None:
    sample = Sample((7, 8, 9), (5,), (4,), (-0.5,))
    (student,) = batches([sample], "student", size=1)
    assert (student.tokens.tolist(), student.columns.tolist()) == ([[7, 8, 9]], [2])
    (teacher,) = batches([sample], "teacher", size=1)
    assert (teacher.tokens.tolist(), teacher.columns.tolist()) == ([[5]], [0])


@QUICK
@given(samples(), SIDES, st.integers(1, 4))
def test_labels_and_what_belongs_to_them_are_the_responses_in_order(made: list[Sample], side: Side, size: int) -> None:
    for batch in batches(made, side, size=size):
        chosen = [made[index] for index in batch.samples]
        assert batch.lengths == tuple(len(sample.response) for sample in chosen)
        assert batch.response.tolist() == [token for sample in chosen for token in sample.response]
        assert batch.sampler_log_probs.tolist() == [value for sample in chosen for value in sample.sampler_log_probs]
        weights = [sample.weight for sample in chosen for _ in sample.response]
        assert batch.weights.tolist() == torch.tensor(weights, dtype=torch.float32).tolist()
        assert {batch.tokens.dtype, batch.rows.dtype, batch.columns.dtype, batch.response.dtype} == {torch.int64}


# Shapes


@QUICK
@given(samples(), SIDES, st.integers(1, 4), st.integers(1, 8))
def test_inputs_stand_at_the_left_and_padding_behind_them(
    made: list[Sample], side: Side, size: int, multiple: int
) -> None:
    for batch in batches(made, side, size=size, multiple=multiple):
        inputs = [made[index].tokens(side) for index in batch.samples]
        length = batch.tokens.shape[1]
        assert length % multiple == 0
        assert length - max(map(len, inputs)) < multiple, "no more padding than the multiple asks for"
        for row, ids in zip(batch.tokens.tolist(), inputs, strict=True):
            assert row == [*ids, *[0] * (length - len(ids))]
        assert batch.positions.tolist() == [list(range(length))] * len(inputs)


@QUICK
@given(samples(), SIDES, st.integers(1, 4), st.randoms())
def test_every_sample_of_the_share_is_in_one_micro_batch_beside_its_like(
    made: list[Sample], side: Side, size: int, random: object
) -> None:
    indices = list(range(0, len(made), 2))
    random.shuffle(indices)  # type: ignore[attr-defined]
    found = batches(made, side, size=size, indices=indices)
    order = [index for batch in found for index in batch.samples]
    assert sorted(order) == sorted(indices)
    assert all(len(batch.samples) == size for batch in found[:-1])
    assert 0 < len(found[-1].samples) <= size
    lengths = [len(made[index].tokens(side)) for index in order]
    assert lengths == sorted(lengths, reverse=True)


@QUICK
@given(samples(), SIDES, st.integers(1, 8))
def test_a_replica_without_samples_gets_one_that_weighs_nothing(made: list[Sample], side: Side, multiple: int) -> None:
    (batch,) = batches(made, side, size=2, multiple=multiple, indices=[])
    assert batch.samples == ()
    assert batch.tokens.shape[0] == 1
    assert batch.tokens.shape[1] % multiple == 0
    assert len(batch.weights) == len(batch.response) == sum(batch.lengths) > 0
    assert batch.weights.tolist() == [0.0] * len(batch.weights)


# Weights


@pytest.mark.parametrize("by", ["sequence", "token"])
@QUICK
@given(made=samples(most=20), data=st.data())
def test_weighted_sum_over_micro_batches_is_the_mean_in_float64(
    by: str, made: list[Sample], data: st.DataObject
) -> None:
    replicas, size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    weighed = normalize(made, by)  # type: ignore[arg-type]
    random = np.random.default_rng(0)
    values = [random.exponential(size=len(sample.response)) for sample in made]
    mean = np.mean([value.mean() for value in values]) if by == "sequence" else np.concatenate(values).mean()

    loss, weight = 0.0, 0.0
    for share in deal(weighed, replicas, cost=lambda sample: len(sample.tokens("student"))):
        for batch in batches(weighed, "student", size=size, indices=share):
            divergence = np.concatenate([values[index] for index in batch.samples] or [np.ones(sum(batch.lengths))])
            loss += float(batch.weights.double().numpy() @ divergence)
            weight += float(batch.weights.double().sum())
    assert weight == pytest.approx(1.0, rel=1e-6)
    assert loss == pytest.approx(mean, rel=1e-6)


def test_sequence_and_token_means_differ_where_lengths_do() -> None:
    made = [Sample((1,), (1,), (2,) * count, (0.0,) * count) for count in (1, 3)]
    assert [sample.weight for sample in normalize(made, "sequence")] == pytest.approx([1 / 2, 1 / 6])
    assert [sample.weight for sample in normalize(made, "token")] == pytest.approx([1 / 4, 1 / 4])


@QUICK
@given(samples(), st.sampled_from(["sequence", "token"]))
def test_normalize_replaces_the_weight_and_nothing_else(made: list[Sample], by: str) -> None:
    weighed = normalize(made, by)  # type: ignore[arg-type]
    assert [(s.student_prompt, s.teacher_prompt, s.response, s.sampler_log_probs) for s in weighed] == [
        (s.student_prompt, s.teacher_prompt, s.response, s.sampler_log_probs) for s in made
    ]
    assert normalize(weighed, by) == weighed, "weights that were there before have no say"  # type: ignore[arg-type]


# Shares


def cost(sample: Sample) -> int:
    return len(sample.tokens("student"))


@QUICK
@given(samples(least=0, most=30), st.integers(1, 6))
def test_deal_gives_every_sample_once_and_loads_within_one_sample_of_each_other(
    made: list[Sample], shares: int
) -> None:
    dealt = deal(made, shares, cost)
    assert len(dealt) == shares
    assert sorted(index for share in dealt for index in share) == list(range(len(made)))
    loads = [sum(cost(made[index]) for index in share) for share in dealt]
    assert max(loads) - min(loads) <= max(map(cost, made), default=0)


def test_deal_balances_unlike_lengths() -> None:
    made = [Sample((1,), (1,), (2,) * count, (0.0,) * count) for count in (9, 1, 8, 2, 7, 3)]
    loads = [sum(cost(made[index]) for index in share) for share in deal(made, 3, cost)]
    assert loads == [10, 10, 10]


@QUICK
@given(samples(most=30), st.integers(1, 6))
def test_deal_is_the_same_wherever_it_is_computed(made: list[Sample], shares: int) -> None:
    copies = [Sample(s.student_prompt, s.teacher_prompt, s.response, s.sampler_log_probs, s.weight) for s in made]
    assert deal(made, shares, cost) == deal(copies, shares, cost)


def test_deal_breaks_ties_by_index() -> None:
    same = [Sample((1,), (1,), (2, 3), (0.0, 0.0))] * 5
    assert deal(same, 2, cost) == [[0, 2, 4], [1, 3]]


@QUICK
@given(samples(), SIDES, st.integers(1, 4))
def test_batches_that_others_only_wait_for_are_short(made: list[Sample], side: Side, size: int) -> None:
    full = micro_batches(made, [0], side, size=size, multiple=1, device=CPU, count=3)
    assert len(full) == 3
    shortest = min(len(sample.tokens(side)) for sample in made)
    for idle in full[1:]:
        assert (idle.samples, idle.weights.tolist(), idle.weights.dtype) == ((), [0.0], torch.float32)
        assert idle.tokens.shape[1] <= shortest
        assert idle.select(torch.zeros(*idle.tokens.t().shape, 4)).shape == (1, 4)
