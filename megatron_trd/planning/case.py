"""A recipe on a cluster: all inputs of a forecast."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_trd.config import TrainConfig
from megatron_trd.engines.teacher import check_teacher
from megatron_trd.errors import UserError
from megatron_trd.methods import METHODS, check_threads, engine_sleeps, one_engine
from megatron_trd.models.architecture import Architecture
from megatron_trd.parallel.grid import Layout
from megatron_trd.planning.devices import Cluster, Device, Stack
from megatron_trd.planning.shapes import find_architecture
from megatron_trd.planning.workload import Lengths, Workload, workload


@dataclass(frozen=True)
class Case:
    """A configuration, the shapes of its models, and the cluster it runs on."""

    config: TrainConfig
    cluster: Cluster
    student: Architecture
    teacher: Architecture
    work: Workload

    @property
    def device(self) -> Device:
        return self.cluster.device

    @property
    def stack(self) -> Stack:
        return self.cluster.device.stack

    @property
    def student_layout(self) -> Layout:
        own = self.config.student
        return Layout(own.tp, own.pp, self.cluster.world, own.ep)

    @property
    def teacher_layout(self) -> Layout:
        own = self.config.teacher_grid
        return Layout(own.tp, own.pp, self.cluster.world, own.ep)

    @property
    def refines(self) -> bool:
        return METHODS[self.config.method].refines

    @property
    def engines(self) -> list[Architecture]:
        """Models of a rank's vLLM engines, including the teacher if it refines with an engine of its own."""
        return [self.student] if one_engine(self.config) else [self.student, self.teacher]

    @property
    def sleeps(self) -> bool:
        """Whether the engine releases its memory while Megatron works."""
        return self.stack.engine_shares and engine_sleeps(self.config)

    @property
    def places(self) -> set[tuple[int, int]]:
        """(student's stage, teacher's stage) pairs that occur on ranks."""
        student, teacher = self.student_layout, self.teacher_layout
        return {(student.coordinates(rank)[1], teacher.coordinates(rank)[1]) for rank in range(self.cluster.world)}

    def with_layout(self, config: TrainConfig) -> Case:
        """The same run in another layout. Raises `UserError` if it does not divide the models or the ranks."""
        case = dataclasses.replace(self, config=config)
        case.student.check_layout(config.student.tp, config.student.pp, "student", config.student.ep)
        grid = config.teacher_grid
        case.teacher.check_layout(grid.tp, grid.pp, "teacher", grid.ep)
        for arch in case.engines:
            arch.check_layout(config.sampler.tp, 1, "sampler")
        if not case.stack.threads_communicate:
            check_threads(config)
        _ = case.student_layout, case.teacher_layout  # raise if they do not divide the ranks
        config.sampler.groups(self.cluster.world)
        return case


def make_case(config: TrainConfig, cluster: Cluster, mean: Lengths) -> Case:
    """Find the models' shapes and check the recipe's own layout. Raises `UserError`."""
    student = find_architecture(config.model, "model")
    teacher = find_architecture(config.teacher.model, "teacher.model") if config.teacher.model else student
    check_teacher(student, teacher)
    teacher = dataclasses.replace(teacher, vocab_size=student.vocab_size)
    work = workload(config, mean)
    for key, arch in (("model", student), ("teacher.model", teacher)):
        if work.context > arch.max_positions:
            raise UserError(
                f"the longest prompt and response are {work.context} tokens, the context of {key} is "
                f"{arch.max_positions}: lower data.max_prompt_tokens or sampler.max_rollout_tokens"
            )
    config = dataclasses.replace(config, world_size=cluster.world)
    return Case(config, cluster, student, teacher, work).with_layout(config)
