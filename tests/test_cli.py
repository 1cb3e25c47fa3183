"""The command line: bad input is one line and exit code 2, whatever is bad."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_trd import cli
from tests.training.jobs import write_job


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("job"))


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and standard error of `megatron-trd ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["megatron-trd", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data.path=nowhere.jsonl"], ["nowhere.jsonl", "no such file"]),
        (["student.tp=3"], ["student.tp=3", "heads"]),
        (["world_size=3"], ["world size 3"]),
        (["sampler.max_rollout_tokens=5000"], ["context", "sampler.max_rollout_tokens"]),
        (["optimizer.lrr=1"], ["optimizer.lrr", "did you mean", "optimizer.lr"]),
        (["optimizer.lr=fast"], ["optimizer.lr", "fast"]),
        (["student.ep=2"], ["student.ep=2", "mixture of experts"]),
        (["model=nowhere"], ["nowhere", "no such folder"]),
        (["data.reference_field=proof"], ["proof", "problem, answer, solution"]),
        (["method=trd"], ["method", "trd-opsd"]),
    ],
)
def test_bad_training_input_is_one_line(
    job: Path,
    overrides: list[str],
    says: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, error = run(["train", str(job), *overrides], monkeypatch, capsys)
    assert code == 2
    assert len(error.splitlines()) == 1
    for part in says:
        assert part in error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "opsd_dmo"], ["opsd_dmo", "opsd_demo"]),
        (["train", "nowhere.yaml"], ["nowhere.yaml"]),
        (["train", "elsewhere/opsd_demo.py"], ["elsewhere/opsd_demo.py", "does not exist"]),
        (["report", "nowhere"], ["nowhere"]),
        (["eval", "--model", "nowhere", "--data", "x.jsonl"], ["nowhere"]),
        (["demo", "--method", "sft"], ["sft", "trd-opsd"]),
        (["demo", "--out", "."], ["something else than a demo"]),
        (["demo", "method=trd-opd"], ["method=trd-opd", "demo --help"]),
        (
            ["eval", "--model", "nowhere", "--data", "x.jsonl", "optimizer.lr=3"],
            ["optimizer.lr=3", "sampler.", "data."],
        ),
    ],
)
def test_other_bad_input_is_one_line(
    arguments: list[str], says: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, error = run(arguments, monkeypatch, capsys)
    assert code == 2
    assert len(error.splitlines()) == 1
    for part in says:
        assert part in error


def test_an_evaluation_needs_answers_and_room(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"problem": "x" * 2000, "answer": "1"}) + "\n")
    arguments = ["eval", "--model", str(job.parent / "model"), "--out", str(tmp_path / "out"), "--data", str(data)]
    code, error = run(arguments, monkeypatch, capsys)
    assert code == 2
    assert "context" in error
    code, error = run([*arguments, "data.answer_field=null"], monkeypatch, capsys)
    assert code == 2
    assert "data.answer_field" in error


def test_an_evaluation_does_not_go_into_a_run_s_folder(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"problem": "x", "answer": "1"}) + "\n")
    (tmp_path / "metrics.jsonl").write_text("")
    arguments = ["eval", "--model", str(job.parent / "model"), "--data", str(data), "--out", str(tmp_path)]
    code, error = run(arguments, monkeypatch, capsys)
    assert code == 2
    assert "the folder of a training run" in error
    assert not (tmp_path / "config.yaml").exists()


def test_an_evaluation_of_a_run_is_told_its_newest_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (4, 10):
        checkpoint = tmp_path / "checkpoints" / f"step_{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "metadata.json").write_text("{}")
    code, error = run(["eval", "--model", str(tmp_path), "--data", "x.jsonl"], monkeypatch, capsys)
    assert code == 2
    assert f"--model {checkpoint}" in error


def test_a_check_leaves_no_folder_behind(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kept").mkdir()
    for folder in ("new/run", "kept"):
        assert run(["check", str(job), f"run_dir={tmp_path / folder}"], monkeypatch, capsys)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_real_process_says_it_within_seconds_and_without_a_traceback(job: Path) -> None:
    begin = time.monotonic()
    command = [sys.executable, "-m", "megatron_trd.cli", "train", str(job), "student.tp=3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert time.monotonic() - begin < 30
