"""One rank of an evaluation: `python -m megatron_trd.evaluation.worker CONFIG.yaml [CHECKPOINT]` under a launcher."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_trd import config as configuration
from megatron_trd import platform
from megatron_trd.config import TrainConfig
from megatron_trd.launch import run_rank

if TYPE_CHECKING:
    from megatron_trd.engines.sampler import Engine


def main() -> None:
    """Sample every problem, grade, and let rank 0 write the evaluation's folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("checkpoint", type=Path, nargs="?")
    arguments = parser.parse_args()
    _evaluate(configuration.load(arguments.config), arguments.checkpoint)
    dist.barrier()
    dist.destroy_process_group()


def _evaluate(config: TrainConfig, checkpoint: Path | None) -> None:
    from megatron_trd.data.problems import load_problems
    from megatron_trd.data.prompts import PromptBuilder
    from megatron_trd.engines.sampler import Engine, Sampler
    from megatron_trd.evaluation.responses import write_results
    from megatron_trd.models.architecture import read_architecture
    from megatron_trd.models.folder import ModelFolder

    current = platform.current()
    current.set_up()
    dist.init_process_group(current.backend)
    folder = ModelFolder(config.model)
    arch = read_architecture(folder)
    prompts = PromptBuilder(folder.tokenizer, config.data.task, config.data.chat_template_kwargs)
    problems = load_problems(config.data)
    asked = [prompts.ids("vanilla", problem.problem) for problem in problems]
    engine = Engine(config.model, arch, config, max(map(len, asked)) + config.sampler.max_rollout_tokens)
    if checkpoint is not None:
        _load_checkpoint(engine, config, checkpoint)
    times = config.rollouts_per_problem
    repeated = [problem for problem in problems for _ in range(times)]
    begin = time.perf_counter()
    trajectories = Sampler(config, engine, engine).sample(
        0, repeated, [ids for ids in asked for _ in range(times)], None
    )
    seconds = time.perf_counter() - begin
    if dist.get_rank() == 0:
        write_results(config, prompts, trajectories, seconds=seconds, checkpoint=checkpoint)


def _load_checkpoint(engine: Engine, config: TrainConfig, checkpoint: Path) -> None:
    """Megatron shards of a run into the engine, the way a training step's refit brings them."""
    from megatron_trd.models.architecture import build_model, transformer_config
    from megatron_trd.models.loading import gathered_source
    from megatron_trd.models.megatron_folder import load_model
    from megatron_trd.parallel.grid import student_grid

    grid = student_grid(config.sampler.tp, 1, seed=config.seed)
    with platform.current().megatron():
        model = build_model(engine.arch, grid, transformer_config(engine.arch, grid), with_head=True)
        load_model(checkpoint, model)
    engine.refit(gathered_source(model, engine.arch, grid))


if __name__ == "__main__":
    run_rank(main)
