"""Problems -> prompts -> training samples, and metrics of a step's trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch.distributed as dist

from megatron_trd.config import TrainConfig
from megatron_trd.data.batching import Sample, normalize
from megatron_trd.data.problems import Problem, shown_answer
from megatron_trd.data.prompts import Context, PromptBuilder
from megatron_trd.engines.engine import Completion
from megatron_trd.engines.sampler import Trajectory
from megatron_trd.evaluation.grading import are_correct
from megatron_trd.methods import METHODS
from megatron_trd.parallel.objects import from_first
from megatron_trd.reporting.pairs import kept_lines
from megatron_trd.training.checks import prompt_limit


@dataclass
class SampleBuilder:
    """Makes the prompts of a step and turns its trajectories into training samples.

    Prompts over their limit are cut inside the reference or the rollout, or the sample is dropped, as `data.overlong`
    says; `metrics` counts both. Ranks refine different rollouts, so `metrics` counts on the trajectories, which every
    rank has, and not on the calls made on this rank.
    """

    config: TrainConfig
    prompts: PromptBuilder  # with the student's chat template
    teacher_prompts: PromptBuilder  # with the teacher's
    # Verdicts on this step's completions, by completion and problem.
    _graded: dict[tuple[Completion, int], bool] = field(default_factory=dict)

    def begin(self, problems: Sequence[Problem]) -> tuple[list[Problem], list[list[int]], int]:
        """Problems to sample, each repeated once per rollout, their vanilla prompts, and how many of `problems` had a
        prompt that was dropped or cut."""
        kept, prompts, too_long = [], [], 0
        for problem in problems:
            ids = self.prompts.ids("vanilla", problem.problem)
            teacher, over = self._raw_teacher_prompt(problem)
            fits = len(ids) <= prompt_limit(self.config, "vanilla")
            too_long += over or not fits
            if fits and teacher is not None:
                kept += [problem] * self.config.rollouts_per_problem
                prompts += [ids] * self.config.rollouts_per_problem
        return kept, prompts, too_long

    def refine_prompt(self, problem: Problem, rollout: Completion) -> list[int] | None:
        """Teacher prompt that shows the rollout; None if it is too long and must be dropped."""
        method = METHODS[self.config.method]
        return self._fit(method.teacher_context, problem, rollout.body)[0]

    def samples(self, trajectories: Sequence[Trajectory]) -> list[Sample]:
        """Training samples of the trajectories kept by the length and corpus filters, with normalised token weights."""
        self._graded.clear()
        samples = [self.sample(trajectory) for trajectory in self._corpus(trajectories)]
        kept = [sample for sample in samples if sample is not None]
        return normalize(kept, self.config.loss.normalize) if kept else []

    def sample(self, trajectory: Trajectory) -> Sample | None:
        """The training sample of a trajectory, without its weight; None if there is nothing to train on."""
        method = METHODS[self.config.method]
        response = trajectory.refinement if method.refines else trajectory.rollout
        teacher = trajectory.refine_prompt if method.refines else self._raw_teacher_prompt(trajectory.problem)[0]
        if response is None or teacher is None or not response.tokens:
            return None
        if response.truncated and self.config.data.overlong == "drop":
            return None
        student = self.prompts.ids("vanilla", trajectory.problem.problem)
        return Sample(tuple(student), tuple(teacher), response.tokens, response.log_probs)

    def rollouts(self, trajectories: Sequence[Trajectory], count: int) -> list[Sample]:
        """The first `count` rollouts of a step, each with the first `log.drift_tokens` of its tokens, for measuring
        drift, not for training."""
        samples, most = [], self.config.log.drift_tokens
        for trajectory in self.rolled_out(trajectories)[:count]:
            rollout, prompt = trajectory.rollout, self.prompts.ids("vanilla", trajectory.problem.problem)
            if rollout.tokens and most:
                samples.append(Sample(tuple(prompt), (), rollout.tokens[:most], rollout.log_probs[:most]))
        return samples

    @staticmethod
    def rolled_out(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """One trajectory for each rollout, however often it was refined."""
        return list({trajectory.index: trajectory for trajectory in trajectories}.values())

    def _corpus(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """For ablations: only the trajectories whose rollout or refinement is (not) right. Collective if there are
        ranks.

        Rank 0 decides for all: a comparison that times out on one rank alone must not give ranks different samples.
        """
        corpus = self.config.corpus
        if corpus == "all":
            return list(trajectories)
        ranks, kept = dist.is_initialized(), []
        if not ranks or dist.get_rank() == 0:
            self._grade(trajectories)
            rights = {
                "rollout_wrong": lambda before, after: not before,
                "refinement_right": lambda before, after: bool(after),
                "corrected": lambda before, after: not before and bool(after),
            }[corpus]
            kept = [rights(*self.right(trajectory)) for trajectory in trajectories]
        kept = from_first(kept) if ranks else kept
        return [trajectory for trajectory, keep in zip(trajectories, kept, strict=True) if keep]

    def _raw_teacher_prompt(self, problem: Problem) -> tuple[list[int] | None, bool]:
        """Teacher prompt of a raw trajectory, and whether it was too long. A refined one has none yet: its prompt is
        empty, or None if it will be dropped."""
        method = METHODS[self.config.method]
        if not method.refines:
            return self._fit(method.teacher_context, problem)
        _, over = self._reference(method.teacher_context, problem)
        return (None if over and self.config.data.overlong == "drop" else []), over

    def _reference(self, context: Context, problem: Problem) -> tuple[str | None, bool]:
        """The reference shown to the teacher, cut to its own limit, and whether it had to be cut."""
        reference = problem.reference if "reference" in context else None
        over = self.teacher_prompts.count(reference) - self.config.data.max_reference_tokens if reference else 0
        return (self.teacher_prompts.cut(reference, over), True) if reference and over > 0 else (reference, False)

    def _fit(
        self, context: Context, problem: Problem, rollout: Sequence[int] | None = None
    ) -> tuple[list[int] | None, bool]:
        """A teacher's prompt within its limit, or None if it is dropped; and whether it was too long."""
        limit = prompt_limit(self.config, context)
        prompts, drop = self.teacher_prompts, self.config.data.overlong == "drop"
        reference, cut = self._reference(context, problem)
        if cut and drop:
            return None, True
        ids = prompts.ids(context, problem.problem, reference, rollout)
        over = len(ids) - limit
        if over <= 0:
            return ids, cut
        if drop:
            return None, True
        if rollout is not None:
            rollout = rollout[: max(0, len(rollout) - over)]
            ids = prompts.ids(context, problem.problem, reference, rollout)
        # repeats if the shortened text is tokenized into more tokens than were kept
        while len(ids) > limit and reference:
            reference = prompts.cut(reference, len(ids) - limit)
            ids = prompts.ids(context, problem.problem, reference, rollout)
        return (ids if len(ids) <= limit else None), True

    def right(self, trajectory: Trajectory) -> tuple[bool | None, bool | None]:
        """Whether rollout and refinement have the right answer; None where there is nothing to grade."""
        self._grade([trajectory])
        index = trajectory.problem.index
        completions = (trajectory.rollout, trajectory.refinement)
        before, after = (self._graded.get((one, index)) if one is not None else None for one in completions)
        return before, after

    def _grade(self, trajectories: Sequence[Trajectory]) -> None:
        """Grade what has not been graded in this step yet, all at once: one comparison or program may take seconds."""
        waiting: dict[tuple[Completion, int], tuple[str, str]] = {}
        for trajectory in trajectories:
            problem = trajectory.problem
            for completion in filter(None, (trajectory.rollout, trajectory.refinement)):
                if problem.answer is not None and (completion, problem.index) not in self._graded:
                    waiting[completion, problem.index] = (self.text(completion), problem.answer)
        self._graded |= zip(waiting, are_correct(self.config.data, list(waiting.values())), strict=True)

    def text(self, completion: Completion) -> str:
        """A completion as text, without special tokens."""
        return self.prompts.decode(completion.tokens)

    def metrics(self, trajectories: Sequence[Trajectory], samples: Sequence[Sample]) -> dict[str, float]:
        """Lengths, correctness before and after refinement, overflow and edit ratio of a step."""
        refined = [trajectory.refinement for trajectory in trajectories if trajectory.refinement is not None]
        rolled_out = self.rolled_out(trajectories)
        self._grade(trajectories)
        values: dict[str, float] = {
            "samples/trained": len(samples),
            "tokens/trained": sum(len(sample.response) for sample in samples),
            "overflow/refinement_prompt": sum(map(self._refine_prompt_too_long, rolled_out)),
            "overflow/rollout": sum(trajectory.rollout.truncated for trajectory in rolled_out),
            "overflow/refinement": sum(completion.truncated for completion in refined),
        }
        means: dict[str, list[float]] = {
            "length/rollout": [len(trajectory.rollout.tokens) for trajectory in rolled_out],
            "length/refinement": [len(completion.tokens) for completion in refined],
            "right/rollout": [float(before) for before, _ in map(self.right, rolled_out) if before is not None],
            "right/refinement": [float(after) for _, after in map(self.right, trajectories) if after is not None],
            "edit_ratio": [self._edit_ratio(trajectory) for trajectory in trajectories if trajectory.refinement],
        }
        return values | {key: fmean(numbers) for key, numbers in means.items() if numbers}

    def _refine_prompt_too_long(self, trajectory: Trajectory) -> bool:
        method = METHODS[self.config.method]
        return method.refines and self._fit(method.teacher_context, trajectory.problem, trajectory.rollout.body)[1]

    def _edit_ratio(self, trajectory: Trajectory) -> float:
        """Share of lines that refinement changed: 0 for a copy, 1 for a text that keeps no line of the rollout."""
        assert trajectory.refinement is not None
        before, after = self.text(trajectory.rollout).splitlines(), self.text(trajectory.refinement).splitlines()
        lines = len(before) + len(after)
        return 1.0 - 2 * len(kept_lines(before, after)) / lines if lines else 0.0

    def pair(self, trajectory: Trajectory) -> dict[str, Any]:
        """A y_o / y_r pair in the form stored in the run folder."""
        before, after = self.right(trajectory)
        return {
            "problem": trajectory.problem.problem,
            "reference": trajectory.problem.reference,
            "answer": shown_answer(self.config.data, trajectory.problem),
            "rollout": self.text(trajectory.rollout),
            "refinement": self.text(trajectory.refinement) if trajectory.refinement else None,
            "rollout_right": before,
            "refinement_right": after,
        }
