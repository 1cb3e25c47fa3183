"""One rank of a training job which keeps every step's samples, `RUN_DIR/sampled_N.json`: `recorder.py FILE.yaml`."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch.distributed as dist

from megatron_trd.launch import run_rank, starting
from megatron_trd.training import worker


def main() -> None:
    with starting():
        from megatron_trd.training.run import Run
        from megatron_trd.training.sampling import Sampled
    sample = Run.sample

    def keeping(run: Run, step: int) -> Sampled:
        sampled = sample(run, step)
        if dist.get_rank() == 0:
            Path(run.config.run_dir, f"sampled_{step}.json").write_text(sampled.to_json())
        return sampled

    with mock.patch.object(Run, "sample", keeping):
        worker.main()


if __name__ == "__main__":
    run_rank(main)
