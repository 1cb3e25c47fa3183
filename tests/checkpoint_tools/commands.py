"""The commands as a user runs them: in this process, or in one of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest

from megatron_trd import cli


@dataclass(frozen=True)
class Outcome:
    """What a command left on the terminal."""

    code: int
    out: str
    err: str


Tool = Callable[..., Outcome]


def in_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tool:
    """`tool(*arguments)` is `megatron-trd convert ARGUMENTS`; seconds faster than a process of its own."""

    def tool(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["megatron-trd", "convert", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        return Outcome(int(stopped.value.code or 0), printed.out, printed.err)

    return tool


def process(*arguments: object) -> Outcome:
    """`python ARGUMENTS` in a process of its own."""
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=900)
    return Outcome(done.returncode, done.stdout, done.stderr)


def says(outcome: Outcome, parts: Sequence[str]) -> None:
    """A refusal: exit code 2 and one line on standard error with these parts in it."""
    assert outcome.code == 2, outcome
    assert len(outcome.err.splitlines()) == 1, outcome.err
    for part in parts:
        assert part in outcome.err, outcome.err


def last_line(outcome: Outcome) -> Outcome:
    """A conversion that had begun: its progress bar comes before the reason."""
    return Outcome(outcome.code, outcome.out, outcome.err.splitlines()[-1])
