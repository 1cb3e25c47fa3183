"""Assembles a run: the engines, the data and the writers, each created once and in the required order."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_trd import platform
from megatron_trd.config import TrainConfig
from megatron_trd.data.batching import Sample, deal
from megatron_trd.data.prompts import PromptBuilder
from megatron_trd.engines.sampler import Trajectory
from megatron_trd.engines.student import StepResult, StudentEngine
from megatron_trd.engines.teacher import TeacherEngine
from megatron_trd.errors import UserError
from megatron_trd.methods import METHODS
from megatron_trd.parallel.grid import student_grid
from megatron_trd.reporting.metrics import HELD_OUT_FILE, MetricsWriter, SampleWriter, read_metrics
from megatron_trd.reporting.progress import Progress
from megatron_trd.reporting.wandb_run import open_wandb
from megatron_trd.training import checkpoint
from megatron_trd.training.checks import Inputs, check
from megatron_trd.training.held_out import HeldOut
from megatron_trd.training.phases import Phases
from megatron_trd.training.samples import SampleBuilder
from megatron_trd.training.sampling import Sampled, Sampling, sampled_from_json
from megatron_trd.training.signals import StopRequest


class Run:
    """One training run on this rank: the operations that `training.loop` is written in."""

    def __init__(self, config: TrainConfig, inputs: Inputs | None = None, *, resume: bool = False) -> None:
        """`inputs`: where they have been checked already."""
        self.config = config
        self.method = METHODS[config.method]
        self.stop = StopRequest()
        self.inputs = inputs or check(config, grades=dist.get_rank() == 0)
        begin, current = time.perf_counter(), platform.current()
        current.set_up()
        torch.manual_seed(config.seed)
        grid = student_grid(config.student.tp, config.student.pp, config.student.ep, seed=config.seed)
        for model in sorted({self.inputs.student.path, self.inputs.teacher.path}):
            checkpoint.check_files(model)
        self.student = StudentEngine(config, self.inputs.student, grid)
        self.teacher = TeacherEngine(config, self.student, self.inputs.teacher)
        self.steps_done = checkpoint.resume(config.run_dir, self.student, self.teacher) if resume else 0
        prompts = PromptBuilder.of(self.inputs.student.folder, config.data)
        own = config.teacher.chat_template_kwargs
        teacher_prompts = PromptBuilder.of(self.inputs.teacher.folder, config.data, own)
        self.builder = SampleBuilder(config, prompts, teacher_prompts)
        self.held_out = HeldOut(config, self.inputs.held_out, prompts)
        # An engine starts only if its share of the memory is free, which requires these to be offloaded.
        self.student.offload()
        self.teacher.offload()
        current.release_memory()
        self.phases = Phases()
        asks = self.held_out.due(self.steps_done)
        self._writers = _Writers(config, self.steps_done, asks=asks) if dist.get_rank() == 0 else None
        # Logged beforehand too: on a GPU the sampler compiles and captures graphs, which takes long.
        self.note(f"models loaded in {time.perf_counter() - begin:.1f} s, starting the sampler")
        begin = time.perf_counter()
        self.sampling = Sampling(
            config, self.inputs, self.student, self.teacher, self.builder, self.phases, note=self.note
        )
        self.note(f"sampler started in {time.perf_counter() - begin:.1f} s")
        if self.steps_done and (ahead := checkpoint.sampled_ahead(config.run_dir, self.steps_done)):
            self.sampling.restore(sampled_from_json(ahead))

    def evaluate(self, steps_done: int) -> None:
        """Evaluate the student on the held-out problems, if there are any and evaluation is due. Collective."""
        if not self.held_out.due(steps_done):
            return
        self.teacher.forget()  # the step's hidden states occupy memory that the engine needs
        responses = self.sampling.ask(self.held_out.problems, self.held_out.prompts)
        seconds = sum(self.phases.seconds.values())
        self.phases.metrics()  # so that none of it counts for the next step
        if self._writers is not None and self._writers.held_out is not None:
            scores = self.held_out.scores(responses) | {"held_out/seconds": seconds}
            self._writers.held_out.write(steps_done, scores)
            self.note(self.held_out.line(steps_done, scores))
        dist.barrier()  # grading may take long, and this group has the longest timeout

    def sample(self, step: int) -> Sampled:
        """A step's trajectories and what was measured of them. Collective."""
        self.teacher.forget()
        sampled = self.sampling.take(step)
        # If the teacher refines, what is trained on says nothing about the student's sampler.
        drift = self._rollout_drift(sampled.trajectories) if self.method.refines else None
        return dataclasses.replace(sampled, drift=drift)

    def _rollout_drift(self, trajectories: list[Trajectory]) -> float | None:
        rollouts = self.builder.rollouts(trajectories, self.student.grid.layout.dp)
        if not rollouts:
            return None
        with self.phases.measure("train"):
            return self.student.rollout_drift(rollouts)

    def shares(self, samples: list[Sample]) -> list[list[int]]:
        """Sample indices of each student replica, balanced by length."""
        return deal(samples, self.student.grid.layout.dp, cost=lambda sample: len(sample.tokens("student")))

    def log(self, step: int, sampled: Sampled, samples: list[Sample], results: list[StepResult]) -> None:
        """Write a finished step's metrics and samples (rank 0); `results` holds one entry for each epoch over them.

        Raises `UserError` on every rank for a drift above `log.max_drift`.
        """
        metrics: dict[str, Any] = {}
        if self._writers is not None:
            with self.phases.measure("grade"):
                metrics = self.builder.metrics(sampled.trajectories, samples)
        measured = self.phases.metrics()
        if self._writers is not None:
            metrics |= {"overflow/prompt": sampled.too_long, "staleness": step - sampled.weights}
            metrics |= _trained(results) | measured | self.sampling.metrics | sampled.stats
            metrics |= {} if sampled.drift is None else {"drift/rollout": sampled.drift}
            metrics |= dict(self._throughput(sampled, metrics, len(results)))
            shown = sampled.trajectories[: self.config.log.samples_per_step]
            pairs = [self.builder.pair(trajectory) for trajectory in shown]
            self._writers.write(step, metrics, pairs)
        # A model that was updated after it sampled has different log-probabilities, which is no error.
        on_policy = sampled.weights == step
        drifts = {"rollouts": sampled.drift if on_policy else None}
        if results and (on_policy or (self.method.refines and self.config.frozen_teacher)):
            drifts["trained tokens"] = results[0].drift_mean
        _check_drift(drifts, self.config.log.max_drift)

    def _throughput(self, sampled: Sampled, metrics: Mapping[str, float], epochs: int) -> Iterator[tuple[str, float]]:
        """Tokens per second of sampling, the teacher and training, over all ranks."""
        responses = [one.rollout for one in self.builder.rolled_out(sampled.trajectories)]
        responses += [one.refinement for one in sampled.trajectories if one.refinement]
        yield "throughput/sample", sum(len(response.tokens) for response in responses) / sampled.seconds
        if not epochs:
            return
        trained = metrics["tokens/trained"]
        yield "throughput/train", epochs * trained / metrics["time/train"]
        if self.config.overlap == "none":  # otherwise most of it was computed during sampling
            passes = 1 if self.config.frozen_teacher else epochs
            yield "throughput/teacher", passes * trained / metrics["time/teacher"]

    def save(self, steps_done: int) -> None:
        """Write a checkpoint after `steps_done` steps. Collective."""
        ahead, begin = self.sampling.pending(), time.perf_counter()
        path = checkpoint.save(
            self.config.run_dir,
            steps_done,
            self.student,
            self.teacher,
            self.config.checkpoint,
            sampled_ahead=ahead.to_json() if ahead else None,
        )
        self.note(f"saved {path} in {time.perf_counter() - begin:.1f} s")

    def note(self, text: str) -> None:
        """Print a line of progress output."""
        if self._writers is not None:
            self._writers.progress.note(text)

    def close(self) -> None:
        """Flush the writers and leave the process group.

        Raises `UserError` on rank 0 if the run is complete and no step had anything to train on.
        """
        self.teacher.store.close()
        if self._writers is not None:
            self._writers.close()
        dist.barrier()
        dist.destroy_process_group()
        if self._writers is not None:
            _check_trained(read_metrics(Path(self.config.run_dir)), self.config.steps)


