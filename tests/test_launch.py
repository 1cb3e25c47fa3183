"""A rank and the process that started it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

RANK = "from megatron_trd.launch import run_rank; run_rank(lambda: print('at work'))"


@pytest.mark.parametrize("launcher", ["torchrun", "ours", "gone"])
def test_a_rank_whose_launcher_was_killed_while_it_imported_does_not_begin(launcher: str) -> None:
    named = {"torchrun": {}, "ours": {"TRD_LAUNCHER": str(os.getpid())}, "gone": {"TRD_LAUNCHER": "1"}}
    environment = os.environ | named[launcher]
    ended = subprocess.run([sys.executable, "-c", RANK], env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == ((1, "") if launcher == "gone" else (0, "at work\n")), ended.stderr
