"""A run folder says what each start was made with, and a run does not go on with something else."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import megatron_trd
from megatron_trd.config import TrainConfig, from_dict, load, to_dict
from megatron_trd.data.problems import Problem
from megatron_trd.training import provenance
from megatron_trd.training.provenance import STARTS_FILE, check_inputs, digests, record_start, same_inputs
from megatron_trd.training.run_folder import check_run_folder, claim
from megatron_trd.training.run_lock import release_lock
from tests.data.errors import user_error

WEIGHTS = bytes(5 * 2**20)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    run = tmp_path / "run"
    (run / "checkpoints" / "step_2").mkdir(parents=True)
    (run / "checkpoints" / "step_2" / "metadata.json").write_text("{}")
    for name in ("student", "teacher"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(WEIGHTS)
        (tmp_path / name / "config.json").write_text("{}")
    values: dict[str, Any] = {"model": str(tmp_path / "student"), "run_dir": str(run), "data": {"path": "data.jsonl"}}
    values |= {"teacher": {"model": str(tmp_path / "teacher")}, "held_out": {"path": "test.jsonl"}}
    return from_dict(values, "test")


def inputs(config: TrainConfig, **changed: Any) -> Any:
    problems = [Problem(index, f"{index} + 1 = ?", str(index + 1), "so") for index in range(3)]
    values: dict[str, Any] = {"problems": problems, "held_out": problems[:1]} | changed
    models = {"student": Path(config.model), "teacher": Path(config.teacher.model or "")}
    found: Any = SimpleNamespace(**{name: SimpleNamespace(path=path) for name, path in models.items()}, **values)
    found.digests = digests(config, found)
    return found


def rows(config: TrainConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(config.run_dir, STARTS_FILE).read_text().splitlines()]


def test_every_start_is_a_line(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    record_start(dataclasses.replace(config, world_size=4), inputs(config))
    record_start(dataclasses.replace(config, world_size=2), inputs(config))
    first, second = rows(config)
    assert (first["slurm_job"], first["steps_done"]) == ("17", 2)
    assert first["config"] == to_dict(config) | {"world_size": 4}
    assert second["config"]["world_size"] == 2
    assert {"torch", "megatron-core", "transformers"} <= first["packages"].keys()
    assert first["inputs"].keys() == {"model", "teacher.model", "data.path", "held_out.path"}
    root = Path(megatron_trd.__file__).parents[1]
    commit = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    assert first["code"].removesuffix("+") == f"{megatron_trd.__version__} {commit}".strip()


def test_without_git_the_version_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert provenance._code() == megatron_trd.__version__


def test_another_project_s_checkout_is_not_taken_for_this_one_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(tmp_path), *identity, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    monkeypatch.setattr(megatron_trd, "__file__", str(tmp_path / "venv" / "megatron_trd" / "__init__.py"))
    assert provenance._code() == megatron_trd.__version__


def test_what_has_not_changed_may_go_on(config: TrainConfig) -> None:
    record_start(dataclasses.replace(config, world_size=4), inputs(config))
    check_inputs(config, inputs(config))
    corrected = [Problem(index, f"{index} + 1 = ?", "another answer", "so") for index in range(3)]
    check_inputs(config, inputs(config, problems=corrected))
    Path(config.model, "model.safetensors").touch()  # copied again
    Path(config.model, ".cache").mkdir()  # as `hf download` leaves it
    check_inputs(config, inputs(config))
    config.held_out.path = None
    check_inputs(config, inputs(config, held_out=[]))


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("model", lambda config: _changed(config.model, 0)),
        ("model", lambda config: _changed(config.model, len(WEIGHTS) - 1)),
        ("model", lambda config: Path(config.model, "config.json").write_text('{"rope_theta": 1}')),
        ("model", lambda config: Path(config.model, "more.safetensors").touch()),
        ("teacher.model", lambda config: _changed(config.teacher.model, 7)),
        ("data.path", lambda config: {"problems": inputs(config).problems[1:]}),
        (
            "data.path",
            lambda config: {"problems": [Problem(0, "0 + 1 = ?", "1", "thus"), *inputs(config).problems[1:]]},
        ),
        ("held_out.path", lambda config: {"held_out": inputs(config).problems}),
    ],
)
def test_a_run_does_not_go_on_with_something_else(config: TrainConfig, key: str, change: Any) -> None:
    record_start(dataclasses.replace(config, world_size=4), inputs(config))
    changed = change(config)
    now = inputs(config, **(changed if isinstance(changed, dict) else {}))
    says = user_error(check_inputs, config, now)
    assert says.startswith(f"what is in {key} '")
    assert f"remove '{config.run_dir}/{STARTS_FILE}'" in says
    (Path(config.run_dir) / "checkpoints/step_2/metadata.json").unlink()  # it begins anew then
    check_inputs(config, now)


def test_models_and_problems_may_be_moved(config: TrainConfig) -> None:
    claim(config, resume=False)
    release_lock(Path(config.run_dir))
    record_start(dataclasses.replace(config, world_size=4), inputs(config))
    moved = Path(config.model).rename(Path(config.model).with_name("moved"))
    now = dataclasses.replace(config, model=str(moved), data=dataclasses.replace(config.data, path="moved.jsonl"))
    assert same_inputs(now, inputs(now)) == {"model", "teacher.model", "data.path", "held_out.path"}
    assert "was begun with model=" in user_error(check_run_folder, now, True)
    check_run_folder(now, True, same_inputs(now, inputs(now)))
    claim(now, resume=True, same=same_inputs(now, inputs(now)))
    release_lock(Path(config.run_dir))
    assert load(Path(config.run_dir, "config.yaml")).model == str(moved)
    _changed(now.model, 0)
    assert same_inputs(now, inputs(now)) == {"teacher.model", "data.path", "held_out.path"}


def _changed(folder: str, place: int) -> None:
    content = bytearray(WEIGHTS)
    content[place] = 1
    Path(folder, "model.safetensors").write_bytes(content)


def test_a_line_that_was_cut_short_is_passed_over(config: TrainConfig) -> None:
    path = Path(config.run_dir, STARTS_FILE)
    check_inputs(config, inputs(config))  # a run of an earlier version has no list
    record_start(dataclasses.replace(config, world_size=4), inputs(config))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:100])
    _changed(config.model, 0)
    assert "what is in model" in user_error(check_inputs, config, inputs(config))
    record_start(dataclasses.replace(config, world_size=4), inputs(config))
    first, cut, last = path.read_bytes().splitlines(keepends=True)
    assert (first, cut) == (whole, whole[:100] + b"\n")
    assert json.loads(last)["inputs"]["model"] != json.loads(first)["inputs"]["model"]
    check_inputs(config, inputs(config))
