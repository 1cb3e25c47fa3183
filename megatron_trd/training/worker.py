"""One rank of a training job: `python -m megatron_trd.training.worker CONFIG.yaml [--resume]` under torchrun."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_trd import config as configuration
from megatron_trd.launch import run_rank


def main() -> None:
    """Train what the configuration says."""
    from megatron_trd.training.loop import train
    from megatron_trd.training.run import Run

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    run = Run(configuration.load(arguments.config), resume=arguments.resume)
    train(run)
    run.close()


if __name__ == "__main__":
    run_rank(main)
