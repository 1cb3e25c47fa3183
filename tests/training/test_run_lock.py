"""One run in a run folder at a time, whatever became of the one before."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_trd.errors import UserError
from megatron_trd.training import run_lock
from megatron_trd.training.run_lock import Owner, check_lock, release_lock, take_lock

# Takes the lock when a line comes, says whether it got it, and holds it until its input ends.
_TAKER = """
import sys
from pathlib import Path
from megatron_trd.errors import UserError
from megatron_trd.training.run_lock import take_lock
print("ready", flush=True)
sys.stdin.readline()
try:
    take_lock(Path(sys.argv[1]))
    print("taken", flush=True)
except UserError as error:
    print(error, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _outside_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_CLUSTER_NAME", "SLURM_RESTART_COUNT", "TRD_ACTIVE_JOBS"):
        monkeypatch.delenv(name, raising=False)


def taker(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _TAKER, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert said(process) == "ready"
    return process


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def write_lock(folder: Path, **changes: object) -> Owner:
    owner = dataclasses.replace(Owner.me(), **changes)
    (folder / "lock").write_text(json.dumps(dataclasses.asdict(owner)))
    return owner


def test_a_live_owner_keeps_others_out_and_a_killed_one_does_not(tmp_path: Path) -> None:
    first = taker(tmp_path)
    go(first)
    assert said(first) == "taken"
    before = (tmp_path / "lock").read_bytes()
    for attempt in (check_lock, take_lock):
        with pytest.raises(UserError, match=rf"in use by process {first.pid} on .*: wait for it, cancel it"):
            attempt(tmp_path)
    release_lock(tmp_path)  # somebody else's: left alone
    assert (tmp_path / "lock").read_bytes() == before
    end(first)
    check_lock(tmp_path)
    take_lock(tmp_path)
    assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    release_lock(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_of_all_that_come_for_a_lock_at_once_one_gets_it(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for left_behind in (False, True):
        if left_behind:
            write_lock(tmp_path, pid=gone.pid, started=1)
        takers = [taker(tmp_path) for _ in range(6)]
        for process in takers:
            os.kill(process.pid, signal.SIGSTOP)
            go(process)
        for process in takers:
            os.kill(process.pid, signal.SIGCONT)
        answers = [said(process) for process in takers]
        winners = [process.pid for process, answer in zip(takers, answers, strict=True) if answer == "taken"]
        assert len(winners) == 1, answers
        assert json.loads((tmp_path / "lock").read_text())["pid"] == winners[0]
        assert all("in use by" in answer or "taken over" in answer for answer in answers if answer != "taken")
        for process in takers:
            end(process)
        (tmp_path / "lock").unlink()


def test_a_number_that_another_process_has_now_is_no_owner(tmp_path: Path) -> None:
    write_lock(tmp_path, started=1)
    check_lock(tmp_path)


@pytest.mark.parametrize("job", [None, "12"])
def test_an_owner_elsewhere_that_cannot_be_asked_counts_as_live(
    tmp_path: Path, job: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no squeue
    owner = write_lock(tmp_path, host="elsewhere", job=job, cluster="other" if job else None)
    with pytest.raises(UserError, match=r"cannot be asked from here: if it has ended, remove '.*lock'") as refusal:
        take_lock(tmp_path)
    assert str(owner) in str(refusal.value)
    assert ("SLURM job 12" in str(refusal.value)) == (job is not None)


def test_a_requeued_job_takes_its_own_lock_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_job("12", monkeypatch)
    write_lock(tmp_path, host="n7", pid=1)
    with pytest.raises(UserError, match=r"may be in use by SLURM job 12 \(process 1 on n7\)"):
        take_lock(tmp_path)  # from another of the job's nodes
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    take_lock(tmp_path)
    assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    release_lock(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_of_an_earlier_version_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_job("12", monkeypatch)
    owner = dataclasses.asdict(write_lock(tmp_path, host="n7"))
    del owner["restarts"], owner["user"]
    (tmp_path / "lock").write_text(json.dumps(owner))
    take_lock(tmp_path)


def in_job(number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", number)
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "here")


@pytest.mark.parametrize(
    ("listed", "changes", "refusal"),
    [
        ("9 20", {}, None),
        ("", {}, None),
        ("9 12 20", {}, "is in use by SLURM job 12"),
        (None, {}, "may be in use by SLURM job 12"),
        ("9 20", {"job": "21"}, "may be in use by SLURM job 21"),  # may have begun later than the list
        ("9 20", {"cluster": "there"}, "may be in use"),
        ("9 20", {"user": 4321}, "may be in use"),
        ("9 20", {"user": None}, "may be in use"),  # of an earlier version
    ],
)
def test_without_squeue_the_job_s_list_tells_who_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: str | None, changes: dict[str, object], refusal: str | None
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    in_job("20", monkeypatch)
    if listed is not None:
        monkeypatch.setenv("TRD_ACTIVE_JOBS", listed)
    write_lock(tmp_path, **{"host": "n7", "job": "12"} | changes)
    if refusal is None:
        check_lock(tmp_path)
        return
    with pytest.raises(UserError, match=refusal):
        check_lock(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", '{"host": 1}', "[1]"])
def test_what_is_not_a_lock_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "lock").write_text(text)
    for attempt in (check_lock, take_lock):
        with pytest.raises(UserError, match="is not the lock of a run"):
            attempt(tmp_path)
    assert (tmp_path / "lock").read_text() == text


def test_a_lock_that_another_has_taken_over_meanwhile_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have found its owner gone; the other was the first of them to come in."""
    alone, other = run_lock._alone, Owner.me()

    @contextlib.contextmanager
    def late(folder: Path) -> Iterator[None]:
        with alone(folder):
            nonlocal other
            other = write_lock(folder, pid=os.getppid(), started=run_lock._started(os.getppid()))
            yield

    write_lock(tmp_path, started=1)
    monkeypatch.setattr(run_lock, "_alone", late)
    with pytest.raises(UserError, match=f"in use by process {os.getppid()} "):
        take_lock(tmp_path)
    assert json.loads((tmp_path / "lock").read_text()) == dataclasses.asdict(other)


def test_an_owner_that_has_ended_is_gone_though_nobody_has_asked_how(tmp_path: Path) -> None:
    """As in a container whose first process reaps none."""
    owner = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert owner.stdin is not None
    write_lock(tmp_path, pid=owner.pid, started=run_lock._started(owner.pid))
    with pytest.raises(UserError, match=f"in use by process {owner.pid} "):
        check_lock(tmp_path)
    owner.stdin.close()
    os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)
    check_lock(tmp_path)
    owner.wait()
