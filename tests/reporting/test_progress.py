"""What a person sees of a run while it goes on."""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any

import pytest

from megatron_trd.reporting.progress import Progress

METRICS = {
    "loss": 0.12341,
    "grad_norm": 1.2,
    "lr": 4.8e-6,
    "right/rollout": 0.31,
    "right/refinement": 0.94,
    "length/rollout": 61.2,
    "length/refinement": 58.0,
    "drift/mean": 2.1e-6,
    "time/train": 0.8,
    "time/sample": 0.8,
    "time/refit": 0.01,
    "time/teacher": 0.2,
    "time/step": 1.9,
    "throughput/sample": 1234.5,
    "throughput/train": 812.0,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def plain(capsys: pytest.CaptureFixture[str], step: int, metrics: dict[str, Any]) -> str:
    with Progress(40, title="trd-opsd") as progress:
        progress.update(step, metrics)
    return capsys.readouterr().out


def test_a_plain_line_has_everything_in_the_order_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert plain(capsys, 2, METRICS) == (
        "step 3/40  loss 0.1234  grad 1.20  right 0.31 -> 0.94  len 61 -> 58  drift 2e-6  "
        "1.9 s (sample 0.8, teacher 0.2, train 0.8)\n"
    )


def test_grading_that_takes_long_is_part_of_the_time_shown(capsys: pytest.CaptureFixture[str]) -> None:
    graded = plain(capsys, 2, METRICS | {"time/grade": 3.0})
    assert graded.endswith("  4.9 s (sample 0.8, teacher 0.2, train 0.8, grade 3.0)\n")


def test_responses_cut_off_are_shown_where_there_are_some(capsys: pytest.CaptureFixture[str]) -> None:
    counts = {"overflow/rollout": 32, "overflow/refinement": 0}
    assert "  len 61 -> 58  cut off 32 -> 0  drift" in plain(capsys, 0, METRICS | counts)
    assert "cut off" not in plain(capsys, 0, METRICS | dict.fromkeys(counts, 0))


def test_a_method_without_refinement_has_no_arrow(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {key: value for key, value in METRICS.items() if not key.endswith("refinement")}
    line = plain(capsys, 0, metrics)
    assert "right 0.31  len 61  drift" in line
    assert "->" not in line


def test_a_step_without_training_leaves_out_what_it_has_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert plain(capsys, 39, {"length/rollout": 5.0, "time/step": 0.31}) == "step 40/40  len 5  0.3 s\n"
    idle = {"length/rollout": 5.0, "time/step": 0.31, "samples/trained": 0}
    assert plain(capsys, 39, idle) == "step 40/40  loss none, nothing to train on  len 5  0.3 s\n"


def test_a_loss_that_is_not_a_number_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    line = plain(capsys, 0, {"loss": float("nan"), "grad_norm": float("inf"), "drift/mean": float("nan")})
    assert line == "step 1/40  loss nan  grad inf  drift nan\n"


def test_a_note_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1, title="x") as progress:
        progress.note("saved [runs]/a")
    assert capsys.readouterr().out == "saved [runs]/a\n"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")


def test_a_terminal_shows_the_bar_the_table_and_notes() -> None:
    with contextlib.redirect_stdout(Terminal()) as terminal, Progress(40, title="trd-opsd", start=10) as progress:
        progress.update(10, METRICS)
        progress.note("saved [runs]/a")
    raw = terminal.getvalue()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw)
    for expected in (
        "trd-opsd",
        "11/40",
        "right 0.31 → 0.94",
        "len 61 → 58",
        "lr 4.8e-6",
        "time 1.9 s  sample 0.8, teacher 0.2, train 0.8",
        "tokens/s sample 1,234, train 812",
        "saved [runs]/a",
    ):
        assert expected in text
    assert "\x1b[1A" in raw, "not a live display"


def test_the_cursor_is_visible_while_a_run_goes_on() -> None:
    with contextlib.redirect_stdout(Terminal()) as terminal, Progress(40, title="trd-opsd"):
        raw = terminal.getvalue()
    assert raw.rfind("\x1b[?25h") > raw.rfind("\x1b[?25l") >= 0, "a killed run would leave no cursor"


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with contextlib.redirect_stdout(Terminal()) as terminal, Progress(40, title="trd-opsd") as progress:
        progress.update(0, {"loss": 1.0})
    assert terminal.getvalue() == "step 1/40  loss 1.0000\n"
