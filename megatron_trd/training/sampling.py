"""Where a step's trajectories come from: sampled by the present weights, or beside the step before (`staleness=1`)."""

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
_NO_STEP = -1  # in the seeds of what is not sampled for a step


class _Refitted(NamedTuple):
    """What one engine was given."""

    bytes: int
    seconds: float
    verified: int  # tensors


@dataclass(frozen=True)
class Sampled:
    """A step's trajectories and what there is to say of them."""

    step: int
    weights: int  # of the step whose weights sampled them; on-policy: the step itself
    trajectories: list[Trajectory]
    too_long: int  # problems whose prompt was dropped or cut
    seconds: float  # it took
    stats: dict[str, float]  # of the sampler

    def to_json(self) -> str:
        """The whole of it, exactly."""
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
        self._refitted: list[_Refitted] = []  # for the newest sampling
        self.teacher_ahead = TeacherAhead(teacher, builder.sample) if config.overlap == "teacher" else None
        # Tokenizers are not for two threads at once: sampling beside training has a builder of its own.
        self._builder = copy.deepcopy(builder) if config.staleness else builder
        self._thread = background() if config.staleness else None
        self._ahead: Future[Sampled] | None = None
        self._ready: Sampled | None = None  # sampled ahead and not taken yet

    def _sampler(self) -> Sampler:
        """One vLLM engine, and a second one where a teacher refines with an engine of its own."""
        config, inputs = self.config, self.inputs
        if one_engine(config):
            engine = Engine(inputs.student, config, inputs.max_length, sleeps=engine_sleeps(config))
            return Sampler(config, engine, engine)
        # vLLM makes what experts need with the first engine of a process, and only if that one has experts.
        models = {"student": inputs.student, "teacher": inputs.teacher}  # one and the same in self-distillation
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
        """The present student's responses, of the same seeds whenever it is asked; between steps. Collective."""
        self.pending()  # an engine has one set of weights at a time
        self._refit()
        with self.phases.measure("sample"):
            trajectories = self._or_rebuild("held-out", lambda: self.sampler.sample(_NO_STEP, problems, prompts, None))
        self.sampler.student.sleep()
        return trajectories

    def pending(self) -> Sampled | None:
        """What has been sampled ahead, once it is there; a checkpoint has to hold it. Collective."""
        if self._ahead is None:
            return self._ready
        ahead, self._ahead = self._ahead, None
        try:
            self._ready = ahead.result()
        except EngineDied as death:
            self._rebuild(f"a sampler's engine died beside training ({death})")
        return self._ready

    def restore(self, sampled: Sampled) -> None:
        """Take up what a checkpoint held."""
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
        """An engine that dies is rebuilt once, and the same seeds give the same tokens."""
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
        """Bring the sampler's engines to the present weights, and prove it where the configuration asks. Collective."""
        # Three blocks, so that none counts together what follows one another in the same memory.
        with self.phases.measure("refit"):
            self.student.offload()
            platform.current().release_memory()  # what training leaves in torch's cache
        with self.phases.measure("refit"):
            self._refitted = [self._bring(engine, source) for engine, source in self._due()]
        with self.phases.measure("refit"):
            self.teacher.offload()
            platform.current().release_memory()  # the buckets
            self.sampler.student.wake("kv_cache")

    def _due(self) -> Iterator[tuple[Engine, loading.Source]]:
        """Engines whose weights are not the present ones, and where these are. Nothing here keeps a source: its last
        bucket goes with it, and is to be gone before the cache takes its memory."""
        yield self.sampler.student, self.student.source()
        if self.sampler.teacher is not self.sampler.student:
            if self.teacher.averaged:
                yield self.sampler.teacher, self.teacher.source()
            elif self.sampler.teacher.empty:  # a frozen teacher's weights come once
                yield self.sampler.teacher, self.inputs.teacher.source

    def _to_teacher(self) -> None:
        """Give the only engine the teacher's weights, amid a sampling. Collective."""
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
        platform.current().synchronize()  # on a GPU the copies have only been asked for
        seconds = time.perf_counter() - begin
        return _Refitted(sent, seconds, engine.verify(source) if self.config.log.verify_refit else 0)

    @property
    def metrics(self) -> dict[str, float]:
        """Of the refits of the newest sampling."""
        if not self._refitted:  # what was sampled before the run was resumed
            return {}
        gib, seconds, verified = (sum(values) for values in zip(*self._refitted, strict=True))
        gib /= 2**30
        metrics = {"refit/gib": gib, "refit/gib_per_s": gib / seconds}
        return metrics | ({"refit/verified": verified} if verified else {})
