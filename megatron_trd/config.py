"""All settings of a run, with their defaults and checks.

A run is described by one `TrainConfig`. Recipes build it, `key=value` overrides change it, and the resolved result is
written to `config.yaml` in the run folder. Hyper-parameter defaults are those of the TRD paper where it states them.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from megatron_trd.errors import UserError
from megatron_trd.files import replace_text

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]

MethodName = Literal[
    "trd-opd",
    "trd-opsd",
    "opd-forward-kl",
    "opd-forward-kl-clip",
    "opd-reverse-kl",
    "opd-reverse-kl-topk",
    "opsd-forward-kl",
    "opsd-forward-kl-clip",
    "opsd-reverse-kl",
    "opsd-reverse-kl-topk",
    "opsd-jsd",
]

HiddenPlace = Literal["device", "host", "disk"]

_STRICT = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


@dataclass(config=_STRICT, kw_only=True)
class StudentConfig:
    """Megatron engine of the model being trained. Data parallelism is the rest of the world: world / (tp * pp)."""

    tp: Positive = 1
    pp: Positive = 1
    ep: Positive = 1  # ranks that share a layer's experts, among the tp x dp of a stage
    sequence_parallel: bool = False
    micro_batch_size: Positive = 1  # sequences a micro-batch
    recompute: bool = False  # recompute activations of every layer in backward
    distributed_optimizer: bool = True  # shard optimizer state over data parallel ranks
    offload: bool = False  # during sampling, keep optimizer state in host memory and free gradients


@dataclass(config=_STRICT, kw_only=True)
class LoraConfig:
    """Low-rank adapters of the student's linear layers: `W + alpha / rank * B A`, of which only A and B are trained.

    Attention has them (q, k, v, o) and a dense feed-forward (gate, up, down); experts, routers, norms, embedding and
    head stay as they are.
    """

    rank: NonNegative = 0  # rows of A, columns of B (paper: 64); 0: no adapters, all weights are trained
    alpha: Annotated[float, Field(gt=0)] | None = None  # None: twice the rank (paper)

    @property
    def numerator(self) -> float:
        """`alpha`, or what it is by default."""
        return self.alpha or 2.0 * self.rank

    @property
    def scale(self) -> float:
        """Factor of B A."""
        return self.numerator / self.rank


@dataclass(config=_STRICT, kw_only=True)
class TeacherConfig:
    """Megatron engine of the teacher: its own TP x PP grid over the same ranks."""

    model: str | None = None  # Hugging Face folder; None: the student's own weights (self-distillation)
    # Weights of a self-teacher: the student's at step 0, the student's current ones, or their moving average.
    # `frozen` is the authors' choice; with `lora.rank` it is the student without its adapters, and takes no memory.
    weights: Literal["frozen", "live", "ema"] = "frozen"
    ema_decay: Fraction = 0.99  # ema <- decay * ema + (1 - decay) * student, after each step
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)  # take precedence over data's
    tp: Positive = 1
    pp: Positive = 1
    ep: Positive = 1
    micro_batch_size: Positive = 1
    # Where hidden states wait for training: `device`, `host` (pinned memory) or `disk` (`hidden/` of the run folder).
    hidden_in: HiddenPlace = "device"
    offload: bool = False  # keep weights in host memory during sampling


@dataclass(config=_STRICT, kw_only=True)
class SamplerConfig:
    """vLLM engine in every rank; sampler data parallelism is world / tp."""

    tp: Positive = 1
    temperature: Annotated[float, Field(ge=0)] = 1.0  # of rollouts and refinements (paper)
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Positive | None = None  # draw only from the most probable tokens; None: from all
    max_rollout_tokens: Positive = 16384  # paper
    max_refinement_tokens: Positive = 16384  # paper
    max_sequences: Positive = 256  # running at once in one engine
    max_running_tokens: Positive | None = None  # sum of prompts and limits of the requests in one engine
    stream: bool = True  # refine each rollout as soon as it ends; otherwise all, when the last has ended
    # A self-teacher refines with the student's engine, which gets the teacher's weights when the last rollout has
    # ended, unless they are the same or staleness=1. This needs half the memory, which the engine can release during
    # training, but costs one more refit per step and the streaming. A teacher model always has an engine of its own.
    one_engine: bool = True
    request_timeout: Annotated[float, Field(gt=0)] | None = None  # seconds, after which a request is restarted, once
    # Share of a GPU's memory for the weights and KV cache of one engine.
    memory_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.3
    host_kv_cache_gib: Positive = 1  # KV cache of an engine that runs from host memory
    sleep: bool = True  # release GPU memory for training between samplings; not possible with two engines per rank
    refit_bucket_mib: Positive = 512  # weights exchanged at once in a refit from Megatron to vLLM
    enforce_eager: bool = False  # no graph capture: slower steps, faster start

    def groups(self, world: int) -> int:
        """Number of groups of ranks with an engine each. Raises `UserError` if `tp` does not divide `world`."""
        if world % self.tp:
            raise UserError(f"world size {world} does not fit sampler.tp={self.tp}: use a multiple, or another tp")
        return world // self.tp

    @property
    def refit_bucket_bytes(self) -> int:
        return self.refit_bucket_mib * 2**20


@dataclass(config=_STRICT, kw_only=True)
class DataConfig:
    """Problems: a JSONL or parquet file, a `datasets` folder, or a hub name."""

    path: str = ""
    name: str | None = None  # configuration name of a hub data set
    split: str = "train"
    problem_field: str = "problem"
    answer_field: str | None = "answer"  # what to grade with: an answer, or a program's tests
    reference_field: str | None = "solution"  # may be null or blank where a problem has no reference solution
    task: Literal["math", "code"] = "math"  # chooses the prompt templates and how responses are graded
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)  # e.g. {enable_thinking: false}
    max_prompt_tokens: Positive = 2048  # paper
    max_reference_tokens: Positive = 4096  # paper
    # How to treat problems without a reference solution, for a method that shows the teacher one.
    missing_reference: Literal["refuse", "drop"] = "refuse"
    # What happens to a problem whose prompt, or a sample whose refinement prompt, is too long. `cut` shortens the
    # reference solution or the rollout inside the prompt, never the problem itself. A response that was cut off at its
    # length limit is trained on only under `cut`.
    overlong: Literal["drop", "cut"] = "drop"
    shuffle: bool = True


@dataclass(config=_STRICT, kw_only=True)
class HeldOutConfig:
    """Problems for evaluating the student between steps, not trained on; fields are named as in `data`."""

    path: str | None = None  # as data.path; None: no held-out problems
    name: str | None = None  # configuration name of a hub data set
    split: str = "test"
    every: NonNegative = 0  # steps; 0: only before the first step and after the last
    samples: Positive = 1  # responses per problem


@dataclass(config=_STRICT, kw_only=True)
class LossConfig:
    """Parameters of the divergences; the method determines which divergence is used."""

    temperature: Annotated[float, Field(gt=0)] = 1.0  # softmax temperature on both sides (paper)
    beta: Annotated[float, Field(ge=0.001, le=0.999)] = 0.5  # weight of the teacher in JSD, zero at either end
    clip: Annotated[float, Field(gt=0)] = 0.1  # bound of one token's divergence, `*-clip` methods (paper)
    top_k: Positive = 32  # teacher tokens kept, `*-topk` methods (paper)
    tail: bool = False  # `*-topk`: all other tokens as one more outcome; false: both sides renormalised (paper)
    normalize: Literal["sequence", "token"] = "sequence"  # mean of means over sequences (paper), or over all tokens
    chunk_tokens: Positive | None = None  # response tokens whose logits exist at once; None: chosen by the loss


@dataclass(config=_STRICT, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up, then constant or cosine."""

    lr: Annotated[float, Field(gt=0)] = 5e-6  # paper
    min_lr_ratio: Fraction = 0.0  # of lr, where a cosine ends
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_fraction: Fraction = 0.1  # of all steps (paper)
    weight_decay: Annotated[float, Field(ge=0)] = 0.005  # paper
    beta1: Share = 0.9
    beta2: Share = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-8
    clip_grad: Annotated[float, Field(ge=0)] = 1.0  # global norm; 0: no clipping


