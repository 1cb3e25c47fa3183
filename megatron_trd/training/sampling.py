"""The source of a step's trajectories: sampled by the current weights, or during the previous step (`staleness=1`)."""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from megatron_trd import platform
from megatron_trd.config import TrainConfig
from megatron_trd.data.problems import Problem, step_indices
from megatron_trd.engines.ahead import TeacherAhead, background
from megatron_trd.engines.engine import Completion, Engine
from megatron_trd.engines.sampler import EngineDied, Sampler, Trajectory
from megatron_trd.engines.student import StudentEngine
from megatron_trd.engines.teacher import TeacherEngine
from megatron_trd.methods import METHODS, engine_sleeps, one_engine, swaps_weights
from megatron_trd.models import loading
from megatron_trd.training.checks import Inputs
from megatron_trd.training.phases import Phases
from megatron_trd.training.samples import SampleBuilder

_T = TypeVar("_T")
_NO_STEP = -1  # step number in the seeds of samples that belong to no step


class _Refitted(NamedTuple):
    """Result of the refit of one engine."""

    bytes: int
    seconds: float
    verified: int  # tensors


@dataclass(frozen=True)
class Sampled:
    """A step's trajectories and facts about them."""

    step: int
    weights: int  # step whose weights sampled them; on-policy: the step itself
    trajectories: list[Trajectory]
    too_long: int  # problems whose prompt was dropped or cut
    seconds: float  # that sampling took
    stats: dict[str, float]  # of the sampler
    drift: float | None = None  # mean of the student's, nats, if measured

    def to_json(self) -> str:
        """A lossless JSON representation."""
        return json.dumps(dataclasses.asdict(self))


def sampled_from_json(text: str) -> Sampled:
    """The inverse of `Sampled.to_json`."""

    def completion(values: dict[str, Any] | None) -> Any:
        if values is None:
            return None
        return Completion(tuple(values["tokens"]), tuple(values["log_probs"]), values["truncated"])

    values = json.loads(text)
    values["trajectories"] = [
        Trajectory(
            Problem(**one["problem"]),
            one["index"],
            completion(one["rollout"]),
            None if one["refine_prompt"] is None else tuple(one["refine_prompt"]),
            completion(one["refinement"]),
        )
        for one in values["trajectories"]
    ]
    return Sampled(**values)


