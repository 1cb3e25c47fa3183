"""All checks of a run that need neither a process group nor a loaded model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from megatron_trd import platform
from megatron_trd.config import DataConfig, LoraConfig, TrainConfig
from megatron_trd.data.problems import Problem, load_problems
from megatron_trd.data.prompts import Context, PromptBuilder
from megatron_trd.engines.teacher import check_teacher
from megatron_trd.errors import UserError
from megatron_trd.evaluation.grading import check_gradable
from megatron_trd.methods import METHODS, check_threads
from megatron_trd.models.architecture import Architecture
from megatron_trd.models.loading import check_tokenizer
from megatron_trd.models.model import Model, open_model
from megatron_trd.parallel.grid import Layout
from megatron_trd.reporting.wandb_run import check_wandb


@dataclass(frozen=True)
class Inputs:
    """Inputs of a run: models and problems, all checked."""

    student: Model
    teacher: Model  # the student's own in self-distillation
    problems: list[Problem]
    held_out: list[Problem]
    world_size: int
    max_length: int  # longest prompt and response together, tokens
    digests: dict[str, str] = field(default_factory=dict)  # of what they hold, added where a run starts


def check(config: TrainConfig, *, grades: bool = True) -> Inputs:
    """Open and check everything the run needs. Raises `UserError`; loads no weights.

    `grades`: otherwise answers are left out, which may be gigabytes of programs' tests.
    """
    if not config.model:
        raise UserError("model is not set: give the student's Hugging Face folder (model=DIR)")
    student = open_model(config.model)
    teacher = open_model(config.teacher.model) if config.teacher.model else student
    check_teacher(student.arch, teacher.arch)
    _check_tokenizers(student, teacher)
    student.arch.check_layout(config.student.tp, config.student.pp, "student", config.student.ep)
    grid = config.teacher_grid
    teacher.arch.check_layout(grid.tp, grid.pp, "teacher", grid.ep)
    if student.arch.experts and config.student.tp > 1 and not config.student.sequence_parallel:
        raise UserError("a mixture of experts with student.tp > 1 needs student.sequence_parallel=true")
    for model in (student, teacher):
        model.arch.check_layout(config.sampler.tp, 1, "sampler")
    world = _world_size(config)
    max_length = _longest(config)
    for what, model in (("student", student), ("teacher", teacher)):
        if max_length > model.arch.max_positions:
            raise UserError(
                f"the longest prompt and response are {max_length} tokens, the {what} model's context is "
                f"{model.arch.max_positions}: lower data.max_prompt_tokens, data.max_reference_tokens, "
                "sampler.max_rollout_tokens or sampler.max_refinement_tokens"
            )
    _check_method(config)
    _check_adapters(config.lora, student.arch)
    _check_order(config)
    check_wandb(config)
    read = config.data if grades else dataclasses.replace(config.data, answer_field=None)
    problems = _with_references(config, load_problems(read))
    for model, own in ((student, {}), (teacher, config.teacher.chat_template_kwargs)):  # prompts can be built
        PromptBuilder.of(model.folder, config.data, own).ids("vanilla", problems[0].problem)
    student.check()
    if config.teacher.model:
        teacher.check()
    teacher = teacher.with_vocabulary(student.arch.vocab_size)
    return Inputs(student, teacher, problems, _held_out(config, read, student), world, max_length)


def _check_tokenizers(student: Model, teacher: Model) -> None:
    """Token ids pass between the models unchanged, so each token must have the same id in both."""
    check_tokenizer(student.folder, student.arch)
    if teacher is student:
        return
    vocabulary = student.folder.tokenizer.get_vocab()
    others = {index: token for token, index in teacher.folder.tokenizer.get_vocab().items()}
    if max(others) >= student.arch.vocab_size:
        raise UserError(
            f"teacher.model '{teacher.path}': token {max(others)} is {others[max(others)]!r}, beyond the student's "
            f"{student.arch.vocab_size} embeddings: full-vocabulary distillation needs one tokenizer for both"
        )
    different = [token for token, index in vocabulary.items() if others.get(index, token) != token]
    if different:
        token = min(different, key=vocabulary.__getitem__)
        index = vocabulary[token]
        raise UserError(
            f"teacher.model '{teacher.path}': token {index} is {others[index]!r}, for the student {token!r}: "
            "full-vocabulary distillation needs one tokenizer for both"
        )
    if unknown := teacher.folder.stop_tokens - student.folder.stop_tokens:
        token = min(unknown)
        raise UserError(
            f"teacher.model '{teacher.path}' ends its responses with {others.get(token)!r}, at which the student "
            f"does not stop: add {token} to eos_token_id in '{student.path}/generation_config.json'"
        )


def _check_method(config: TrainConfig) -> None:
    method = METHODS[config.method]
    if method.needs_reference and config.data.reference_field is None:
        raise UserError(
            f"method {config.method} shows the teacher a reference solution: set data.reference_field to its field"
        )
    if config.corpus != "all" and (config.data.answer_field is None or not method.refines):
        raise UserError(f"corpus={config.corpus} needs a method that refines and data.answer_field to grade with")
    if config.data.answer_field is not None:
        check_gradable(config.data, "data.answer_field")
    if config.teacher.model and config.teacher.weights != "frozen":
        raise UserError(
            f"teacher.weights={config.teacher.weights} is for a self-teacher; unset teacher.model or teacher.weights"
        )
    if config.log.max_drift is not None and not config.log.drift_tokens:
        raise UserError("log.max_drift bounds what is measured on log.drift_tokens tokens, which are 0: raise them")
    if config.student.sequence_parallel and config.student.tp == 1:
        raise UserError("student.sequence_parallel=true needs student.tp > 1")
    if method.teacher_context == "vanilla" and not config.teacher.model:
        raise UserError(
            f"method {config.method} shows the teacher only what the student sees, so a self-teacher would teach "
            "nothing: set teacher.model, or choose an opsd-… or trd-… method"
        )


def _check_adapters(lora: LoraConfig, arch: Architecture) -> None:
    if lora.alpha is not None and not lora.rank:
        raise UserError("lora.alpha scales adapters, and there are none: set lora.rank too, or unset it")
    if lora.rank > arch.hidden_size:  # one side of each matrix that has adapters
        raise UserError(
            f"lora.rank={lora.rank} is more than the rank of any matrix, as the model's hidden size is "
            f"{arch.hidden_size}: lower it, or train all weights (lora.rank=0)"
        )


def _with_references(config: TrainConfig, problems: list[Problem]) -> list[Problem]:
    """The problems that the method can use; they keep their indices in the data set."""
    if not METHODS[config.method].needs_reference:
        return problems
    kept = [problem for problem in problems if problem.reference is not None]
    if not kept or (len(kept) < len(problems) and config.data.missing_reference == "refuse"):
        drop = " (data.missing_reference=drop leaves them out)" if kept else ""
        raise UserError(
            f"data '{config.data.path}': {len(problems) - len(kept):,} of {len(problems):,} problems have no "
            f"'{config.data.reference_field}', which method {config.method} shows the teacher{drop}"
        )
    return kept


def _held_out(config: TrainConfig, read: DataConfig, student: Model) -> list[Problem]:
    """The held-out problems, with the fields that `read` names; each must fit its prompt limit, or scores would cover
    only some of them."""
    asked = config.held_out
    if asked.path is None:
        if asked.every:
            raise UserError("held_out.every is set and there is nothing to ask: set held_out.path")
        return []
    check_gradable(config.data, "held_out.path")
    data = dataclasses.replace(read, path=asked.path, name=asked.name, split=asked.split, reference_field=None)
    problems, prompts = load_problems(data, "held_out"), PromptBuilder.of(student.folder, data)
    limit = prompt_limit(config, "vanilla")
    for number, problem in enumerate(problems, 1):
        if (length := len(prompts.ids("vanilla", problem.problem))) > limit:
            raise UserError(
                f"problem {number} of held_out.path '{asked.path}' has a prompt of {length} tokens, "
                f"data.max_prompt_tokens is {limit}: raise it, or remove the problem"
            )
    return problems


def _check_order(config: TrainConfig) -> None:
    """Check which phases may overlap, and which memory may be lent to the sampler meanwhile."""
    if config.staleness and config.overlap != "none":
        raise UserError(
            "staleness=1 samples beside training, when the teacher is at work: overlap=none, or staleness=0"
        )
    stale = "staleness=1" if config.staleness else ""
    overlap = "overlap=teacher" if config.overlap == "teacher" else ""
    if not platform.current().threads_communicate:
        check_threads(config)
    if overlap and config.teacher.hidden_in != "device":
        raise UserError(
            f"overlap=teacher keeps on the device what teacher.hidden_in={config.teacher.hidden_in} is to move out "
            "of it: set one of the two"
        )
    lent = (
        ("student.offload", config.student.offload, stale),
        ("teacher.offload", config.teacher.offload, stale or overlap),
    )
    for key, wanted, other in lent:
        if wanted and other:
            raise UserError(
                f"{key}=true lends memory to the sampler, and {other} needs it meanwhile: set one of the two"
            )
    if config.teacher.offload and config.shared_teacher:
        raise UserError("teacher.offload=true: this teacher has no weights of its own; see student.offload")


def _world_size(config: TrainConfig) -> int:
    world = config.world_size or platform.current().ranks(config.fewest_ranks)
    for part in (config.student, config.teacher_grid):
        Layout(part.tp, part.pp, world, part.ep)
    config.sampler.groups(world)
    return world


def prompt_limit(config: TrainConfig, context: Context) -> int:
    """Longest prompt of a context in tokens: the problem, plus the reference and the rollout where they are shown."""
    limit = config.data.max_prompt_tokens
    if "reference" in context:
        limit += config.data.max_reference_tokens
    if "refine" in context:
        limit += config.sampler.max_rollout_tokens
    return limit


def _longest(config: TrainConfig) -> int:
    method = METHODS[config.method]
    response = config.sampler.max_refinement_tokens if method.refines else config.sampler.max_rollout_tokens
    return max(
        prompt_limit(config, "vanilla") + max(response, config.sampler.max_rollout_tokens),
        prompt_limit(config, method.teacher_context) + response,
    )
