"""Held-out problems: the student is evaluated on them between steps and never trained on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_trd.config import TrainConfig
from megatron_trd.data.problems import Problem
from megatron_trd.data.prompts import PromptBuilder
from megatron_trd.engines.sampler import Trajectory
from megatron_trd.evaluation.responses import score


class HeldOut:
    """`held_out.*` of a run: the problems, when they are evaluated, and the scores.

    Responses use the same seeds each time, so scores of two steps differ only because of the weights.
    """

    def __init__(self, config: TrainConfig, problems: Sequence[Problem], prompts: PromptBuilder) -> None:
        self.config, self._builder = config, prompts
        samples, asked = config.held_out.samples, [prompts.ids("vanilla", problem.problem) for problem in problems]
        self.problems = [problem for problem in problems for _ in range(samples)]
        self.prompts = [ids for ids in asked for _ in range(samples)]

    def due(self, steps_done: int) -> bool:
        """Whether the student is evaluated after `steps_done` steps."""
        every = self.config.held_out.every
        at_an_end = steps_done in (0, self.config.steps)
        return bool(self.problems) and (at_an_end or (every > 0 and steps_done % every == 0))

    def scores(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """`held_out/…` numbers of the responses to `problems`, in their order."""
        found = score(
            self.config.data, self._builder, trajectories, self.config.held_out.samples, seed=self.config.seed
        )
        return {f"held_out/{key}": value for key, value in _flat(found)}

    def line(self, steps_done: int, scores: dict[str, float]) -> str:
        """The scores as a line of progress output."""
        k = self.config.held_out.samples
        average, low, high = (scores[f"held_out/avg@{k}{end}"] for end in ("", "/low", "/high"))
        passed = f", pass@{k} {scores[f'held_out/pass@{k}']:.1%}" if k > 1 else ""
        texts = f"avg@{k} {average:.1%} ({low:.1%} to {high:.1%}){passed}"
        return f"held out, after {steps_done} steps: {texts}, {scores['held_out/seconds']:.1f} s"


def _flat(scores: dict[str, object]) -> Iterator[tuple[str, float]]:
    """Each score under its name, and the ends of its interval under `<name>/low` and `<name>/high`."""
    for key, value in scores.items():
        if isinstance(value, dict):
            yield key, value["value"]
            yield from ((f"{key}/{end}", value[end]) for end in ("low", "high"))
        elif isinstance(value, float):
            yield key, value
