"""What becomes of a job whose ranks have ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_trd.config import TrainConfig
from megatron_trd.training.slurm_job import end


def test_a_reason_is_said_though_the_run_folder_takes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    (tmp_path / "restarts.json").mkdir()  # a full disk refuses as much, with other words
    verdict = end(TrainConfig(run_dir=str(tmp_path)), tmp_path / "logs", status=137, allowed=3)
    assert verdict == "1"
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("srun ended with exit code 137; step 0 of ")
    assert line.endswith(f"not started again: run folder '{tmp_path}' cannot be written: Is a directory")
    assert [path.name for path in tmp_path.iterdir()] == ["restarts.json"], "nothing half-written is left"
