"""A run on Weights & Biases, beside its own files. The package is optional: `pip install wandb`."""

from __future__ import annotations

import importlib.machinery
import sys
import uuid
from pathlib import Path
from typing import Any

from megatron_trd.config import TrainConfig, to_dict
from megatron_trd.errors import UserError, line_of
from megatron_trd.files import replace_text


def check_wandb(config: TrainConfig) -> None:
    """Raise `UserError` if `log.wandb` is set and the package is missing."""
    spec = importlib.machinery.PathFinder.find_spec("wandb")  # also while ranks start, when it is hidden
    if config.log.wandb and (spec is None or spec.origin is None):  # a folder that wandb has made here is no package
        raise UserError(f"log.wandb={config.log.wandb} needs a package: pip install wandb; or unset it")


def open_wandb(config: TrainConfig) -> Any:
    """The `wandb.Run` of this run folder, the same one after a resume; None without `log.wandb`.

    Server, account and mode come from wandb's own variables (`WANDB_ENTITY`, `WANDB_MODE=offline`, …). Raises
    `UserError` if it cannot be opened.
    """
    if not config.log.wandb:
        return None
    if "wandb" in sys.modules and sys.modules["wandb"] is None:  # hidden by `launch.starting`
        del sys.modules["wandb"]
    import wandb

    folder = Path(config.run_dir)
    named = folder / "wandb" / "run_id"
    named.parent.mkdir(exist_ok=True)
    if not named.exists():
        replace_text(named, uuid.uuid4().hex[:8])
    try:
        run = wandb.init(
            project=config.log.wandb,
            name=folder.resolve().name,
            id=named.read_text(),
            resume="allow",
            dir=str(folder),
            config=to_dict(config),
            settings=wandb.Settings(silent=True, console="off"),
        )
    except wandb.errors.Error as error:
        raise UserError(f"log.wandb={config.log.wandb}: {line_of(error)} (WANDB_MODE=offline needs neither)") from None
    run.define_metric("step")
    run.define_metric("*", step_metric="step")  # a resumed run writes some steps again
    return run
