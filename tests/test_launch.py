"""A rank and the process that started it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

RANK = "from megatron_trd.launch import run_rank; run_rank(lambda: print('at work'))"


@pytest.mark.parametrize("launcher", [None, os.getpid(), 1])
def test_a_rank_whose_launcher_was_killed_while_it_imported_does_not_begin(launcher: int | None) -> None:
    environment = os.environ | ({} if launcher is None else {"TRD_LAUNCHER": str(launcher)})
    ended = subprocess.run([sys.executable, "-c", RANK], env=environment, capture_output=True, text=True)
    gone = launcher == 1
    assert (ended.returncode, ended.stdout) == ((1, "") if gone else (0, "at work\n")), ended.stderr
