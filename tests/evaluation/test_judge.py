"""The process that compares answers does not outlive whoever asks it, and a library in it can do no harm."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_SECONDS = 60.0  # for a process to be gone, on a busy machine
# Says which process its judge is and waits for an answer that never comes.
_ASKER = """
from megatron_trd.evaluation import grading
grading._SECONDS = 1e6
assert grading.is_correct("\\\\boxed{0.5}", "1/2")
print(grading._judge()._process.pid, flush=True)
grading.is_correct("\\\\boxed{10^{10^{10}}}", "3")
"""
# A judge whose library prints, and takes as many GiB for a comparison as the answer that was found says.
_WITHOUT_MATH_VERIFY = """
import mmap, sys
from types import SimpleNamespace
from megatron_trd.evaluation import judge

def verify(wanted, found, **_):
    print("false")
    return not found or bool(mmap.mmap(-1, found * 2**30))

parse = lambda text, **_: int(text.strip("\\\\boxed{}"))
sys.modules["math_verify"] = SimpleNamespace(parse=parse, verify=verify)
judge.main()
"""


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_judge_dies_with_an_asker_that_is_killed() -> None:
    asker = subprocess.Popen([sys.executable, "-c", _ASKER], stdout=subprocess.PIPE, text=True)
    assert asker.stdout is not None
    judge = int(asker.stdout.readline())
    try:
        os.kill(judge, signal.SIGSTOP)  # it cannot see its pipe close, as in a long computation
        asker.kill()
        asker.communicate()
        deadline = time.monotonic() + _SECONDS
        while not is_gone(judge):
            assert time.monotonic() < deadline, "the judge is still there"
            time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(judge, signal.SIGKILL)


def test_a_judge_whose_asker_has_gone_already_ends() -> None:
    command = [sys.executable, "-m", "megatron_trd.evaluation.judge"]
    for asker, answer in ((os.getpid(), b"true\n"), (os.getpid() + 1, b"")):
        done = subprocess.run([*command, str(asker)], input=b'["1", "1.0"]\n', stdout=subprocess.PIPE, check=True)
        assert done.stdout == answer


def test_what_a_library_prints_is_no_answer_and_memory_without_end_is_a_wrong_one() -> None:
    asker = [sys.executable, "-c", _WITHOUT_MATH_VERIFY, str(os.getpid())]
    done = subprocess.run(asker, input=b'["1", "0"]\n["1", "5"]\n', stdout=subprocess.PIPE, check=True)
    assert done.stdout == b"true\nfalse\n"
