"""Rollouts and refinements of a step, streamed over all sampler groups.

A refinement is queued as soon as its rollout ends. Groups meet every few engine steps and distribute waiting requests,
longest expected first, so that none idles while another has a queue. Each request has its own seed, drawn from (run
seed, step, problem, rollout, kind), so its tokens do not depend on where it runs or on what runs with it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from megatron_trd import platform
from megatron_trd.config import TrainConfig
from megatron_trd.data.problems import Problem
from megatron_trd.engines.engine import Completion, Engine
from megatron_trd.engines.work import Capacity, Expectation, Load, Task, assign, at_once, name_of
from megatron_trd.errors import UserError
from megatron_trd.parallel.objects import from_all

_ROUND = 16  # engine steps between two meetings of the groups
_SPARE = 8  # a group takes 1/8 more requests than can run at once, so that its batch stays full until the next meeting


@dataclass(frozen=True)
class Trajectory:
    """One rollout and, for TRD, one refinement of it."""

    problem: Problem
    index: int  # of the rollout in the step's list; all refinements of a rollout share it
    rollout: Completion
    refine_prompt: tuple[int, ...] | None = None
    refinement: Completion | None = None


# Refinement prompt of a finished rollout; None if it is too long and the configuration drops it.
RefinePrompt = Callable[[Problem, Completion], list[int] | None]


# Called with trajectories as they finish.
Finished = Callable[[Sequence[Trajectory]], None]

# Gives the engine the teacher's weights.
ToTeacher = Callable[[], None]


class EngineDied(UserError):
    """A vLLM engine failed on some rank; all ranks know it, and none is in a collective."""

    exit_code = 1  # not the user's fault: a job may start again


def request_seed(*parts: object) -> int:
    """A 63-bit seed from the parts that identify a request."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class _Report:
    """What a group reports to the others at a meeting."""

    load: Load
    new: list[Task]  # refinements that it did not start itself
    done: list[tuple[Task, Completion]]
    overdue: list[str]  # requests that have run for too long
    failure: str | None


@dataclass
class _Group:
    """This group's part of a step."""

    running: dict[str, tuple[Task, float]] = field(default_factory=dict)  # and its start time, seconds
    new: list[Task] = field(default_factory=list)
    done: list[tuple[Task, Completion]] = field(default_factory=list)
    retried: set[str] = field(default_factory=set)
    failure: str | None = None
    idle: float = 0.0  # seconds spent at meetings, waiting for the others
    idle_queued: float = 0.0  # of these, while requests waited for room
    changing: float = 0.0  # seconds spent loading the teacher's weights into the engine

    @property
    def load(self) -> Load:
        return Load(len(self.running), sum(task.tokens for task, _ in self.running.values()))

    def report(self, timeout: float | None) -> _Report:
        """What has happened since the last meeting; nothing is reported twice."""
        now = time.monotonic()
        overdue = [name for name, (_, since) in self.running.items() if timeout and now - since > timeout]
        again = next((name for name in overdue if name in self.retried), None)
        failure = self.failure or (f"request {again} ran for {timeout} s, twice" if again else None)
        report = _Report(self.load, self.new, self.done, overdue, failure)
        self.new, self.done = [], []
        return report


