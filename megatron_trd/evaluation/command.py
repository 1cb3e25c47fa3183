"""Implementation of `megatron-trd eval`: check the input, start the ranks, print the scores."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_trd import config as configuration
from megatron_trd import platform
from megatron_trd.config import DataConfig, TrainConfig
from megatron_trd.data.problems import load_problems
from megatron_trd.data.prompts import PromptBuilder
from megatron_trd.errors import UserError
from megatron_trd.evaluation.grading import check_gradable
from megatron_trd.launch import launch
from megatron_trd.models.dist_checkpoint import is_checkpoint
from megatron_trd.models.loading import check_tokenizer
from megatron_trd.models.model import Model, open_model
from megatron_trd.reporting.metrics import METRICS_FILE
from megatron_trd.training.checkpoint import checkpoints
from megatron_trd.training.run_folder import make_folder
from megatron_trd.training.run_lock import release_lock, take_lock

_SETTINGS = ("sampler.", "data.", "world_size=")
_MEMORY_FRACTION = 0.9  # of a GPU, vLLM's own default


def run_evaluation(
    model: Path, data: str, samples: int, out: Path | None, seed: int, overrides: Sequence[str]
) -> dict[str, Any]:
    """Score a Hugging Face folder or a run's `checkpoints/step_N`; returns what `scores.json` holds.

    Raises `UserError` for bad input and `JobFailed` if a rank died.
    """
    _check_overrides(overrides)
    if steps := checkpoints(model):
        raise UserError(
            f"'{model}' is the folder of a run: give one of its checkpoints, --model {list(steps.values())[-1]}"
        )
    run = _run_of(model)
    name = f"{model.resolve().parents[1].name}-{model.name}" if run else model.resolve().name
    out = out or Path("runs/eval") / f"{name}-{Path(data).stem}"
    run = run or TrainConfig()
    config = TrainConfig(
        model=str(model),
        run_dir=str(out),
        rollouts_per_problem=samples,
        seed=seed,
        # a checkpoint is sampled as in its training, by an engine that has the GPU to itself
        sampler=dataclasses.replace(run.sampler, memory_fraction=_MEMORY_FRACTION),
        data=DataConfig(
            path=data,
            task=run.data.task,
            chat_template_kwargs=run.data.chat_template_kwargs,
            reference_field=None,
        ),
    )
    config = _check(configuration.apply_overrides(config, overrides))
    if (out / METRICS_FILE).exists() or checkpoints(out):
        raise UserError(f"'{out}' is the folder of a training run, whose config.yaml would be lost: set another --out")
    with _claimed(out, config):
        launch(["-m", "megatron_trd.evaluation.worker", str(out / "config.yaml")], config.world_size or 1, out / "logs")
        if not (out / "scores.json").is_file():
            raise UserError(f"the evaluation was stopped; nothing was written to '{out}'")
        scores: dict[str, Any] = json.loads((out / "scores.json").read_text())
    return scores


@contextlib.contextmanager
def _claimed(out: Path, config: TrainConfig) -> Iterator[None]:
    """Lock the folder for the block, with this evaluation's configuration and no scores in it.

    Raises `UserError`; an existing evaluation is then left unchanged.
    """
    make_folder(out)
    take_lock(out)
    try:
        if (out / "scores.json").exists() and (
            out / "config.yaml"
        ).exists():  # one that was stopped has nothing to lose
            _check_same(configuration.load(out / "config.yaml"), config, out)
        configuration.save(config, out / "config.yaml")
        (out / "scores.json").unlink(missing_ok=True)  # an old score must not be taken for this evaluation's
        yield
    finally:
        release_lock(out)


def _check_same(there: TrainConfig, config: TrainConfig, out: Path) -> None:
    """Raise `UserError` if the folder holds another evaluation: without `--out`, models or data sets of the same name
    share one folder."""
    before, now = configuration.flatten(there), configuration.flatten(config)
    for key, value in now.items():
        if value != before[key] and key != "run_dir":  # the same folder under any path
            name = "--samples" if key == "rollouts_per_problem" else key
            raise UserError(f"'{out}' was begun with {name}={before[key]}, not {value}: give another --out")


def _check_overrides(overrides: Sequence[str]) -> None:
    for override in overrides:
        if not override.startswith(_SETTINGS):
            raise UserError(
                f"override '{override}': an evaluation has {', '.join(f'{key}…' for key in _SETTINGS)} alone"
            )


def print_scores(scores: dict[str, Any]) -> None:
    """Print a table of one evaluation's scores."""
    title = f"{scores['model']} on {scores['data']}: {scores['problems']} problems, {scores['samples']} samples each"
    table = Table("score", "value", "95 % interval", title=title, title_justify="left")
    for name, score in scores.items():
        if name.startswith(("avg@", "pass@")):
            table.add_row(name, f"{score['value']:.1%}", f"{score['low']:.1%} to {score['high']:.1%}")
    table.add_row("truncated", f"{scores['truncated']:.1%}", "")
    table.add_row("mean tokens", f"{scores['mean_tokens']:.0f}", f"of at most {scores['max_tokens']}")
    Console().print(table)


def _run_of(model: Path) -> TrainConfig | None:
    """Configuration of the run that wrote a checkpoint, if it was written by a run."""
    path = model.resolve().parents[1] / "config.yaml" if is_checkpoint(model) else None
    return configuration.load(path) if path is not None and path.is_file() else None


def _check(config: TrainConfig) -> TrainConfig:
    """The configuration with the number of ranks and the response limit resolved. Raises `UserError`."""
    model = open_model(config.model)
    model.arch.check_layout(config.sampler.tp, 1, "sampler")
    world = config.world_size or platform.current().ranks(config.sampler.tp)
    config.sampler.groups(world)
    check_gradable(config.data, "an evaluation")
    limit = min(config.sampler.max_rollout_tokens, _room(config, model))
    check_tokenizer(model.folder, model.arch)
    model.check()
    sampler = dataclasses.replace(config.sampler, max_rollout_tokens=limit)
    return dataclasses.replace(config, world_size=world, sampler=sampler)


def _room(config: TrainConfig, model: Model) -> int:
    """Tokens that the model's context leaves for a response to the longest problem."""
    prompts = PromptBuilder.of(model.folder, config.data)
    lengths = [len(prompts.ids("vanilla", problem.problem)) for problem in load_problems(config.data)]
    room = model.arch.max_positions - max(lengths)
    if room < 1:
        raise UserError(
            f"problem {lengths.index(max(lengths)) + 1} of '{config.data.path}' has a prompt of {max(lengths)} tokens, "
            f"the context of model '{config.model}' is {model.arch.max_positions}: remove it from the data"
        )
    return room
