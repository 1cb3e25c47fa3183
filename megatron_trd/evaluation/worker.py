"""One rank of an evaluation: `python -m megatron_trd.evaluation.worker CONFIG.yaml` under a launcher."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch.distributed as dist

from megatron_trd import config as configuration
from megatron_trd import platform
from megatron_trd.config import TrainConfig
from megatron_trd.doctor.versions import check_sampler
from megatron_trd.launch import run_rank, starting


def main() -> None:
    """Sample every problem; rank 0 grades the responses and writes the evaluation's folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    _evaluate(configuration.load(parser.parse_args().config))
    dist.barrier()
    dist.destroy_process_group()


def _evaluate(config: TrainConfig) -> None:
    with starting():
        from megatron_trd.data.problems import load_problems
        from megatron_trd.data.prompts import PromptBuilder
        from megatron_trd.engines.engine import Engine
        from megatron_trd.engines.sampler import Sampler
        from megatron_trd.evaluation.responses import write_results
        from megatron_trd.models.model import open_model
        from megatron_trd.training.checkpoint import check_files

        current = platform.current()
        current.set_up()
        check_sampler(current.extra, current.found)
        current.join()
        model = open_model(config.model)
        check_files(model.path)
        prompts = PromptBuilder.of(model.folder, config.data)
        problems = load_problems(config.data)
        asked = [prompts.ids("vanilla", problem.problem) for problem in problems]
        engine = Engine(model, config, max(map(len, asked)) + config.sampler.max_rollout_tokens)
        engine.refit(model.source)
    times = config.rollouts_per_problem
    repeated = [problem for problem in problems for _ in range(times)]
    begin = time.perf_counter()
    trajectories = Sampler(config, engine, engine).sample(
        0, repeated, [ids for ids in asked for _ in range(times)], None
    )
    seconds = time.perf_counter() - begin
    if dist.get_rank() == 0:
        write_results(config, prompts, trajectories, seconds=seconds)


if __name__ == "__main__":
    run_rank(main)
