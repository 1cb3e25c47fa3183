"""A run on Weights & Biases, kept offline: what there is of it on the disk."""

from __future__ import annotations

import importlib.machinery
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_trd.config import from_dict
from megatron_trd.errors import UserError
from megatron_trd.reporting.wandb_run import check_wandb, open_wandb

# A process that writes one step. wandb looks at its settings once a process.
WRITE = """
import sys
from pathlib import Path
from megatron_trd.config import from_dict
from megatron_trd.reporting.metrics import MetricsWriter
from megatron_trd.launch import starting
from megatron_trd.reporting.wandb_run import check_wandb, open_wandb

folder, step = Path(sys.argv[1]), int(sys.argv[2])
with starting():
    config = from_dict({"run_dir": str(folder), "log": {"wandb": "trd"}, "optimizer": {"lr": 3e-5}}, "test")
    check_wandb(config)
    run = open_wandb(config)
writer = MetricsWriter(folder, tensorboard=False, resume_from=step, wandb=run)
writer.write(step, {"loss": 0.125 * (step + 1), "right/rollout": 0.5, "note": "no number"})
writer.close()
run.finish()
"""


def write(folder: Path, step: int, mode: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment = kept | {"WANDB_MODE": mode, "HOME": str(folder), "NETRC": str(folder / "netrc")}
    command = [sys.executable, "-c", WRITE, str(folder), str(step)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_a_resumed_run_is_the_same_run_there(tmp_path: Path) -> None:
    folder = tmp_path / "opsd"
    for step in range(2):
        done = write(folder, step, "offline")
        assert done.returncode == 0, done.stderr
    name = (folder / "wandb/run_id").read_text()
    kept = b"".join(path.read_bytes() for path in folder.glob(f"wandb/offline-run-*/run-{name}.wandb"))
    for text in (b"trd", b"opsd", b'"lr"', b"loss", b"0.125", b"0.25", b"right/rollout"):
        assert text in kept, text
    assert b"no number" not in kept


def test_without_a_project_nothing_is_opened(tmp_path: Path) -> None:
    assert open_wandb(from_dict({"run_dir": str(tmp_path)}, "test")) is None
    assert not list(tmp_path.iterdir())


def test_no_account_and_no_package_are_one_line_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = write(tmp_path / "opsd", 0, "online")
    assert "UserError: log.wandb=trd: No API key configured" in done.stderr.splitlines()[-1]
    config = from_dict({"log": {"wandb": "trd"}}, "test")
    check_wandb(config)
    monkeypatch.setattr(importlib.machinery.PathFinder, "find_spec", lambda _: None)
    check_wandb(from_dict({}, "test"))
    with pytest.raises(UserError, match=r"log.wandb=trd needs a package: pip install wandb"):
        check_wandb(config)
