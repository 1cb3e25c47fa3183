"""Assembles a run: every engine, the data and the writers, each made once and in the order they need."""

from __future__ import annotations

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
from megatron_trd.methods import METHODS
from megatron_trd.parallel.grid import student_grid
from megatron_trd.reporting.metrics import MetricsWriter, SampleWriter
from megatron_trd.reporting.progress import Progress
from megatron_trd.training import checkpoint
from megatron_trd.training.checks import Inputs, check
from megatron_trd.training.phases import Phases
from megatron_trd.training.samples import SampleBuilder
from megatron_trd.training.sampling import Sampled, Sampling, sampled_from_json
from megatron_trd.training.signals import StopRequest


class Run:
    """One training run on this rank: what `training.loop` is written in terms of."""

    def __init__(self, config: TrainConfig, *, resume: bool = False) -> None:
        self.config = config
        self.method = METHODS[config.method]
        self.stop = StopRequest()
        self.inputs: Inputs = check(config)
        current = platform.current()
        current.set_up()
        if not dist.is_initialized():
            dist.init_process_group(current.backend)
        torch.manual_seed(config.seed)
        grid = student_grid(config.student.tp, config.student.pp, config.student.ep, seed=config.seed)
        for model in sorted({self.inputs.student.path, self.inputs.teacher.path}):
            checkpoint.check_files(model)
        self.student = StudentEngine(config, self.inputs.student, grid)
        self.teacher = TeacherEngine(config, self.student, self.inputs.teacher)
        self.steps_done = checkpoint.resume(config.run_dir, self.student, self.teacher) if resume else 0
        prompts = PromptBuilder(
            self.inputs.student.folder.tokenizer, config.data.task, config.data.chat_template_kwargs
        )
        self.builder = SampleBuilder(config, prompts)
        self.phases = Phases()
        self._writers = _Writers(config, self.steps_done) if dist.get_rank() == 0 else None
        self.sampling = Sampling(
            config, self.inputs, self.student, self.teacher, self.builder, self.phases, note=self.note
        )
        if self.steps_done and (ahead := checkpoint.sampled_ahead(config.run_dir)):
            self.sampling.restore(sampled_from_json(ahead))
        self.sampled: Sampled  # what the present step trains on

    def trajectories(self, step: int) -> list[Trajectory]:
        """A step's trajectories. Collective."""
        self.sampled = self.sampling.take(step)
        return self.sampled.trajectories

    def shares(self, samples: list[Sample]) -> list[list[int]]:
        """Sample indices of each student replica, balanced by length."""
        return deal(samples, self.student.grid.layout.dp, cost=lambda sample: len(sample.tokens("student")))

    def log(self, step: int, trajectories: list[Trajectory], samples: list[Sample], results: list[StepResult]) -> None:
        """Write a finished step's metrics and samples (rank 0); `results`: of each epoch over them."""
        seconds, measured = self.phases.seconds, self.phases.metrics() | self.sampling.metrics
        if self._writers is None:
            return
        metrics: dict[str, Any] = self.builder.metrics(trajectories, samples)
        metrics |= {"overflow/prompt": self.sampled.too_long, "staleness": step - self.sampled.weights}
        if results:
            result = results[0]  # before the samples had been trained on
            metrics |= {
                "loss": result.loss,
                "divergence/mean": result.divergence,
                "grad_norm": result.grad_norm,
                "lr": result.lr,
                "drift/mean": result.drift_mean,
                "drift/max": result.drift_max,
            }
        if len(results) > 1:
            metrics["loss/last_epoch"] = results[-1].loss
        metrics |= measured | self.sampled.stats
        sampled = sum(
            len(trajectory.rollout.tokens) + (len(trajectory.refinement.tokens) if trajectory.refinement else 0)
            for trajectory in trajectories
        )
        metrics["throughput/sample"] = sampled / max(seconds.get("sample", 0.0), 1e-9)
        for phase in ("teacher", "train"):
            metrics[f"throughput/{phase}"] = metrics["tokens/trained"] / max(seconds.get(phase, 0.0), 1e-9)
        pairs = [self.builder.pair(trajectory) for trajectory in trajectories[: self.config.log.samples_per_step]]
        self._writers.write(step, metrics, pairs)

    def save(self, steps_done: int) -> None:
        """Write a checkpoint after `steps_done` steps. Collective."""
        ahead = self.sampling.pending()
        path = checkpoint.save(
            self.config.run_dir,
            steps_done,
            self.student,
            self.teacher,
            self.config.checkpoint.keep,
            sampled_ahead=ahead.to_json() if ahead else None,
        )
        self.note(f"saved {path}")

    def note(self, text: str) -> None:
        """A line for whoever watches the run."""
        if self._writers is not None:
            self._writers.progress.note(text)

    def close(self) -> None:
        """Flush the writers and leave the process group."""
        if self._writers is not None:
            self._writers.close()
        dist.barrier()
        dist.destroy_process_group()


class _Writers:
    """Metrics, samples and progress of rank 0."""

    def __init__(self, config: TrainConfig, steps_done: int) -> None:
        folder = Path(config.run_dir)
        self.metrics = MetricsWriter(folder, tensorboard=config.log.tensorboard, resume_from=steps_done)
        self.samples = SampleWriter(folder)
        self.progress = Progress(config.steps, title=config.method, start=steps_done)
        self.progress.__enter__()

    def write(self, step: int, metrics: dict[str, Any], pairs: list[dict[str, Any]]) -> None:
        self.metrics.write(step, metrics)
        if pairs:
            self.samples.write(step, pairs)
        self.progress.update(step, metrics)

    def close(self) -> None:
        self.progress.__exit__(None, None, None)
        self.metrics.close()
