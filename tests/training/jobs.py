"""Real training jobs for tests: a small model, a few problems, and the command line that users type."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.models import write_model

STEPS = 4
STARTUP_SECONDS = 900  # of a job on a busy machine; a hang is far longer


def write_job(folder: Path, *, fields: dict[str, Any] | None = None, **overrides: Any) -> Path:
    """A model, its data and `job.yaml`, which `megatron-trd train` takes; TP 2 student, averaged self-teacher."""
    shape = {"max_position_embeddings": 1024, "tie_word_embeddings": True} | (fields or {})
    model = write_model(folder / "model", **shape)
    rows = [
        {"problem": f"What is {index} + 2?", "answer": str(index + 2), "solution": f"{index}+2={index + 2}"}
        for index in range(6)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict[str, Any] = {
        "model": str(model),
        "steps": STEPS,
        "batch_size": 3,
        "student": {"tp": 2, "micro_batch_size": 2},
        "teacher": {"weights": "ema", "ema_decay": 0.5},
        "sampler": {"max_rollout_tokens": 24, "max_refinement_tokens": 24},
        "held_out": {"path": str(data), "every": 2, "samples": 2},
        "data": {"path": str(data), "max_prompt_tokens": 400, "max_reference_tokens": 100, "overlong": "cut"},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"every": 2},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(values | overrides))
    return path


def start(*arguments: object) -> subprocess.Popen[str]:
    """`megatron-trd ARGUMENTS` with its output in a pipe."""
    command = [sys.executable, "-m", "megatron_trd.cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for a job and return what it printed. A process that holds the pipe after the job's end fails this."""
    try:
        output, _ = process.communicate(timeout=STARTUP_SECONDS)
    finally:
        process.kill()
    assert process.returncode == code, output[-3000:]
    return output


def metrics(run: Path, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    path = run / file
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + STARTUP_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def rank_pids(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of a job's ranks, lowest first."""
    children = [Path(f"/proc/{pid}") for task in Path(f"/proc/{process.pid}/task").iterdir() for pid in _children(task)]
    return sorted(int(path.name) for path in children if b"training.worker" in (path / "cmdline").read_bytes())


def _children(task: Path) -> list[str]:
    return (task / "children").read_text().split()
