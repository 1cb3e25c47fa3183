"""Sequences of a step and their lengths: the longest for memory and the mean for time."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_trd.config import TrainConfig
from megatron_trd.errors import UserError
from megatron_trd.methods import METHODS
from megatron_trd.training.checks import prompt_limit

# Means as shares of the maxima, unless the user gives better ones. Ours: reasoning models fill about half of a limit
# chosen to hold them; problems with their template, and reference solutions, are far below theirs.
RESPONSE_SHARE = 0.5
PROMPT_SHARE = 0.1


@dataclass(frozen=True)
class Lengths:
    """Tokens of one trajectory."""

    prompt: float  # the student's
    teacher_prompt: float
    rollout: float
    response: float  # trained on: the refinement, or the rollout itself

    @property
    def student(self) -> float:
        """Tokens of the student's training sequence."""
        return self.prompt + self.response

    @property
    def teacher(self) -> float:
        """Tokens of the teacher's sequence, and of its refinement in the sampler."""
        return self.teacher_prompt + self.response


@dataclass(frozen=True)
class Workload:
    """A step's trajectories."""

    rollouts: int
    refinements: int  # of each rollout; 0: the rollout itself is trained on
    longest: Lengths
    mean: Lengths

    @property
    def samples(self) -> int:
        """Sequences trained on."""
        return self.rollouts * max(1, self.refinements)

    @property
    def context(self) -> int:
        """Tokens that an engine must have room for."""
        return int(max(self.longest.prompt + self.longest.rollout, self.longest.student, self.longest.teacher))

    def of_replica(self, replicas: int) -> int:
        """Number of samples of the replica that has the most."""
        return -(-self.samples // replicas)

    def busiest_share(self, mean: float, longest: float, replicas: int) -> float:
        """Samples of `mean` tokens that the busiest replica processes: an even share of all, or the longest one alone
        if that is more."""
        return max(self.samples / replicas, longest_of(self.samples, mean, longest) / mean)


def longest_of(count: int, mean: float, limit: float) -> float:
    """The longest of `count` lengths that are spread evenly around their mean, as widely as `limit` allows."""
    half = min(mean, limit - mean)
    return mean - half + 2 * half * count / (count + 1)


def longest_lengths(config: TrainConfig) -> Lengths:
    """The longest lengths that the configuration allows."""
    method, sampler = METHODS[config.method], config.sampler
    return Lengths(
        prompt=prompt_limit(config, "vanilla"),
        teacher_prompt=prompt_limit(config, method.teacher_context),
        rollout=sampler.max_rollout_tokens,
        response=sampler.max_refinement_tokens if method.refines else sampler.max_rollout_tokens,
    )


def mean_lengths(config: TrainConfig, response: int | None = None) -> Lengths:
    """Mean lengths if responses, rollouts and refinements alike, have `response` tokens. Raises `UserError`."""
    context, longest = METHODS[config.method].teacher_context, longest_lengths(config)
    limit = min(longest.rollout, longest.response)
    mean = RESPONSE_SHARE * limit if response is None else response
    if not 0 < mean <= limit:
        raise UserError(f"--mean-response {response}: responses have 1 to {limit:.0f} tokens in this recipe")
    prompt = PROMPT_SHARE * longest.prompt
    reference = PROMPT_SHARE * config.data.max_reference_tokens if "reference" in context else 0.0
    return Lengths(prompt, prompt + reference + (mean if "refine" in context else 0.0), mean, mean)


def workload(config: TrainConfig, mean: Lengths) -> Workload:
    """The workload of one step of the configuration."""
    refinements = config.refinements_per_rollout if METHODS[config.method].refines else 0
    return Workload(config.batch_size * config.rollouts_per_problem, refinements, longest_lengths(config), mean)
