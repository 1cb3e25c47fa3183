"""Layouts that are proposed: the best there is, and one that a user can type."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plan import recipes_table
from megatron_trd.config import apply_overrides
from megatron_trd.errors import UserError
from megatron_trd.planning import search
from megatron_trd.planning.case import make_case
from megatron_trd.planning.forecast import forecast
from megatron_trd.planning.tables import overrides
from megatron_trd.planning.workload import mean_lengths
from tests.planning.cases import make

MIXTURE = {
    "model": "models/Qwen3-30B-A3B",
    "student": {"tp": 4, "ep": 4, "sequence_parallel": True},
    "teacher": {"weights": "live"},
    "sampler": {"tp": 4},
}


@pytest.mark.parametrize(
    ("settings", "gpu", "nodes"),
    [
        ({}, "h100", 1),
        ({"method": "trd-opd", "teacher": {"model": "models/Qwen3-32B", "tp": 4}}, "h200", 2),
        (MIXTURE, "b200", 1),
        ({"lora": {"rank": 64}}, "h100", 1),
    ],
)
def test_the_best_layout_is_that_of_all_combinations(settings: dict[str, Any], gpu: str, nodes: int) -> None:
    """What is left out beforehand was not the best: all students with all teachers and samplers, tried one by one."""
    case = make(settings, gpu=gpu, nodes=nodes, gpus_per_node=4)
    found = search.alternatives(case)
    everything = []
    for parts in product(search._students(case), search._teachers(case), search._samplers(case)):
        student, teacher, sampler = parts
        try:
            made = case.with_layout(replace(case.config, student=student, teacher=teacher, sampler=sampler))
        except UserError:
            continue
        everything.append(forecast(search._with_fraction(made)))
    fitting = [each for each in everything if each.fits]
    assert len(everything) > len(found.fitting) + len(found.too_large)
    assert found.fitting[0].step == pytest.approx(min(each.step for each in fitting), rel=0.01)


@pytest.mark.parametrize("beside", [{"staleness": 1}, {"overlap": "teacher"}])
def test_what_trains_beside_sampling_has_samplers_of_one_rank(beside: dict[str, Any]) -> None:
    found = search.alternatives(make(beside))
    assert {each.case.config.sampler.tp for each in (*found.fitting, *found.too_large)} == {1}
    with pytest.raises(UserError, match=r"sampler\.tp=2: two threads"):
        make(beside | {"sampler": {"tp": 2}})


def test_layouts_are_sorted_and_sorted_apart() -> None:
    found = search.alternatives(make({}))
    for quicker, slower in pairwise(found.fitting):
        assert quicker.step < 1.01 * slower.step
        assert quicker.step < slower.step or quicker.peak[1] < slower.peak[1]  # where times are the same, by memory
    assert all(each.fits for each in found.fitting)
    assert found.too_large
    assert not any(each.fits for each in found.too_large)


def test_a_layout_typed_as_overrides_is_the_layout() -> None:
    case = make({})
    best = search.alternatives(case).fitting[0]
    typed = overrides(case.config, best.case.config)
    assert typed
    config = apply_overrides(case.config, typed)
    again = forecast(make_case(config, case.cluster, mean_lengths(config)))
    assert again.fits
    assert again.step == pytest.approx(best.step)


@pytest.mark.parametrize("settings", [{"teacher": {"weights": "live"}}, {"lora": {"rank": 64}}])
def test_a_teacher_that_is_the_student_has_its_grid(settings: dict[str, Any]) -> None:
    case = make(settings)
    found = search.alternatives(case)
    assert {each.case.teacher_layout == each.case.student_layout for each in found.fitting} == {True}
    assert all(each.case.config.teacher == case.config.teacher for each in found.fitting)  # none is tried
    assert len({each.case.teacher_layout for each in found.fitting}) > 1


def test_the_documented_forecasts_are_today_s() -> None:
    table = recipes_table()
    assert len(table.splitlines()) == 2 + 7 * 3
    text = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    assert table in text, "docs/scaling.md has another table than `python -m benchmarks.plan --recipes`"
