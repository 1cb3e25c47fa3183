"""Decides which sampler group runs which request, identically on every rank from shared information.

Groups meet after a fixed number of engine steps, not after a fixed time. Which requests share a batch, and with it
every bit of what is sampled, therefore depends only on the run's seed and weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Literal

Kind = Literal["rollout", "refinement"]


def name_of(kind: Kind, index: int, number: int = 0) -> str:
    """The name of a rollout of a step's list, or of a refinement of it."""
    return f"{kind}/{index}/{number}"


@dataclass(frozen=True)
class Task:
    """One request to a sampler: a rollout of the step's list, or a refinement of one."""

    kind: Kind
    index: int  # of the rollout in the step's list
    number: int  # which refinement of it
    prompt: tuple[int, ...]
    limit: int  # tokens that may be sampled
    length: int | None = None  # expected tokens, if anything is known about them

    @property
    def name(self) -> str:
        return name_of(self.kind, self.index, self.number)

    @property
    def tokens(self) -> int:
        """Maximum number of tokens that it can hold in the KV cache."""
        return len(self.prompt) + self.limit


@dataclass(frozen=True)
class Load:
    """What a group has accepted and not finished."""

    requests: int = 0
    tokens: int = 0  # maximum that they can hold


@dataclass(frozen=True)
class Capacity:
    """Limits on what a group may accept."""

    requests: int
    tokens: int | None

    def with_share(self, share: int) -> Capacity:
        """This capacity, limited to `share` requests."""
        return replace(self, requests=min(self.requests, share))

    def admits(self, load: Load, task: Task) -> bool:
        """Whether a group with this load may accept `task`; an empty group accepts even one too large for any."""
        if load.requests == 0:
            return True
        return load.requests < self.requests and (self.tokens is None or load.tokens + task.tokens <= self.tokens)


@dataclass
class Expectation:
    """How long a task will keep a group busy, estimated from the rollouts finished in this step."""

    refinements: int  # of each rollout
    lengths: list[int] = field(default_factory=list)

    def __call__(self, task: Task) -> float:
        """Expected tokens of a task and what follows from it: a refinement is about as long as its rollout."""
        length = task.length or (fmean(self.lengths) if self.lengths else task.limit)
        return length * (2 if task.kind == "rollout" and self.refinements else 1)


def assign(
    waiting: Sequence[Task], loads: Sequence[Load], capacity: Capacity, expected: Expectation
) -> list[list[Task]]:
    """The waiting tasks that each group is to start.

    Longest first, each goes to the group with the fewest requests that has room for it.
    """
    given: list[list[Task]] = [[] for _ in loads]
    now = list(loads)
    for task in sorted(waiting, key=lambda task: (-expected(task), task.index, task.number)):
        room = [group for group, load in enumerate(now) if capacity.admits(load, task)]
        if room:
            group = min(room, key=lambda group: (now[group].requests, now[group].tokens, group))
            given[group].append(task)
            now[group] = Load(now[group].requests + 1, now[group].tokens + task.tokens)
    return given


def at_once(task: Task, load: Load, room: Capacity, waiting: Sequence[Task], expected: Expectation) -> bool:
    """Whether a group starts the refinement of a rollout it has finished before the groups meet again.

    It does not if it has no `room`, which is limited to its share of the requests so that others get more, or if a
    longer task has been waiting for room.
    """
    return room.admits(load, task) and expected(task) >= max(map(expected, waiting), default=0.0)
