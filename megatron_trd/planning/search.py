"""Other layouts of a recipe on the same GPUs, and which of them fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import TypeVar

from megatron_trd.config import SamplerConfig, StudentConfig, TeacherConfig, TrainConfig
from megatron_trd.errors import UserError
from megatron_trd.models.architecture import Architecture
from megatron_trd.planning import memory
from megatron_trd.planning.case import Case
from megatron_trd.planning.forecast import Forecast, forecast

Costs = tuple[float, ...]
Option = TypeVar("Option", StudentConfig, TeacherConfig)


@dataclass(frozen=True)
class Found:
    """Layouts by forecast time of a step, fastest first; those within a percent of each other by memory."""

    fitting: list[Forecast]
    too_large: list[Forecast]


def alternatives(case: Case) -> Found:
    """Forecasts of other layouts; micro-batches and all other settings are the recipe's.

    Student and teacher are first considered separately, and a layout that takes more time and more memory than another
    is left out: time and memory of the two add up.
    """
    config = case.config
    students = _worthwhile((own, _costs(case, replace(config, student=own))) for own in _students(case))
    teachers = _worthwhile((own, _costs(case, replace(config, teacher=own))) for own in _teachers(case))
    found = []
    for student, teacher, sampler in product(students, teachers, _samplers(case)):
        made = _laid_out(case, replace(config, student=student, teacher=teacher, sampler=sampler))
        if made is not None:
            found.append(forecast(_with_fraction(made)))
    quickest = min((each.step for each in found), default=1.0)
    found.sort(key=lambda each: (round(each.step / quickest, 2), each.peak[1]))
    return Found([each for each in found if each.fits], [each for each in found if not each.fits])


def _laid_out(case: Case, config: TrainConfig) -> Case | None:
    """The case with another configuration; None if its layout does not divide the models or the ranks."""
    try:
        return case.with_layout(config)
    except UserError:
        return None


def _costs(case: Case, config: TrainConfig) -> Costs | None:
    """Time of a step and memory of each phase; None for an impossible layout."""
    made = _laid_out(case, config)
    if made is None:
        return None
    found = forecast(made)
    return found.step, *(sum(parts.values()) for parts in found.memory.values())


def _worthwhile(options: Iterable[tuple[Option, Costs | None]]) -> list[Option]:
    """Options that no other option beats."""
    known = [(option, costs) for option, costs in options if costs is not None]
    return [option for option, costs in known if not any(_beats(other, costs) for _, other in known)]


def _beats(first: Costs, second: Costs) -> bool:
    return first != second and all(mine <= its for mine, its in zip(first, second, strict=True))


def _students(case: Case) -> Iterator[StudentConfig]:
    for tp, pp, ep in _splits(case, case.student):
        for recompute in (False, True):
            own = case.config.student
            yield replace(own, tp=tp, pp=pp, ep=ep, sequence_parallel=tp > 1, recompute=recompute)


def _teachers(case: Case) -> Iterator[TeacherConfig]:
    if case.config.shared_teacher:  # on the student's grid
        yield case.config.teacher
        return
    for tp, pp, ep in _splits(case, case.teacher):
        yield replace(case.config.teacher, tp=tp, pp=pp, ep=ep)


def _samplers(case: Case) -> Iterator[SamplerConfig]:
    for tp in _divisors(case.cluster.gpus_per_node):
        yield replace(case.config.sampler, tp=tp)


def _splits(case: Case, arch: Architecture) -> Iterator[tuple[int, int, int]]:
    """(tp, pp, ep) that divide the ranks: tensor parallelism inside a node, experts over any ranks of a stage."""
    for tp in _divisors(case.cluster.gpus_per_node):
        for pp in _divisors(case.cluster.world // tp):
            for ep in _divisors(case.cluster.world // pp) if arch.experts else [1]:
                yield tp, pp, ep


def _divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]


def _with_fraction(case: Case) -> Case:
    """The case with as much memory for its engines as they can use, if available."""
    if not case.stack.engine_shares:
        return case
    fraction = min(memory.useful_fraction(case), memory.largest_fraction(case))
    sampler = case.config.sampler
    if fraction > 0:
        sampler = replace(sampler, memory_fraction=fraction)
    return replace(case, config=replace(case.config, sampler=sampler))
