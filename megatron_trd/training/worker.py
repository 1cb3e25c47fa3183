"""One rank of a training job, started by torchrun: `python -m megatron_trd.training.worker RECIPE [key=value ...]`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch.distributed as dist

from megatron_trd import platform
from megatron_trd.config import TrainConfig
from megatron_trd.doctor.versions import check_sampler
from megatron_trd.errors import UserError
from megatron_trd.launch import RefusedElsewhere, run_rank, starting
from megatron_trd.parallel.objects import from_first
from megatron_trd.training.checks import Inputs
from megatron_trd.training.command import check_start
from megatron_trd.training.provenance import record_start, same_inputs
from megatron_trd.training.run_folder import claim
from megatron_trd.training.run_lock import release_lock
from recipes.common import find_recipe


def main() -> None:
    """Train a recipe: every rank resolves the same configuration, and rank 0 owns the run folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", help="a recipe of recipes/, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    arguments = parser.parse_intermixed_args()
    with starting():
        from megatron_trd.training.loop import train
        from megatron_trd.training.run import Run

        current = platform.current()
        current.set_up()
        check_sampler(current.extra, current.found)
        current.join()
        config, inputs = _begin(arguments)
        run = Run(config, inputs, resume=arguments.resume)
    train(run)
    try:
        run.close()
    finally:
        if inputs is not None:
            release_lock(Path(config.run_dir))


def _begin(arguments: argparse.Namespace) -> tuple[TrainConfig, Inputs | None]:
    """The configuration, once rank 0 has checked it and owns the run folder, and on rank 0 the inputs that it has
    checked; if it fails, all ranks end. Collective."""

    def configuration() -> TrainConfig:
        return find_recipe(arguments.recipe, arguments.overrides)

    if dist.get_rank() > 0:
        refusal: str | None = from_first(None)
        if refusal is not None:
            raise RefusedElsewhere(refusal)
        return configuration(), None
    try:
        config = configuration()
        inputs = check_start(config, ranks=dist.get_world_size(), resume=arguments.resume)
        # Stores the actual number of ranks even if the recipe leaves it open, so that a later start can compare it.
        owned = dataclasses.replace(config, world_size=dist.get_world_size())
        claim(owned, resume=arguments.resume, same=same_inputs(config, inputs))
        record_start(owned, inputs)
    except UserError as error:
        from_first(str(error))
        raise
    from_first(None)
    return config, inputs


if __name__ == "__main__":
    run_rank(main)
