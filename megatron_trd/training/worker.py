"""One rank of a training job: `python -m megatron_trd.training.worker CONFIG.yaml [--resume]` under torchrun."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from megatron_trd import config as configuration


def main() -> None:
    """Train; on an error leave the reason where the launcher reads it and end at once."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("config", type=Path)
    arguments.add_argument("--resume", action="store_true")
    parsed = arguments.parse_args()
    handler = get_error_handler()
    handler.initialize()
    try:
        from megatron_trd.training.loop import train
        from megatron_trd.training.run import Run

        run = Run(configuration.load(parsed.config), resume=parsed.resume)
        train(run)
        run.close()
    except Exception as error:
        import traceback

        traceback.print_exc()
        handler.record_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # no atexit handlers: they would wait for the ranks this one has just failed
    sys.stdout.flush()
    os._exit(0)  # vLLM and gloo threads have nothing left to do


if __name__ == "__main__":
    main()