class Sampling:
    """The sampler's side of a run: its engines, their weights, and the order in which steps are sampled."""

    def __init__(
        self,
        config: TrainConfig,
        inputs: Inputs,
        student: StudentEngine,
        teacher: TeacherEngine,
        builder: SampleBuilder,
        phases: Phases,
        note: Callable[[str], None],
    ) -> None:
        self.config, self.inputs, self.student, self.teacher = config, inputs, student, teacher
        self.phases, self.note = phases, note
        self.sampler = self._sampler()
        self._refitted: list[_Refitted] = []  # for the latest sampling
        self.teacher_ahead = TeacherAhead(teacher, builder.sample) if config.overlap == "teacher" else None
        # Tokenizers are not thread-safe: sampling during training has a builder of its own.
        self._builder = copy.deepcopy(builder) if config.staleness else builder
        self._thread = background() if config.staleness else None
        self._ahead: Future[Sampled] | None = None
        self._ready: Sampled | None = None  # sampled ahead and not taken yet

    def _sampler(self) -> Sampler:
        """One vLLM engine, and a second one if the teacher refines with an engine of its own."""
        config, inputs = self.config, self.inputs
        if one_engine(config):
            engine = Engine(inputs.student, config, inputs.max_length, sleeps=engine_sleeps(config))
            return Sampler(config, engine, engine)
        # vLLM sets up what experts need with the first engine of a process, and only if that one has experts.
        models = {"student": inputs.student, "teacher": inputs.teacher}  # the same model in self-distillation
        order = sorted(models, key=lambda role: models[role].arch.experts, reverse=True)
        engines = {role: Engine(models[role], config, inputs.max_length, alone=False) for role in order}
        return Sampler(config, engines["student"], engines["teacher"])

    def take(self, step: int) -> Sampled:
        """The trajectories to train on in `step`. Collective."""
        with self.phases.measure("sample"):
            sampled = self.pending()
        self._ready = None
        if sampled is None or sampled.step != step:
            self._refit()
            with self.phases.measure("sample"):
                sampled = self._sample_or_rebuild(step)
            self.sampler.student.sleep()
        if self._thread and step + 1 < self.config.steps:
            if sampled.weights != step:
                self._refit()
            platform.current().synchronize()
            self._ahead = self._thread.submit(self._sample, step + 1, step)
        return sampled

    def ask(self, problems: Sequence[Problem], prompts: Sequence[Sequence[int]]) -> list[Trajectory]:
        """The current student's responses, with the same seeds in every call; for use between steps. Collective."""
        self.pending()  # an engine has one set of weights at a time
        self._refit()
        with self.phases.measure("sample"):
            trajectories = self._or_rebuild("held-out", lambda: self.sampler.sample(_NO_STEP, problems, prompts, None))
        self.sampler.student.sleep()
        return trajectories

    def pending(self) -> Sampled | None:
        """Wait for the samples drawn ahead, if any, and return them; a checkpoint must hold them. Collective."""
        if self._ahead is None:
            return self._ready
        ahead, self._ahead = self._ahead, None
        try:
            self._ready = ahead.result()
        except EngineDied as death:
            self._rebuild(f"a sampler's engine died beside training ({death})")
        return self._ready

    def restore(self, sampled: Sampled) -> None:
        """Restore samples that a checkpoint held."""
        self._ready = sampled
        for engine in self.sampler.engines:
            engine.warm_up()

    def _sample(self, step: int, weights: int) -> Sampled:
        begin = time.perf_counter()
        problems, prompts, too_long = self._builder.begin(self.problems(step))
        refine = self._builder.refine_prompt if METHODS[self.config.method].refines else None
        finished = self.teacher_ahead.add if self.teacher_ahead else None
        to_teacher = self._to_teacher if swaps_weights(self.config) else None
        trajectories = self.sampler.sample(step, problems, prompts, refine, finished, to_teacher)
        return Sampled(step, weights, trajectories, too_long, time.perf_counter() - begin, self.sampler.stats)

    def _sample_or_rebuild(self, step: int) -> Sampled:
        sampled = self._or_rebuild(f"step {step}", lambda: self._sample(step, step))
        if self.teacher_ahead:
            self.teacher_ahead.finish()
        return sampled

    def _or_rebuild(self, what: str, sample: Callable[[], _T]) -> _T:
        """Call `sample`; an engine that dies is rebuilt once, and the same seeds give the same tokens."""
        try:
            return sample()
        except EngineDied as death:
            self._rebuild(f"{what}: a sampler's engine died ({death})")
            self._refit()
            try:
                return sample()
            except EngineDied as again:
                raise EngineDied(f"a sampler's engine died twice in {what}: {again}") from None

    def _rebuild(self, why: str) -> None:
        self.note(f"{why}; rebuilding it from the present weights")
        if self.teacher_ahead:
            self.teacher_ahead.finish()
        self.sampler.restart()

    def problems(self, step: int) -> list[Problem]:
        """Problems of a step, from 0."""
        config, problems = self.config, self.inputs.problems
        indices = step_indices(len(problems), config.batch_size, step, seed=config.seed, shuffle=config.data.shuffle)
        return [problems[index] for index in indices]

    def _refit(self) -> None:
        """Update the sampler's engines to the current weights, and verify them if configured. Collective."""
        # Three blocks, so that none adds up allocations that use the same memory one after another.
        with self.phases.measure("refit"):
            self.student.offload()
            platform.current().release_memory()  # what training left in torch's cache
        with self.phases.measure("refit"):
            self._refitted = [self._bring(engine, source) for engine, source in self._due()]
        with self.phases.measure("refit"):
            self.teacher.offload()
            platform.current().release_memory()  # the buckets
            self.sampler.student.wake("kv_cache")

    def _due(self) -> Iterator[tuple[Engine, loading.Source]]:
        """Engines with outdated weights, and the source of the current ones. No reference to a source is kept here: its
        last bucket is freed with it, which must happen before the KV cache takes the memory."""
        yield self.sampler.student, self.student.source()
        if self.sampler.teacher is not self.sampler.student:
            if self.teacher.averaged:
                yield self.sampler.teacher, self.teacher.source()
            elif self.sampler.teacher.empty:  # a frozen teacher's weights are sent once
                yield self.sampler.teacher, self.inputs.teacher.source

    def _to_teacher(self) -> None:
        """Load the teacher's weights into the only engine in the middle of sampling. Collective."""
        engine = self.sampler.student
        with self.phases.measure("refit", out_of="sample"):
            engine.forget()
            self._refitted.append(self._bring(engine, self.teacher.source()))
            self.teacher.offload()
            platform.current().release_memory()

    def _bring(self, engine: Engine, source: loading.Source) -> _Refitted:
        engine.wake("weights")
        begin = time.perf_counter()
        sent = engine.refit(source)
        platform.current().synchronize()  # on a GPU the copies are asynchronous
        seconds = time.perf_counter() - begin
        return _Refitted(sent, seconds, engine.verify(source) if self.config.log.verify_refit else 0)

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the refits for the latest sampling."""
        if not self._refitted:  # the samples were drawn before the run was resumed
            return {}
        gib, seconds, verified = (sum(values) for values in zip(*self._refitted, strict=True))
        gib /= 2**30
        metrics = {"refit/gib": gib, "refit/gib_per_s": gib / seconds}
        return metrics | ({"refit/verified": verified} if verified else {})
