"""What `megatron-trd eval` does: check, start the ranks, print the scores."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_trd import config as configuration
from megatron_trd.config import DataConfig, SamplerConfig, TrainConfig
from megatron_trd.data.problems import load_problems
from megatron_trd.data.prompts import PromptBuilder
from megatron_trd.errors import UserError
from megatron_trd.launch import launch
from megatron_trd.models.architecture import Architecture, read_architecture
from megatron_trd.models.folder import ModelFolder
from megatron_trd.models.loading import check_folder
from megatron_trd.training.checks import make_folder


def run_evaluation(
    model: Path, data: str, samples: int, out: Path | None, seed: int, overrides: Sequence[str]
) -> dict[str, Any]:
    """Score a Hugging Face folder or a run's `checkpoints/step_N`; returns what `scores.json` holds.

    Raises `UserError` for bad input and `JobFailed` if a rank died.
    """
    checkpoint = model if (model / "metadata.json").is_file() else None
    name = f"{checkpoint.resolve().parents[1].name}-{checkpoint.name}" if checkpoint else model.resolve().name
    out = out or Path("runs/eval") / f"{name}-{Path(data).stem}"
    run = _run_of(checkpoint) if checkpoint else TrainConfig(model=str(model))
    config = TrainConfig(
        model=run.model,
        run_dir=str(out),
        rollouts_per_problem=samples,
        seed=seed,
        # a checkpoint is asked the way it was trained
        sampler=SamplerConfig(temperature=run.sampler.temperature, top_p=run.sampler.top_p),
        data=DataConfig(
            path=data,
            task=run.data.task,
            chat_template_kwargs=run.data.chat_template_kwargs,
            reference_field=None,
        ),
    )
    config = _check(configuration.apply_overrides(config, overrides))
    make_folder(out)
    configuration.save(config, out / "config.yaml")
    (out / "scores.json").unlink(missing_ok=True)  # an old score must not pass for this one's
    arguments = ["-m", "megatron_trd.evaluation.worker", str(out / "config.yaml")]
    launch([*arguments, *([str(checkpoint)] if checkpoint else [])], config.world_size or 1, out / "logs")
    if not (out / "scores.json").is_file():
        raise UserError(f"the evaluation was stopped; nothing was written to '{out}'")
    scores: dict[str, Any] = json.loads((out / "scores.json").read_text())
    return scores


def print_scores(scores: dict[str, Any]) -> None:
    """A table of one evaluation's scores."""
    title = f"{scores['model']} on {scores['data']}: {scores['problems']} problems, {scores['samples']} samples each"
    table = Table("score", "value", "95 % interval", title=title, title_justify="left")
    for name, score in scores.items():
        if name.startswith(("avg@", "pass@")):
            table.add_row(name, f"{score['value']:.1%}", f"{score['low']:.1%} to {score['high']:.1%}")
    table.add_row("truncated", f"{scores['truncated']:.1%}", "")
    table.add_row("mean tokens", f"{scores['mean_tokens']:.0f}", f"of at most {scores['max_tokens']}")
    Console().print(table)


def _run_of(checkpoint: Path) -> TrainConfig:
    """Configuration of the run that wrote a checkpoint: it names the architecture and the tokenizer."""
    path = checkpoint.resolve().parents[1] / "config.yaml"
    if not path.is_file():
        raise UserError(f"checkpoint '{checkpoint}': no config.yaml in its run folder; give a run's checkpoints/step_N")
    return configuration.load(path)


def _check(config: TrainConfig) -> TrainConfig:
    """The configuration with the number of ranks and the response limit settled. Raises `UserError`."""
    folder = ModelFolder(config.model)
    arch = read_architecture(folder)
    arch.check_layout(config.sampler.tp, 1, "sampler")
    world = config.world_size or config.sampler.tp
    if world % config.sampler.tp:
        raise UserError(f"world size {world} does not fit sampler.tp={config.sampler.tp}: use a multiple of it")
    if config.data.answer_field is None:
        raise UserError("an evaluation needs answers to grade with: set data.answer_field to their field")
    limit = min(config.sampler.max_rollout_tokens, _room(config, folder, arch))
    check_folder(folder, arch)
    sampler = dataclasses.replace(config.sampler, max_rollout_tokens=limit)
    return dataclasses.replace(config, world_size=world, sampler=sampler)


def _room(config: TrainConfig, folder: ModelFolder, arch: Architecture) -> int:
    """Tokens that the model's context leaves for a response to the longest problem."""
    prompts = PromptBuilder(folder.tokenizer, config.data.task, config.data.chat_template_kwargs)
    lengths = [len(prompts.ids("vanilla", problem.problem)) for problem in load_problems(config.data)]
    room = arch.max_positions - max(lengths)
    if room < 1:
        raise UserError(
            f"problem {lengths.index(max(lengths)) + 1} of '{config.data.path}' has a prompt of {max(lengths)} tokens, "
            f"the context of model '{config.model}' is {arch.max_positions}: remove it from the data"
        )
    return room
