"""What `megatron-trd train` does: check, write the run folder's configuration, start the ranks, wait."""

from __future__ import annotations

from pathlib import Path

from megatron_trd import config as configuration
from megatron_trd.config import TrainConfig
from megatron_trd.launch import launch
from megatron_trd.training.checkpoint import checkpoints
from megatron_trd.training.checks import check, check_run_folder


def run_training(config: TrainConfig, *, resume: bool = False) -> int:
    """Returns the number of steps done; raises `UserError` for bad input and `JobFailed` if a rank died."""
    inputs = check(config)
    check_run_folder(config, resume)
    folder = Path(config.run_dir)
    configuration.save(config, folder / "config.yaml")
    arguments = ["-m", "megatron_trd.training.worker", str(folder / "config.yaml"), *(["--resume"] if resume else [])]
    launch(arguments, inputs.world_size, folder / "logs")
    return max(checkpoints(config.run_dir), default=0)