def _check_trained(rows: list[dict[str, Any]], steps: int) -> None:
    if len(rows) < steps or any(row["samples/trained"] for row in rows):
        return
    counts = ", ".join(f"{key} {value:g}" for key, value in rows[-1].items() if key.startswith("overflow/"))
    raise UserError(
        f"no step had anything to train on (the newest one's {counts}): raise data.max_prompt_tokens or the sampler's "
        "limits, see data.overlong and corpus, or see in samples/ what the model writes"
    )


def _check_drift(drifts: Mapping[str, float | None], bound: float | None) -> None:
    """Raise `UserError` for a drift that is not within `bound`; NaN is not."""
    for which, drift in drifts.items():
        if bound is not None and drift is not None and not drift <= bound:
            raise UserError(
                f"sampler and trainer differ by {drift:.3g} nats a token on {which}, log.max_drift is {bound:g}: "
                "see whether --verify-refit finds other weights in the sampler, or raise the bound"
            )


def _trained(results: list[StepResult]) -> dict[str, float]:
    """Metrics of a step's training, from the first epoch, before the samples had been trained on."""
    if not results:
        return {}
    first, *others = results
    values = {
        "loss": first.loss,
        "divergence/mean": first.divergence,
        "grad_norm": first.grad_norm,
        "lr": first.lr,
        "drift/mean": first.drift_mean,
        "drift/max": first.drift_max,
    }
    return values | ({"loss/last_epoch": others[-1].loss} if others else {})


class _Writers:
    """Metrics, samples and progress of rank 0."""

    def __init__(self, config: TrainConfig, steps_done: int, *, asks: bool) -> None:
        """`asks`: whether held-out problems are evaluated before the first step, repeated in a resumed run."""
        folder = Path(config.run_dir)
        self.wandb = open_wandb(config)
        writer = functools.partial(MetricsWriter, folder, tensorboard=config.log.tensorboard, wandb=self.wandb)
        self.metrics = writer(resume_from=steps_done)
        unasked = steps_done if asks else steps_done + 1
        self.held_out = writer(resume_from=unasked, file=HELD_OUT_FILE) if config.held_out.path else None
        self.samples = SampleWriter(folder, resume_from=steps_done)
        self.progress = Progress(config.steps, title=config.method, start=steps_done)
        self.progress.__enter__()
        if self.wandb is not None and self.wandb.url:
            self.progress.note(f"Weights & Biases: {self.wandb.url}")

    def write(self, step: int, metrics: dict[str, Any], pairs: list[dict[str, Any]]) -> None:
        self.metrics.write(step, metrics)
        if pairs:
            self.samples.write(step, pairs)
        self.progress.update(step, metrics)

    def close(self) -> None:
        self.progress.__exit__(None, None, None)
        for writer in filter(None, (self.metrics, self.held_out)):
            writer.close()
        if self.wandb is not None:
            self.wandb.finish()
