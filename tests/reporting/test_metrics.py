"""Metrics and samples on disk: what a killed, resumed or diverging run leaves."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_trd.errors import UserError
from megatron_trd.reporting.metrics import MetricsWriter, SampleWriter, read_metrics, sample_files


def write(folder: Path, steps: range, *, resume_from: int, loss: float, tensorboard: bool = False) -> None:
    writer = MetricsWriter(folder, tensorboard=tensorboard, resume_from=resume_from)
    for step in steps:
        writer.write(step, {"loss": loss + step})
    writer.close()


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False, resume_from=0)
    writer.write(0, {"loss": 0.1, "tokens/trained": 7})
    assert read_metrics(tmp_path) == [{"step": 0, "loss": 0.1, "tokens/trained": 7}]


def test_resume_drops_the_steps_that_run_again(tmp_path: Path) -> None:
    write(tmp_path, range(5), resume_from=0, loss=0.1)
    write(tmp_path, range(3, 6), resume_from=3, loss=100.0)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row["loss"] for row in rows] == [0.1 + 0, 0.1 + 1, 0.1 + 2, 103.0, 104.0, 105.0]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"], "a temporary file was left"


def test_a_new_run_starts_from_an_empty_file(tmp_path: Path) -> None:
    write(tmp_path, range(5), resume_from=0, loss=0.0)
    write(tmp_path, range(1), resume_from=0, loss=9.0)
    assert read_metrics(tmp_path) == [{"step": 0, "loss": 9.0}]


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', '{"step"', "{", "3", '{"step": 2, "loss": 1e', "\0\0\0\0"])
def test_a_torn_last_line_is_left_out_and_removed_on_resume(tmp_path: Path, torn: str) -> None:
    write(tmp_path, range(2), resume_from=0, loss=0.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1]
    write(tmp_path, range(2, 4), resume_from=2, loss=0.0)
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}')
    write(tmp_path, range(1, 2), resume_from=1, loss=0.0)
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1]


def test_a_bad_line_inside_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\nnonsense\n{"step": 1}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2"):
        read_metrics(tmp_path)


def test_numbers_that_json_lacks_stay_valid_json_and_come_back(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False, resume_from=0)
    writer.write(0, {"loss": math.nan, "grad_norm": math.inf, "low": -math.inf, "lr": 5e-6})
    writer.close()

    def refuse(literal: str) -> None:
        raise AssertionError(f"{literal} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse)["lr"] == 5e-6
    MetricsWriter(tmp_path, tensorboard=False, resume_from=1).close()
    assert (tmp_path / "metrics.jsonl").read_text() == text, "a resumed run changed an earlier line"
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["loss"])
    assert (row["grad_norm"], row["low"]) == (math.inf, -math.inf)


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    write(tmp_path, range(4), resume_from=0, loss=0.0, tensorboard=True)
    write(tmp_path, range(2, 5), resume_from=2, loss=100.0, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(0, 0), (1, 1), (2, 102), (3, 103), (4, 104)]


def test_samples_of_a_step_replace_those_of_an_earlier_try(tmp_path: Path) -> None:
    writer = SampleWriter(tmp_path, resume_from=0)
    writer.write(12, [{"problem": "1 + 1", "rollout": "a\nb"}, {"problem": "2 + 2", "rollout": "ü"}])
    writer.write(12, [{"problem": "3 + 3", "rollout_right": None}])
    (path,) = (tmp_path / "samples").iterdir()
    assert path.name == "step_00012.jsonl"
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"problem": "3 + 3", "rollout_right": None}]


def test_samples_of_steps_that_are_repeated_are_removed_with_their_metrics(tmp_path: Path) -> None:
    """Or a report would show pairs of a model that was given up."""
    writer = SampleWriter(tmp_path, resume_from=0)
    for step in (9, 10, 11, 100_000):
        writer.write(step, [{"problem": "1 + 1"}])
    SampleWriter(tmp_path, resume_from=10)
    assert sample_files(tmp_path) == [(9, tmp_path / "samples" / "step_00009.jsonl")]


def test_a_folder_without_metrics_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no metrics\.jsonl") as caught:
        read_metrics(tmp_path / "absent")
    assert str(tmp_path / "absent") in str(caught.value)
    assert "\n" not in str(caught.value)
