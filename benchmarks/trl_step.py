"""Steps of TRL's `DistillationTrainer` for `benchmarks.step`: `python -m benchmarks.trl_step SETTINGS.json`.

The trainer is called as in its own script; settings not given have TRL's defaults. Its generation, weight sync and
teacher are timed where the trainer calls them. Each step's times, loss and tokens are written to the run folder under
the names that our own runs use.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from megatron_trd.config import DataConfig
from megatron_trd.data.problems import load_problems
from megatron_trd.data.prompts import PromptBuilder
from megatron_trd.models.folder import ModelFolder
from megatron_trd.reporting.metrics import MetricsWriter


def main() -> None:
    """Train as the settings say: keys of `DistillationConfig`, and the `model`, `teacher`, `problems` and `threads`."""
    warnings.filterwarnings("ignore")
    settings = json.loads(Path(sys.argv[1]).read_text())
    model, teacher, problems, threads = (settings.pop(key) for key in ("model", "teacher", "problems", "threads"))
    torch.set_num_threads(threads)
    if settings.get("use_vllm"):  # it needs the process group that a launcher would have made
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    from trl import DistillationConfig, DistillationTrainer

    trainer = DistillationTrainer(
        model=model,
        teacher_model=teacher,
        args=DistillationConfig(report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, **settings),
        train_dataset=_prompts(model, problems),
    )
    trainer.add_callback(_recorder(trainer, Path(settings["output_dir"])))
    trainer.train()


def _prompts(model: str, problems: str) -> Any:
    """Our vanilla prompts as conversations: the model's chat template turns them into the same token ids."""
    from datasets import Dataset

    builder = PromptBuilder(ModelFolder(model).tokenizer)
    texts = [builder.text("vanilla", problem.problem) for problem in load_problems(DataConfig(path=problems))]
    return Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in texts])


def _recorder(trainer: Any, folder: Path) -> Any:
    """A callback that writes one line per step, and the clocks that it reads."""
    from transformers import TrainerCallback

    seconds: dict[str, float] = {}
    sampled: list[int] = []

    def clocked(name: str, method: Callable[..., Any], counts: Callable[..., bool] = lambda *_: True) -> Any:
        @wraps(method)
        def call(*arguments: Any, **keywords: Any) -> Any:
            begin = time.perf_counter()
            result = method(*arguments, **keywords)
            if counts(*arguments):
                seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begin
            return result

        return call

    class Recorder(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            seconds.clear()
            sampled.clear()
            self.begin = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            step = time.perf_counter() - self.begin
            refit, sample, teacher = (seconds.get(name, 0.0) for name in ("refit", "sample", "teacher"))
            self.times = {"refit": refit, "sample": sample - refit, "teacher": teacher}
            self.times |= {"train": step - sample - teacher, "step": step}

        def on_log(self, _: Any, state: Any, __: Any, logs: dict[str, Any] | None = None, **___: Any) -> None:
            if logs and "loss" in logs:
                metrics = {f"time/{name}": value for name, value in self.times.items()}
                metrics |= {"tokens/trained": sum(sampled), "length/rollout": fmean(sampled)}
                writer.write(state.global_step - 1, metrics | {"loss": float(logs["loss"])})

    writer = MetricsWriter(folder, tensorboard=False, resume_from=0)
    generate = trainer._generate_single_turn

    def counted(*arguments: Any, **keywords: Any) -> Any:
        completions = generate(*arguments, **keywords)
        sampled.extend(map(len, completions))
        return completions

    trainer._generate_single_turn = clocked("sample", counted)
    hidden = trainer._get_last_hidden_state  # of student and teacher alike
    trainer._get_last_hidden_state = clocked("teacher", hidden, lambda model, *_: model is trainer.teacher_model)
    if trainer.use_vllm:
        trainer.vllm_generation.sync_weights = clocked("refit", trainer.vllm_generation.sync_weights)
    return Recorder()


if __name__ == "__main__":
    main()
