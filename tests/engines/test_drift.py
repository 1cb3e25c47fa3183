"""Sampler and trainer are compared on the tokens that each model sampled, and no difference is taken for none."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_trd.errors import UserError
from megatron_trd.training.run import _check_drift
from tests.distributed import run_ranks
from tests.engines import reference
from tests.engines.test_numerics import engines, layout, make_samples, prepare
from tests.models import write_model

LAYOUTS = [layout(2, 1, 1, 1, sequence_parallel=True), layout(1, 2, 1, 1), layout(1, 1, 1, 1)]


def sums(rank: int, world: int) -> Any:
    """Rank function: a micro-batch of each of two replicas, and one that a tensor-parallel neighbour counts."""
    from megatron_trd.engines.student import _Sums
    from megatron_trd.losses import FusedDivergence

    found = _Sums(torch.device("cpu"))
    drift = torch.tensor([[0.5, 2.0], [3.0, 0.25]][rank])
    fused = FusedDivergence(torch.tensor(1.0 + rank), torch.tensor([1.0, 2.0, 3.0][: 2 + rank]))
    found.add(fused, drift, counted=True)
    found.add(FusedDivergence(torch.tensor(10.0), torch.tensor([5.0])), None, counted=False)
    return found.result(grad_norm=1.0, lr=2.0)


def test_a_step_s_numbers_are_of_all_replicas_once() -> None:
    from megatron_trd.engines.student import StepResult

    wanted = StepResult(loss=3.0, divergence=9 / 5, grad_norm=1.0, lr=2.0, drift_mean=5.75 / 4, drift_max=3.0)
    assert run_ranks(sums, 2) == [wanted, wanted]


def drifts(rank: int, world: int, model: str, cases: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Rank function: for each layout, the drift of two rollouts, and of one, whose sampler said 0 of every token."""
    from megatron.core import parallel_state

    from megatron_trd import platform

    platform.current().set_up()
    found = []
    for case in cases:
        student, _ = engines(model, None, case)
        first, second, *_ = (dataclasses.replace(sample, teacher_prompt=()) for sample in make_samples())
        found.append((student.rollout_drift([first, second]), student.rollout_drift([first])))
        parallel_state.destroy_model_parallel()
    return found


def test_a_student_s_drift_is_that_of_its_own_log_probabilities(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    dense = reference.load(model)
    distances = []
    for sample in make_samples()[:2]:
        logits = reference.response_logits(dense, sample.student_prompt, sample.response).detach()
        chosen = torch.tensor(sample.response)[:, None]
        distances.append(-logits.log_softmax(-1).gather(1, chosen)[:, 0])
    one, both = distances[0].mean().item(), torch.cat(distances).mean().item()
    for found in run_ranks(drifts, 2, str(model), LAYOUTS):
        (tensor, pipeline, data), alone = zip(*found, strict=True)
        assert alone == pytest.approx([one] * 3, rel=1e-5)
        assert (tensor, pipeline) == pytest.approx((one, one), rel=1e-5), "one replica compares one rollout"
        assert data == pytest.approx(both, rel=1e-5), "two replicas compare two"


def trained(rank: int, world: int, model: str) -> tuple[float, float, float]:
    """Rank function: sum, count and maximum of a step's drift, where the sampler said 0 of every token."""
    from megatron_trd import platform

    platform.current().set_up()
    student, teacher, samples, share, hidden = prepare(model, None, layout(1, 1, 1, 1))
    found = student.backward(samples, share, hidden, teacher.head)
    return found.totals[3].item(), found.totals[4].item(), found.largest.item()


def test_drift_is_a_distance(tmp_path: Path) -> None:
    [(total, tokens, largest)] = run_ranks(trained, 1, str(write_model(tmp_path / "model")))
    assert 0 < total / tokens < largest


@pytest.mark.parametrize("drift", [0.2, math.nan])
@pytest.mark.parametrize("which", ["rollouts", "trained tokens"])
def test_a_drift_above_its_bound_or_none_at_all_is_refused(which: str, drift: float) -> None:
    fine = {"rollouts": 0.05, "trained tokens": None}
    _check_drift(fine, 0.1)
    _check_drift(fine | {which: drift}, None)
    with pytest.raises(UserError, match=f"nats a token on {which}, log.max_drift is 0.1"):
        _check_drift(fine | {which: drift}, 0.1)
