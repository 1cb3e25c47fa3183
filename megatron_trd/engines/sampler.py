"""Rollouts and refinements: a vLLM engine in every rank's process, token ids in, token ids out.

vLLM runs under `external_launcher`: consecutive ranks form its tensor-parallel groups, and the groups share the
problems of a step. A refinement is queued the moment its rollout ends. Each request has its own seed, drawn from
(run seed, step, problem, rollout, kind), so the tokens do not depend on what else is in flight.
"""

from __future__ import annotations

import functools
import hashlib
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from megatron_trd import platform
from megatron_trd.config import TrainConfig
from megatron_trd.data.problems import Problem
from megatron_trd.engines import refit
from megatron_trd.errors import UserError
from megatron_trd.models import loading
from megatron_trd.models.model import Model


@dataclass(frozen=True)
class Completion:
    """What the sampler gave for one prompt."""

    tokens: tuple[int, ...]  # end-of-sequence included where it was sampled
    log_probs: tuple[float, ...]  # of each token at temperature 1
    truncated: bool  # hit the length limit


@dataclass(frozen=True)
class Trajectory:
    """One rollout and, for TRD, its refinement."""

    problem: Problem
    rollout: Completion
    refine_prompt: tuple[int, ...] | None = None
    refinement: Completion | None = None


# Refinement prompt of a finished rollout; None where it is too long and the configuration drops it.
RefinePrompt = Callable[[Problem, Completion], list[int] | None]


def request_seed(*parts: object) -> int:
    """A 63-bit seed from whatever names a request."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@functools.cache
def _job_name() -> str:
    """A name for this job that all its ranks agree on and no other job has. Collective when first asked."""
    name = [uuid.uuid4().hex]
    dist.broadcast_object_list(name, device=platform.current().device)
    return name[0]


class Engine:
    """One vLLM engine of this process. It begins without weights: `refit` brings them, from wherever they are."""

    def __init__(self, model: Model, config: TrainConfig, max_length: int) -> None:
        current = platform.current()
        arguments = current.sampler_arguments(config.sampler, max_length)
        os.environ.update(current.sampler_environment())
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")  # an error is raised too; its log dumps every request
        from vllm import LLM

        self.arch = model.arch
        with current.starting_sampler(_job_name()):
            self.llm = LLM(
                model=str(model.folder.path),
                load_format="dummy",
                dtype=str(current.dtype).removeprefix("torch."),
                tensor_parallel_size=config.sampler.tp,
                distributed_executor_backend="external_launcher",
                max_model_len=max_length,
                max_num_seqs=config.sampler.max_sequences,
                seed=config.seed,
                enable_prefix_caching=True,
                disable_log_stats=True,
                trust_remote_code=False,
                **arguments,
            )

    def add(self, name: str, prompt: Sequence[int], *, max_tokens: int, seed: int, config: TrainConfig) -> None:
        """Queue a request."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            temperature=config.sampler.temperature,
            top_p=config.sampler.top_p,
            max_tokens=max_tokens,
            seed=seed,
            logprobs=0,  # of the sampled token alone
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": list(prompt)}, parameters)

    @property
    def busy(self) -> bool:
        return self.llm.llm_engine.has_unfinished_requests()

    def step(self) -> Iterator[tuple[str, Completion]]:
        """Advance every running request by a token; yields those that finished."""
        for output in self.llm.llm_engine.step():
            if output.finished:
                result = output.outputs[0]
                tokens = tuple(result.token_ids)
                log_probs = tuple(entry[token].logprob for token, entry in zip(tokens, result.logprobs, strict=True))
                yield output.request_id, Completion(tokens, log_probs, result.finish_reason == "length")

    def forget(self) -> None:
        """Drop cached prefixes: they are of earlier weights, and a step's tokens must not depend on earlier steps."""
        self.llm.reset_prefix_cache()

    def refit(self, source: loading.Source) -> None:
        """Take over the weights of `source`. Collective."""
        refit.refit(self.llm, self.arch, source)

    def verify(self, source: loading.Source) -> None:
        """Raise `UserError` if a tensor in the engine is not the one in `source`. Collective."""
        different = refit.verify(self.llm, self.arch, source)
        if different:
            raise UserError(
                f"refit check: {len(different)} tensors in the sampler differ from the trainer's, first {different[0]}"
            )


class Sampler:
    """Samples a step's trajectories over all ranks with the student's engine and, where it differs, the teacher's."""

    def __init__(self, config: TrainConfig, student: Engine, teacher: Engine) -> None:
        self.config, self.student, self.teacher = config, student, teacher
        if dist.get_world_size() % config.sampler.tp:
            raise UserError(f"sampler.tp={config.sampler.tp} does not divide the world size {dist.get_world_size()}")
        self.group = dist.get_rank() // config.sampler.tp
        self.groups = dist.get_world_size() // config.sampler.tp

    def sample(
        self,
        step: int,
        problems: Sequence[Problem],
        prompts: Sequence[Sequence[int]],
        refine_prompt: RefinePrompt | None,
    ) -> list[Trajectory]:
        """One trajectory for each problem, the same list on every rank. Collective.

        With `refine_prompt`, each rollout is refined as soon as it ends; without, trajectories are raw.
        """
        mine = range(self.group, len(problems), self.groups)
        done = self._run(step, {index: (problems[index], prompts[index]) for index in mine}, refine_prompt)
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, done)
        merged: dict[int, Trajectory] = {}
        for part in gathered[:: self.config.sampler.tp]:
            merged.update(part)
        return [merged[index] for index in range(len(problems))]

    def _run(
        self, step: int, mine: dict[int, tuple[Problem, Sequence[int]]], refine_prompt: RefinePrompt | None
    ) -> dict[int, Trajectory]:
        settings = self.config.sampler
        done: dict[int, Trajectory] = {}

        def queue(engine: Engine, kind: str, index: int, prompt: Sequence[int], limit: int) -> None:
            seed = request_seed(self.config.seed, step, mine[index][0].index, index, kind)
            engine.add(f"{kind}/{index}/{step}", prompt, max_tokens=limit, seed=seed, config=self.config)

        def finish(kind: str, index: int, completion: Completion) -> None:
            if kind == "refinement":
                done[index] = replace(done[index], refinement=completion)
                return
            problem = mine[index][0]
            prompt = refine_prompt(problem, completion) if refine_prompt else None
            done[index] = Trajectory(problem, completion, tuple(prompt) if prompt else None)
            if prompt:
                queue(self.teacher, "refinement", index, prompt, settings.max_refinement_tokens)

        engines = [self.student] if self.teacher is self.student else [self.student, self.teacher]
        for engine in engines:
            engine.forget()
        for index, (_, prompt) in mine.items():
            queue(self.student, "rollout", index, prompt, settings.max_rollout_tokens)
        while any(engine.busy for engine in engines):
            for engine in engines:
                for name, completion in engine.step() if engine.busy else ():
                    kind, number, _ = name.split("/")
                    finish(kind, int(number), completion)
        return done
