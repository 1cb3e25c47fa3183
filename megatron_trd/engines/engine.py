"""A vLLM engine in this rank's process: token ids in, token ids out, weights by refit.

vLLM runs under `external_launcher`: consecutive ranks form its tensor-parallel groups.
"""

from __future__ import annotations

import functools
import gc
import os
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from megatron_trd import platform
from megatron_trd.config import SamplerConfig, TrainConfig
from megatron_trd.engines import refit
from megatron_trd.engines.work import Task
from megatron_trd.errors import UserError
from megatron_trd.models import loading
from megatron_trd.models.model import Model
from megatron_trd.parallel.objects import from_first


@dataclass(frozen=True)
class Completion:
    """The sampler's response to one prompt."""

    tokens: tuple[int, ...]  # including end-of-sequence if it was sampled
    log_probs: tuple[float, ...]  # of each token at temperature 1
    truncated: bool  # hit the length limit

    @property
    def body(self) -> tuple[int, ...]:
        """The tokens without the one that ended them."""
        return self.tokens if self.truncated else self.tokens[:-1]


@functools.cache
def _job_name() -> str:
    """A unique name for this job, the same on all its ranks. Collective on the first call."""
    return from_first(uuid.uuid4().hex)


class Engine:
    """One vLLM engine in this process. It starts without weights; `refit` loads them from any source.

    With `sleeps`, it releases its memory, weights included, to training between samplings; vLLM supports this for one
    engine per process (`alone`). vLLM prescribes the order: wake for weights, refit, wake for sampling, sample, sleep.
    """

    def __init__(
        self, model: Model, config: TrainConfig, max_length: int, *, sleeps: bool = False, alone: bool = True
    ) -> None:
        self.model, self.config, self.max_length = model, config, max_length
        self.sleeps, self.alone = sleeps, alone
        self.empty = True  # no weights yet
        self._working = platform.current().engine_context()
        self.llm: Any = self._start()

    def _start(self) -> Any:
        current, config = platform.current(), self.config
        arguments = current.sampler_arguments(config.sampler, self.max_length, sleeps=self.sleeps, alone=self.alone)
        overrides = {"vocab_size": self.model.arch.vocab_size} | arguments.pop("hf_overrides", {})
        os.environ.update(current.sampler_environment())
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")  # errors are raised too; their log dumps every request
        from vllm import LLM

        from megatron_trd.engines.preemptions import PreemptionCounter

        with current.starting_sampler(_job_name()), self._working():
            llm = LLM(
                model=str(self.model.folder.path),
                hf_overrides=overrides,
                load_format="dummy",
                dtype=str(current.dtype).removeprefix("torch."),
                tensor_parallel_size=config.sampler.tp,
                distributed_executor_backend="external_launcher",
                max_model_len=self.max_length,
                max_num_seqs=config.sampler.max_sequences,
                seed=config.seed,
                enable_prefix_caching=True,
                disable_log_stats=False,  # `preemptions` are counted from them
                trust_remote_code=False,
                **arguments,
            )
        # Its shutdown on garbage collection would destroy torch's process groups, which Megatron uses too.
        llm.llm_engine.engine_core._finalizer.detach()
        self._preemptions = PreemptionCounter()
        llm.llm_engine.logger_manager.stat_loggers.append(self._preemptions)
        return llm

    def restart(self) -> None:
        """Replace an engine that died with a new one without weights. Collective."""
        platform.current().prepare_restart()
        with self._working():
            self.llm.llm_engine.model_executor.shutdown()
        self.llm, self.empty = None, True
        self._working = platform.current().engine_context()  # the old context belongs to the old engine
        gc.unfreeze()  # vLLM froze its objects
        gc.collect()
        self.llm = self._start()

    def sleep(self) -> None:
        """Release weights and KV cache."""
        if self.sleeps:
            with self._working():
                self.llm.sleep(level=2)
            self.empty = True

    def wake(self, memory: Literal["weights", "kv_cache"]) -> None:
        """Reclaim the memory."""
        if self.sleeps and self.llm.llm_engine.is_sleeping():
            with self._working():
                self.llm.wake_up(tags=[memory])

    def add(self, task: Task, seed: int, settings: SamplerConfig) -> None:
        """Queue a request."""
        prompt = {"prompt_token_ids": list(task.prompt)}
        self.llm.llm_engine.add_request(task.name, prompt, _parameters(settings, task.limit, seed))

    def abort(self, names: Iterable[str]) -> None:
        """Drop requests, queued or running."""
        self.llm.llm_engine.abort_request(list(names))

    @property
    def busy(self) -> bool:
        return self.llm.llm_engine.has_unfinished_requests()

    @property
    def preemptions(self) -> int:
        """Number of requests preempted so far for lack of KV cache."""
        return self._preemptions.count

    def step(self) -> Iterator[tuple[str, Completion]]:
        """Advance every running request by a token; yields those that finished, by task name."""
        with self._working():
            outputs = self.llm.llm_engine.step()
        for output in outputs:
            if output.finished:
                result = output.outputs[0]
                tokens = tuple(result.token_ids)
                log_probs = tuple(entry[token].logprob for token, entry in zip(tokens, result.logprobs, strict=True))
                yield output.request_id, Completion(tokens, log_probs, result.finish_reason == "length")

    def warm_up(self) -> None:
        """Sample and discard one token. The first steps compile, which changes the bits of concurrent computations."""
        self.add(Task("rollout", 0, 0, (0,), 1), seed=0, settings=self.config.sampler)
        while self.busy:
            list(self.step())

    def forget(self) -> None:
        """Drop cached prefixes, which stem from earlier weights: a step's tokens must not depend on earlier steps."""
        if not self.llm.reset_prefix_cache():
            raise RuntimeError(
                "vLLM keeps the prefixes of earlier weights: it holds some of their blocks for a request"
            )

    def refit(self, source: loading.Source) -> int:
        """Load the weights of `source`; returns their size in bytes. Collective."""
        self.empty = False
        with self._working():
            return refit.refit(self.llm, self.model.arch, source)

    def verify(self, source: loading.Source) -> int:
        """Compare all tensors with `source`; returns their number. Raises `UserError` if one differs. Collective."""
        with self._working():
            same = refit.verify(self.llm, self.model.arch, source)
        if different := sorted(name for name, equal in same.items() if not equal):
            raise UserError(
                f"refit check: {len(different)} tensors in the sampler differ from the trainer's, first {different[0]}"
            )
        return len(same)


def _parameters(settings: SamplerConfig, max_tokens: int, seed: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k or 0,  # vLLM's word for all
        max_tokens=max_tokens,
        seed=seed,
        logprobs=0,  # of the sampled token only
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
