"""The folder of an evaluation belongs to one evaluation, and to one job at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_trd.config import load
from megatron_trd.demo import STUDENT
from megatron_trd.errors import JobFailed, UserError
from megatron_trd.evaluation import command

FOLDER = Path("runs/eval/student-test")


@pytest.fixture(autouse=True)
def _two_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with `a` and `b`, each with a model and problems of the same names."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "student").symlink_to(STUDENT)
        (tmp_path / name / "test.jsonl").write_text(json.dumps({"problem": f"1 + {name} = ?", "answer": "2"}) + "\n")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The data of each job that was started; its ranks write that as scores."""
    data: list[str] = []

    def launch(arguments: list[str], _ranks: int, _logs: Path) -> None:
        config = load(Path(arguments[-1]))
        data.append(config.data.path)
        (Path(config.run_dir) / "scores.json").write_text(json.dumps({"data": config.data.path}))

    monkeypatch.setattr(command, "launch", launch)
    return data


def evaluate(
    model: str = "a/student", data: str = "a/test.jsonl", *, out: Path | None = None, samples: int = 2, seed: int = 0
) -> dict[str, Any]:
    return command.run_evaluation(Path(model), data, samples, out, seed, ["sampler.max_rollout_tokens=8"])


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"data": "b/test.jsonl"}, "data.path=a/test.jsonl, not b/test.jsonl"),
        ({"model": "b/student"}, "model=a/student, not b/student"),
        ({"seed": 1}, "seed=0, not 1"),
        ({"samples": 4}, "--samples=2, not 4"),
    ],
)
def test_another_evaluation_does_not_write_over_one(launched: list[str], other: dict[str, Any], says: str) -> None:
    evaluate()
    before = {path.name: path.read_bytes() for path in FOLDER.iterdir()}
    with pytest.raises(UserError) as refusal:
        evaluate(**other)
    assert str(refusal.value) == f"'{FOLDER}' was begun with {says}: give another --out"
    assert {path.name: path.read_bytes() for path in FOLDER.iterdir()} == before
    assert before.keys() == {"config.yaml", "scores.json"}
    evaluate(**other, out=Path("other"))
    assert len(launched) == 2


def test_an_evaluation_that_was_stopped_is_not_in_the_way_of_another(launched: list[str]) -> None:
    evaluate()
    (FOLDER / "scores.json").unlink()
    evaluate(samples=4)
    assert load(FOLDER / "config.yaml").rollouts_per_problem == 4


def test_the_same_evaluation_may_run_again(launched: list[str]) -> None:
    evaluate()
    assert evaluate(out=FOLDER.absolute()) == {"data": "a/test.jsonl"}
    assert len(launched) == 2


def test_of_two_evaluations_at_once_the_second_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*_: object) -> None:
        for data in ("a/test.jsonl", "b/test.jsonl"):
            with pytest.raises(UserError, match=r"'runs/eval/student-test' is in use by .*: wait for it"):
                evaluate(data=data)
        assert load(FOLDER / "config.yaml").data.path == "a/test.jsonl"
        raise JobFailed("rank 0 failed")

    monkeypatch.setattr(command, "launch", launch)
    with pytest.raises(JobFailed, match="rank 0 failed"):
        evaluate()
    assert [path.name for path in FOLDER.iterdir()] == ["config.yaml"]  # given back