@dataclass(config=_STRICT, kw_only=True)
class CheckpointConfig:
    """Megatron distributed checkpoints in `<run_dir>/checkpoints/step_N`."""

    every: NonNegative = 0  # steps; 0: only at the end and when stopped
    keep: Positive = 2  # newest ones kept
    keep_every: Positive | None = None  # steps; checkpoints at multiples of it are kept too


@dataclass(config=_STRICT, kw_only=True)
class LogConfig:
    """Output of a run besides its metrics."""

    tensorboard: bool = True
    wandb: str | None = None  # project on Weights & Biases
    samples_per_step: NonNegative = 4  # y_o / y_r pairs kept in samples/
    verify_refit: bool = False  # compare checksums of every tensor after each refit
    # The run stops if the mean |sampler - trainer| log-probability of a step's sampled tokens exceeds this many nats,
    # unless the model that sampled has been trained since (`staleness`).
    max_drift: Annotated[float, Field(gt=0)] | None = None
    drift_tokens: NonNegative = 512  # tokens per step and rank whose sampler and trainer log-probabilities are compared


@dataclass(config=_STRICT, kw_only=True)
class TrainConfig:
    """One TRD run."""

    model: str = ""  # Hugging Face folder of the student
    method: MethodName = "trd-opsd"
    corpus: Literal["all", "rollout_wrong", "refinement_right", "corrected"] = "all"  # ablation: samples trained on
    run_dir: str = "runs/default"
    steps: Positive = 100
    batch_size: Positive = 16  # problems a step (paper)
    rollouts_per_problem: Positive = 1
    refinements_per_rollout: Positive = 1
    epochs_per_batch: Positive = 1  # optimizer steps on the same samples; all but the first are off-policy
    overlap: Literal["none", "teacher"] = "none"  # teacher: compute its hidden states during sampling
    staleness: Literal[0, 1] = 0  # 1: sample during the previous step, with the weights before that step
    world_size: Positive | None = None  # ranks; None: this machine's GPUs, on a CPU the fewest that fit every layout
    seed: NonNegative = 0
    student: StudentConfig = Field(default_factory=StudentConfig)
    lora: LoraConfig = Field(default_factory=LoraConfig)
    teacher: TeacherConfig = Field(default_factory=TeacherConfig)
    sampler: SamplerConfig = Field(default_factory=SamplerConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    held_out: HeldOutConfig = Field(default_factory=HeldOutConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    log: LogConfig = Field(default_factory=LogConfig)

    @property
    def fewest_ranks(self) -> int:
        """The smallest number of ranks that fits every layout; all others that do are multiples of it."""
        layouts = (part.pp * math.lcm(part.tp, part.ep) for part in (self.student, self.teacher_grid))
        return math.lcm(*layouts, self.sampler.tp)

    @property
    def live_teacher(self) -> bool:
        """Whether the student itself, as it is, is the teacher."""
        return self.teacher.model is None and self.teacher.weights == "live"

    @property
    def shared_teacher(self) -> bool:
        """Whether the teacher is computed by the student's engine: the student itself, or without its adapters."""
        without_adapters = self.teacher.model is None and self.teacher.weights == "frozen" and self.lora.rank > 0
        return self.live_teacher or without_adapters

    @property
    def teacher_grid(self) -> StudentConfig | TeacherConfig:
        """The section whose `tp`, `pp` and `ep` are the teacher's."""
        return self.student if self.shared_teacher else self.teacher

    @property
    def averaged_teacher(self) -> bool:
        """Whether the teacher is a moving average of the student."""
        return self.teacher.model is None and self.teacher.weights == "ema"

    @property
    def frozen_teacher(self) -> bool:
        """Whether the teacher's hidden states stay valid after an optimizer step."""
        return not (self.live_teacher or self.averaged_teacher)


def _one_line(error: ValidationError, where: str) -> UserError:
    """The first error of pydantic, as a sentence with the key, the value and the nearest known key."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return UserError(f"{where}: unknown key '{key}'; {_nearest(key)}")
    return UserError(f"{where}: {key}={first['input']!r} is not valid: {first['msg']}")


def known_keys(cls: type = TrainConfig, prefix: str = "") -> list[str]:
    """Every dotted key of the configuration, for suggestions and help."""
    keys: list[str] = []
    for field in dataclasses.fields(cls):
        section = _SECTIONS.get(field.name) if not prefix else None
        keys += known_keys(section, f"{field.name}.") if section else [prefix + field.name]
    return keys


_SECTIONS: dict[str, type] = {
    name: kind
    for name, kind in get_type_hints(TrainConfig).items()
    if isinstance(kind, type) and dataclasses.is_dataclass(kind)
}


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain nested dictionary of a configuration."""
    return dataclasses.asdict(config)


def flatten(config: TrainConfig) -> dict[str, Any]:
    """Every setting by its dotted key."""
    return _flat(to_dict(config))


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        section = name in _SECTIONS and isinstance(value, Mapping)
        flat |= {f"{name}.{key}": entry for key, entry in value.items()} if section else {name: value}
    return flat


def from_dict(values: Mapping[str, Any], where: str) -> TrainConfig:
    """Validated configuration from a nested dictionary. Raises `UserError` naming `where` and the key."""
    try:
        config = TypeAdapter(TrainConfig).validate_python(dict(values))
    except ValidationError as error:
        raise _one_line(error, where) from None
    given = _flat(values)
    for key, value in flatten(config).items():
        if isinstance(given.get(key), bool) and not isinstance(value, bool):  # pydantic accepts true as 1
            raise UserError(f"{where}: {key}={given[key]!r} is not valid: Input should be a valid number")
    return config


def apply_overrides(config: TrainConfig, overrides: Iterable[str]) -> TrainConfig:
    """Apply `a.b=value` overrides (values are YAML scalars). Raises `UserError` for an unknown key or a bad value."""
    values = to_dict(config)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"override '{override}': expected key=value, e.g. optimizer.lr=1e-5")
        target = values
        *parents, last = key.split(".")
        for parent in parents:
            if not isinstance(target.get(parent), dict):
                raise UserError(f"override '{override}': unknown key '{key}'; {_nearest(key)}")
            target = target[parent]
        if last not in target and parents[-1:] != ["chat_template_kwargs"]:
            raise UserError(f"override '{override}': unknown key '{key}'; {_nearest(key)}")
        if isinstance(target.get(last), dict) and last in _SECTIONS:
            raise UserError(f"override '{override}': '{key}' is a section; set one of its keys, e.g. {key}.…=value")
        target[last] = _parse_value(key, text, override)
    return from_dict(values, "override")


def _nearest(key: str) -> str:
    known, last = known_keys(), key.rpartition(".")[2]
    named = [other for other in known if other.rpartition(".")[2] == last]  # the right name in the wrong section
    near = named or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else "see megatron_trd/config.py for every key"


def _parse_value(key: str, text: str, override: str) -> Any:
    """A YAML value; for a text key, the text itself: run_dir=2026-01-31 is not a date, nor model=007 a number."""
    text = text.strip()
    if key in _text_keys() and text not in ("null", "~") and text[:1] not in ("'", '"'):
        return text
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        raise UserError(f"override '{override}': '{text}' is not a YAML value; quote it") from None
    if value == text:  # a plain string, not a quoted one: YAML 1.1 reads 5e-6 as a string
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _text_keys(cls: type = TrainConfig, prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for name, kind in get_type_hints(cls).items():
        if name in _SECTIONS and not prefix:
            keys |= _text_keys(_SECTIONS[name], f"{name}.")
        elif kind in (str, str | None):
            keys.add(prefix + name)
    return keys


def save(config: TrainConfig, path: Path) -> None:
    """Write the resolved configuration as YAML, atomically even if this process is killed."""
    replace_text(path, yaml.safe_dump(to_dict(config), sort_keys=False))


class _Loader(yaml.SafeLoader):
    """Rejects duplicate keys: PyYAML silently keeps the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"'{key.value}' is there twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load(path: Path) -> TrainConfig:
    """Read a configuration written by `save` or by hand. Raises `UserError` if it is missing or not valid."""
    if not path.is_file():
        raise UserError(f"{path}: no such configuration file")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; expected a YAML file of settings") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or type(error).__name__}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of settings, e.g. 'steps: 100'")
    return from_dict(values, str(path))