class Sampler:
    """Samples a step's trajectories over all ranks with the student's engine and, where it differs, the teacher's."""

    def __init__(self, config: TrainConfig, student: Engine, teacher: Engine) -> None:
        self.config, self.settings = config, config.sampler
        self.student, self.teacher = student, teacher
        self.group = dist.get_rank() // self.settings.tp
        self.groups = self.settings.groups(dist.get_world_size())
        # groups exchange their reports on the host
        self._meeting = dist.new_group(backend="gloo", timeout=platform.PATIENCE)
        self.stats: dict[str, float] = {}  # of the newest step, over all groups

    @property
    def engines(self) -> list[Engine]:
        """This rank's engines, each once."""
        return [self.student] if self.teacher is self.student else [self.student, self.teacher]

    def sample(
        self,
        step: int,
        problems: Sequence[Problem],
        prompts: Sequence[Sequence[int]],
        refine_prompt: RefinePrompt | None,
        finished: Finished | None = None,
        to_teacher: ToTeacher | None = None,
    ) -> list[Trajectory]:
        """The trajectories of each problem in order, the same list on every rank. Collective.

        With `refine_prompt`, each rollout is refined as soon as it ends (without `sampler.stream`: when all have
        ended), `refinements_per_rollout` times; without it, trajectories are raw. `finished` is called with finished
        trajectories while others are still being sampled, the same ones in the same order on every rank. `to_teacher`,
        where one engine serves both, is called on every rank between the last rollout and the first refinement. Raises
        `EngineDied` on every rank if an engine failed: after `restart` and a refit, repeating the call gives the tokens
        that this one would have given.
        """
        for engine in self.engines:
            engine.forget()
        begin, before = time.perf_counter(), self._preemptions
        sampling = _Step(self, step, problems, prompts, refine_prompt, finished, to_teacher)
        group = sampling.run()
        seconds = max(time.perf_counter() - begin - group.changing, 1e-9)
        mine = {
            "sampler/idle": group.idle / seconds / self.groups,
            "sampler/idle_queued": group.idle_queued / seconds / self.groups,
            "sampler/preemptions": self._preemptions - before,
            "sampler/retried": len(group.retried),
        }
        everyone = self.tell(mine)
        self.stats = {key: sum(stats[key] for stats in everyone) for key in mine}
        return list(sampling.trajectories())

    @property
    def _preemptions(self) -> int:
        return sum(engine.preemptions for engine in self.engines)

    def restart(self) -> None:
        """Replace all engines with new ones without weights. Collective."""
        for engine in self.engines:
            engine.restart()

    def tell(self, what: Any) -> list[Any]:
        """Gather `what` from each group's first rank, by group. Collective."""
        return from_all(what, self._meeting)[:: self.settings.tp]


