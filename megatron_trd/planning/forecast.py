"""The forecast of a case: memory, time, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_trd.planning import memory, seconds
from megatron_trd.planning.case import Case
from megatron_trd.planning.memory import Parts, Shortfall


@dataclass(frozen=True)
class Forecast:
    """The memory and time that a case will need."""

    case: Case
    memory: dict[str, Parts]  # phase -> parts of its fullest rank, bytes
    seconds: dict[str, Parts]  # phase -> parts of a step
    shortfalls: list[Shortfall]

    @property
    def fits(self) -> bool:
        return not self.shortfalls

    @property
    def worst(self) -> Shortfall:
        """The largest shortfall."""
        return max(self.shortfalls, key=lambda each: each.over)

    @property
    def peak(self) -> tuple[str, float]:
        """The phase that needs the most memory, and its bytes."""
        sums = {phase: sum(parts.values()) for phase, parts in self.memory.items()}
        phase = max(sums, key=sums.__getitem__)
        return phase, sums[phase]

    @property
    def step(self) -> float:
        """Seconds of a step: its phases follow one another."""
        return sum(sum(parts.values()) for parts in self.seconds.values())

    @property
    def hours(self) -> float:
        """Hours of all the recipe's steps."""
        return self.step * self.case.config.steps / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.case.cluster.world

    @property
    def trained_tokens(self) -> float:
        """Response tokens trained on in a step."""
        return self.case.work.samples * self.case.work.mean.response

    @property
    def sampled_tokens(self) -> float:
        """Tokens sampled in a step, in rollouts and refinements."""
        work = self.case.work
        return work.rollouts * (work.mean.rollout + work.refinements * work.mean.response)


def forecast(case: Case) -> Forecast:
    """Memory and time of a case."""
    found = memory.by_phase(case)
    return Forecast(case, found, seconds.by_phase(case), memory.shortfalls(case, found))
