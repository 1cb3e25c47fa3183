"""Every method as a row of three fields: the trajectory, what the teacher sees, and the divergence.

The rows follow the TRD paper: its own two methods, its four dense-KL baselines on raw rollouts (each for a teacher that
sees the problem alone, OPD, and for a self-teacher that sees the reference solution, OPSD), and OPSD as first
published.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict, cast

from megatron_trd.config import LossConfig, MethodName, TrainConfig, flatten
from megatron_trd.data.prompts import Context
from megatron_trd.errors import UserError

# As in losses/objective.py, which imports torch: the command line must start without it.
Kind = Literal["forward_kl", "reverse_kl", "jsd"]


class DivergenceArguments(TypedDict):
    """Keyword arguments of the functions in `megatron_trd.losses`."""

    divergence: Kind
    beta: float
    temperature: float
    clip: float | None
    top_k: int | None
    tail: bool


@dataclass(frozen=True)
class Divergence:
    """A divergence, and whether its per-token value is clipped or restricted to the teacher's top-k tokens."""

    kind: Kind = "forward_kl"
    clipped: bool = False
    top_k: bool = False

    def arguments(self, config: LossConfig) -> DivergenceArguments:
        """The numbers of `config` that this divergence uses."""
        return {
            "divergence": self.kind,
            "beta": config.beta,
            "temperature": config.temperature,
            "clip": config.clip if self.clipped else None,
            "top_k": config.top_k if self.top_k else None,
            "tail": config.tail and self.top_k,
        }


@dataclass(frozen=True)
class Method:
    """What a step trains on and against."""

    trajectory: Literal["refined", "raw"]
    teacher_context: Context
    divergence: Divergence = Divergence()

    @property
    def refines(self) -> bool:
        return self.trajectory == "refined"

    @property
    def needs_reference(self) -> bool:
        return "reference" in self.teacher_context


def _baselines(prefix: Literal["opd", "opsd"], context: Context) -> dict[MethodName, Method]:
    rows = {
        f"{prefix}-forward-kl": Method("raw", context),
        f"{prefix}-forward-kl-clip": Method("raw", context, Divergence(clipped=True)),
        f"{prefix}-reverse-kl": Method("raw", context, Divergence("reverse_kl")),
        f"{prefix}-reverse-kl-topk": Method("raw", context, Divergence("reverse_kl", top_k=True)),
    }
    return cast(dict[MethodName, Method], rows)  # a test checks the names


METHODS: dict[MethodName, Method] = {
    "trd-opd": Method("refined", "refine"),
    "trd-opsd": Method("refined", "refine_reference"),
    **_baselines("opd", "vanilla"),
    **_baselines("opsd", "reference"),
    "opsd-jsd": Method("raw", "reference", Divergence("jsd")),
}


def unused_settings(config: TrainConfig) -> list[str]:
    """Settings about what is learned that this run's other settings leave without effect, as `key=value`."""
    method = METHODS[config.method]
    used = {
        "loss.beta": method.divergence.kind == "jsd",
        "loss.clip": method.divergence.clipped,
        "loss.top_k": method.divergence.top_k,
        "loss.tail": method.divergence.top_k,
        "refinements_per_rollout": method.refines,
        "teacher.ema_decay": config.averaged_teacher,
        "optimizer.min_lr_ratio": config.optimizer.schedule == "cosine",
        "held_out.every": config.held_out.path is not None,
        "held_out.samples": config.held_out.path is not None,
    }
    given, defaults = flatten(config), flatten(TrainConfig())
    return [f"{key}={given[key]}" for key, is_used in used.items() if not is_used and given[key] != defaults[key]]


def one_engine(config: TrainConfig) -> bool:
    """Whether the student's vLLM engine does all the sampling, with the teacher's weights swapped in if necessary."""
    return swaps_weights(config) or not _refines_with_own_weights(config)


def swaps_weights(config: TrainConfig) -> bool:
    """Whether a single engine has the student's weights for rollouts, and then the teacher's for refinements."""
    wanted = config.sampler.one_engine and config.teacher.model is None and not config.staleness
    return wanted and _refines_with_own_weights(config)


def _refines_with_own_weights(config: TrainConfig) -> bool:
    return METHODS[config.method].refines and not config.live_teacher


def check_threads(config: TrainConfig) -> None:
    """Raise `UserError` if two threads of a rank would communicate; for devices on which that can hang."""
    beside = "staleness=1" if config.staleness else "overlap=teacher" if config.overlap == "teacher" else ""
    if beside and config.sampler.tp > 1:
        raise UserError(
            f"{beside} with sampler.tp={config.sampler.tp}: two threads of a rank would communicate over NCCL, each in "
            "an order of its own, and could wait for ever: sampler.tp=1, or do without"
        )


def engine_sleeps(config: TrainConfig) -> bool:
    """Whether engines may release their memory between samplings: vLLM supports that for one engine per process."""
    return config.sampler.sleep and not config.staleness and one_engine(config)