class _Step:
    """One step's sampling on this rank."""

    def __init__(
        self,
        sampler: Sampler,
        step: int,
        problems: Sequence[Problem],
        prompts: Sequence[Sequence[int]],
        refine_prompt: RefinePrompt | None,
        finished: Finished | None,
        to_teacher: ToTeacher | None,
    ) -> None:
        self.sampler, self.step, self.problems, self.refine_prompt = sampler, step, problems, refine_prompt
        self.finished, self.to_teacher = finished, to_teacher
        self.settings = sampler.settings
        self.stream = self.settings.stream and to_teacher is None
        limit = self.settings.max_rollout_tokens
        self.waiting = [Task("rollout", index, 0, tuple(prompt), limit) for index, prompt in enumerate(prompts)]
        self.refinements = sampler.config.refinements_per_rollout if refine_prompt else 0
        self.expected = Expectation(self.refinements)
        most = self.settings.max_sequences
        self.capacity = Capacity(most + most // _SPARE, self.settings.max_running_tokens)
        self.group = _Group()
        self.done: dict[str, tuple[Task, Completion]] = {}  # in all groups, by task name

    def run(self) -> _Group:
        """Alternate engine steps and meetings until all groups are done."""
        while share := self._meet():
            for _ in range(_ROUND):
                for name, completion in self._advance():
                    self._finish(self.group.running.pop(name)[0], completion, share)
        return self.group

    def _meet(self) -> int:
        """Report to the others and start this group's tasks; returns the mean requests per group, 0: done."""
        group, begin = self.group, time.perf_counter()
        reports: list[_Report] = self.sampler.tell(group.report(self.settings.request_timeout))
        seconds = time.perf_counter() - begin
        group.idle += seconds
        group.idle_queued += seconds if self._ready() else 0.0
        for failure in (report.failure for report in reports if report.failure):
            raise EngineDied(failure)
        for name in reports[self.sampler.group].overdue:
            task, _ = group.running[name]
            self._engine(task).abort([name])
            group.retried.add(name)
            self._begin(task)
        self.waiting += [task for report in reports for task in report.new]
        self._note([done for report in reports for done in report.done])
        if self.to_teacher and self.rollouts_done and self.waiting:
            begin, to_teacher, self.to_teacher = time.perf_counter(), self.to_teacher, None
            to_teacher()
            group.changing = time.perf_counter() - begin
        loads = [report.load for report in reports]
        given = assign(self._ready(), loads, self.capacity, self.expected)
        for task in given[self.sampler.group]:
            self._begin(task)
        total = len(self.waiting) + sum(load.requests for load in loads)
        taken = {task.name for tasks in given for task in tasks}
        self.waiting = [task for task in self.waiting if task.name not in taken]
        return -(-total // len(loads))

    def _note(self, done: Sequence[tuple[Task, Completion]]) -> None:
        """Record what has finished in any group."""
        self.done |= {task.name: (task, completion) for task, completion in done}
        rollouts = [(task, completion) for task, completion in done if task.kind == "rollout"]
        self.expected.lengths += [len(completion.tokens) for _, completion in rollouts]
        if self.finished:
            last = rollouts if self.refine_prompt is None else [(t, c) for t, c in done if t.kind == "refinement"]
            self.finished([self._trajectory(task, completion) for task, completion in last])

    def _trajectory(self, task: Task, completion: Completion) -> Trajectory:
        problem = self.problems[task.index]
        if task.kind == "rollout":
            return Trajectory(problem, task.index, completion)
        return Trajectory(problem, task.index, self.done[name_of("rollout", task.index)][1], task.prompt, completion)

    def trajectories(self) -> Iterator[Trajectory]:
        """All finished trajectories in the problems' order; a rollout that could not be refined is one too."""
        for index in range(len(self.problems)):
            names = [name_of("refinement", index, number) for number in range(self.refinements)]
            refined = [name for name in names if name in self.done]
            for name in refined or [name_of("rollout", index)]:
                yield self._trajectory(*self.done[name])

    @property
    def rollouts_done(self) -> bool:
        return len(self.expected.lengths) == len(self.problems)

    def _ready(self) -> list[Task]:
        """Waiting tasks that may start: without streaming, refinements wait for the last rollout."""
        if self.stream or self.rollouts_done:
            return self.waiting
        return [task for task in self.waiting if task.kind == "rollout"]

    def _advance(self) -> list[tuple[str, Completion]]:
        """Run one step of this rank's engines; returns what finished. Does nothing once one has failed."""
        if self.group.failure:
            return []
        try:
            return [found for engine in self.sampler.engines if engine.busy for found in engine.step()]
        except Exception as error:
            # The ranks of one engine may be waiting for each other inside it. The job then ends, to be resumed.
            if self.settings.tp > 1:
                raise
            self.group.failure = f"{type(error).__name__}: {error}"
            return []

    def _finish(self, task: Task, completion: Completion, share: int) -> None:
        self.group.done.append((task, completion))
        if task.kind == "refinement" or self.refine_prompt is None:
            return
        length = len(completion.tokens)
        prompt = self.refine_prompt(self.problems[task.index], completion)
        for number in range(self.refinements if prompt else 0):
            limit = self.settings.max_refinement_tokens
            refinement = Task("refinement", task.index, number, tuple(prompt or ()), limit, length)
            load, room = self.group.load, self.capacity.with_share(share)
            if self.stream and at_once(refinement, load, room, self.waiting, self.expected):
                self._begin(refinement)
            else:
                self.group.new.append(refinement)

    def _begin(self, task: Task) -> None:
        problem = self.problems[task.index].index
        further = [task.number] if task.number else []  # the first refinement's seed does not depend on how many follow
        seed = request_seed(self.sampler.config.seed, self.step, problem, task.index, task.kind, *further)
        self.group.running[task.name] = task, time.monotonic()
        self._engine(task).add(task, seed, self.settings)

    def _engine(self, task: Task) -> Engine:
        return self.sampler.student if task.kind == "rollout" else self.sampler.teacher
