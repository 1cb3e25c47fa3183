"""Answers are compared as mathematics, and no answer can hang or crash whoever grades it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from megatron_trd.errors import JobFailed
from megatron_trd.evaluation import grading
from megatron_trd.evaluation.grading import is_correct, last_boxed


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("so it is \\boxed{42}.", "42"),
        ("\\boxed{042}", "42"),
        ("\\boxed{0.5}", "1/2"),
        ("\\boxed{\\frac{1}{2}}", "0.5"),
        ("\\boxed{1,000}", "1000"),
        ("\\boxed{\\$18}", "18"),
        ("\\boxed{(1, 2)}", "(1,2)"),
        ("\\boxed{x^2 + 2x + 1}", "(x+1)^2"),
        ("first \\boxed{3}, no: \\boxed{4}", "4"),
        ("\\boxed{4} and then \\boxed{", "4"),
        ("\\boxed{5}", "thus \\boxed{5}"),
        ("so it is \\boxed{7.}", "7"),
        ("\\boxed{7}", "7."),
        ("\\boxed{\\frac{1}{2}.}", "0.5"),
        ("\\boxed{1\\,000}", "1000"),
        ("\\boxed{x = 12\\ 345\\,678.5}", "12345678.5"),
        ("\\boxed{(1~000, 2\\;000).}", "(1000,2000)"),
        ("\\boxed{1 000}", "1{,}000"),
        ("\\boxed{\\frac12\\,100}", "50"),
        ("\\boxed{1,\\,100}", "1, 100"),
        ("\\boxed{\\{1,\\,2\\}}", "\\{2,1\\}"),
        (
            "\\boxed{\\left\\{ \\begin{array}{l} x \\\\ y \\end{array} \\right.}",
            "\\left\\{ \\begin{array}{l} x \\\\ y \\end{array} \\right.",
        ),
    ],
)
def test_right(response: str, answer: str) -> None:
    assert is_correct(response, answer)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("the answer is 42", "42"),  # not in a box
        ("\\boxed{42", "42"),  # cut short
        ("\\boxed{41}", "42"),
        ("\\boxed{4}, no: \\boxed{3}", "4"),
        ("\\boxed{}", "0"),
        ("\\boxed{}", ""),
        ("\\boxed{ }", " "),
        ("\\boxed{}", "\\boxed{}"),
        ("\\boxed{1}", ""),
        ("\\boxed{1\\,000}", "1"),
        ("\\boxed{1.\\,000}", "1000"),
        ("\\boxed{\\frac{}{}}", "1"),
        ("\\boxed{import os}", "1"),
        ("\\boxed{" + "(" * 900 + "}", "1"),
        ("\\boxed{" + "1" * 5000 + "}", "1"),
        ("", "1"),
    ],
)
def test_wrong(response: str, answer: str) -> None:
    assert not is_correct(response, answer)


def test_nested_braces() -> None:
    assert last_boxed("a \\boxed{\\frac{1}{\\sqrt{2}}} b") == "\\frac{1}{\\sqrt{2}}"
    assert last_boxed("none") is None
    assert last_boxed("\\boxed{\\left\\{1\\right.}, or {2}") == "\\left\\{1\\right."
    assert last_boxed("\\boxed{1 \\\\{2} \\\\}") == "1 \\\\{2} \\\\"  # breaks of lines before braces
    assert last_boxed("\\\\boxed{7}") == "7"  # as in JSON


def test_an_answer_that_never_evaluates_is_wrong_in_time_and_grading_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading, "_SECONDS", 1.0)
    begin = time.monotonic()
    assert not is_correct("\\boxed{9^{9^{9^9}}}", "3")
    assert not is_correct("\\boxed{10^{10^{10}}}", "3")
    assert is_correct("\\boxed{\\frac{2}{8}}", "0.25")
    assert time.monotonic() - begin < 60  # three starts of the judge on a busy machine, and two time-outs


def test_an_answer_of_any_length_has_a_verdict() -> None:
    digits = "7" * 5000  # more than Python turns into a number
    assert not is_correct("\\boxed{7}", digits)
    assert not is_correct(f"\\boxed{{{digits}}}", "7")
    assert is_correct(f"\\boxed{{{digits}}}", digits)


def test_a_judge_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('sympy is broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(JobFailed, match=r"cannot be compared.*sympy is broken"):
        grading._Judge().equal("1/2", "0.5")


def test_a_comparison_that_was_too_slow_once_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_correct("\\boxed{\\frac{3}{24}}", "0.125")
    process = grading._judge()._process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)  # it must not be quick by chance
    with monkeypatch.context() as busy:
        busy.setattr(grading, "_SECONDS", 0.0)
        assert not is_correct("\\boxed{\\frac{3}{12}}", "0.25")
    assert is_correct("\\boxed{\\frac{3}{12}}", "0.25")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("\\boxed{1} and \\boxed{2", "1"),
        ("\\boxed{1 \\boxed{2}", "2"),
        ("\\boxed{1 \\boxed{2}}", "2"),
        ("} \\boxed{{1}} }", "{1}"),
        ("\\boxed{}", ""),
        ("\\boxed{" * 200_000, None),  # a model that repeats itself
        ("\\boxed{" * 100_000 + "}" * 100_000, ""),
    ],
    ids=range(7),
)
def test_the_last_box_that_closes(text: str, found: str | None) -> None:
    assert last_boxed(text) == found
