"""Background work: computes the teacher's hidden states while trajectories are still being sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from megatron_trd import platform
from megatron_trd.data.batching import Sample
from megatron_trd.engines.sampler import Trajectory
from megatron_trd.engines.teacher import TeacherEngine


def background() -> ThreadPoolExecutor:
    """One thread that computes on this rank's device, in the order in which work is submitted."""
    return ThreadPoolExecutor(1, initializer=platform.current().prepare_thread)


class TeacherAhead:
    """Computes the teacher's hidden states of finished trajectories (`overlap=teacher`).

    All ranks receive the same trajectories in the same order, so that they form the same waves and their threads meet
    in the teacher's collectives. Nothing else uses the teacher's process groups once trajectories have been added.
    """

    def __init__(self, teacher: TeacherEngine, sample_of: Callable[[Trajectory], Sample | None]) -> None:
        self.teacher, self.sample_of = teacher, sample_of
        layout = teacher.grid.layout
        self.wave = layout.dp * layout.pp * teacher.config.teacher.micro_batch_size
        self._thread = background()
        self._waiting: list[Sample] = []
        self._begun: list[Future[None]] = []

    def add(self, finished: Sequence[Trajectory]) -> None:
        """Add trajectories that have just finished on any rank. Raises the error of an earlier one, if any."""
        for earlier in self._begun:
            if earlier.done():
                earlier.result()
        samples = map(self.sample_of, finished)
        self._waiting += [sample for sample in samples if sample is not None]
        while len(self._waiting) >= self.wave:
            wave, self._waiting = self._waiting[: self.wave], self._waiting[self.wave :]
            self._begun.append(self._thread.submit(self.teacher.compute, wave))

    def finish(self) -> None:
        """Wait for the waves in progress; a remainder too small for a wave is left to `TeacherEngine.hidden`."""
        begun, self._begun, self._waiting = self._begun, [], []
        for future in begun:
            future.result()
        platform.current().synchronize()
