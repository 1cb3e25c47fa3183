"""Implementation of `megatron-trd train` and `megatron-trd check`: run all checks possible before ranks start, then
start the ranks."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from megatron_trd import config as configuration
from megatron_trd.config import TrainConfig
from megatron_trd.errors import UserError
from megatron_trd.launch import launch
from megatron_trd.methods import unused_settings
from megatron_trd.training.checkpoint import steps_saved
from megatron_trd.training.checks import Inputs, check
from megatron_trd.training.provenance import check_inputs, digests, same_inputs
from megatron_trd.training.run_folder import check_run_folder


def check_start(config: TrainConfig, *, ranks: int | None = None, resume: bool = False) -> Inputs:
    """Raise `UserError` if a run of `config` cannot start, on `ranks` ranks if given."""
    if ranks is not None and config.world_size not in (None, ranks):
        raise UserError(f"world_size={config.world_size}, but the job has {ranks} ranks: change one of the two")
    inputs = check(dataclasses.replace(config, world_size=ranks or config.world_size))
    inputs = dataclasses.replace(inputs, digests=digests(config, inputs))
    check_run_folder(config, resume, same_inputs(config, inputs))
    check_inputs(config, inputs)
    return inputs


def describe(config: TrainConfig, ranks: int) -> str:
    """One line that describes a run that can start, its size and its progress, and one if some settings do nothing."""
    done = steps_saved(config.run_dir)
    state = f"{done} of {config.steps} steps saved" if done else f"{config.steps} steps, none saved yet"
    unused = unused_settings(config)
    without_effect = f"\nwithout effect in this run: {', '.join(unused)}" if unused else ""
    return f"{config.method} on {ranks} ranks, run folder {config.run_dir}: {state}{without_effect}"


def run_training(config: TrainConfig, *, resume: bool = False) -> int:
    """Train on this machine. Returns the number of steps done.

    Raises `UserError` for bad input and `JobFailed` if a rank died.
    """
    world_size = check_start(config, resume=resume).world_size  # not the problems: there may be gigabytes of them
    print(describe(config, world_size), flush=True)
    if resume and (done := steps_saved(config.run_dir)) >= config.steps:
        return done
    logs = Path(config.run_dir) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=logs, prefix="config-", suffix=".yaml") as file:
        configuration.save(config, Path(file.name))
        arguments = ["-m", "megatron_trd.training.worker", file.name, *(["--resume"] if resume else [])]
        launch(arguments, world_size, logs)
    return steps_saved(config.run_dir)
