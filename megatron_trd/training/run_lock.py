"""One run in a run folder at a time: `<run_dir>/lock` names the process that works there, and its SLURM job if any.

A run that ends normally removes its lock. A killed run leaves it behind, and the next run takes it over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from megatron_trd.errors import UserError
from megatron_trd.files import replace_text

_ACTIVE = "running,suspended,completing,configuring,stopped"  # states of a SLURM job that may have processes
_SQUEUE_SECONDS = 60


@dataclass(frozen=True)
class Owner:
    """The holder of a lock."""

    host: str
    pid: int
    started: int  # of the process, clock ticks after the host's boot: process ids are reused
    job: str | None  # id of the SLURM job it runs in
    cluster: str | None  # name of that job's SLURM cluster
    # Locks of an earlier version have neither of these.
    restarts: int | None = None  # how often SLURM had restarted that job
    user: int | None = None  # user id

    @classmethod
    def me(cls) -> Self:
        """This process."""
        started = _started(os.getpid())
        assert started is not None
        job, cluster = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_CLUSTER_NAME")
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))  # SLURM sets it from the first restart on
        return cls(socket.gethostname(), os.getpid(), started, job, cluster, restarts, os.getuid())

    def is_live(self, me: Owner) -> bool | None:
        """Whether the owner is still running, as seen from process `me`; None if that cannot be known from here."""
        same_host = self.host == me.host
        if same_host and _started(self.pid) == self.started:
            return True
        own_job = self.job is not None and (self.job, self.cluster) == (me.job, me.cluster)
        if own_job and self.restarts != me.restarts:
            return False
        if self.job is not None and not own_job:
            return self._job_is_active(me)
        return False if same_host else None

    def _job_is_active(self, me: Owner) -> bool | None:
        foreign = None not in (self.cluster, me.cluster) and self.cluster != me.cluster
        if foreign:
            return None
        if shutil.which("squeue") is None:
            return self._job_is_listed(me)
        command = ["squeue", "--noheader", f"--job={self.job}", f"--states={_ACTIVE}", "--format=%i"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=_SQUEUE_SECONDS)
        except subprocess.TimeoutExpired:
            return None
        if answer.returncode == 0:
            return bool(answer.stdout.strip())
        return False if "invalid job id" in answer.stderr.lower() else None

    def _job_is_listed(self, me: Owner) -> bool | None:
        """The same, from the user's unfinished jobs that slurm/common.sh listed when job `me` began."""
        listed = os.environ.get("TRD_ACTIVE_JOBS")
        if listed is None or self.user != me.user:
            return None
        if self.job in listed.split():
            return True
        # Job ids increase: a job with a higher id may have started since.
        return False if int(self.job or 0) < int(me.job or 0) else None

    def __str__(self) -> str:
        process = f"process {self.pid} on {self.host}"
        return process if self.job is None else f"SLURM job {self.job} ({process})"


def check_lock(folder: Path) -> None:
    """Raise `UserError` if a run works in `folder`, or if one may and that cannot be known from here."""
    owner = _read(folder / "lock")
    if owner is not None:
        _refuse_unless_gone(folder, owner, Owner.me())


def take_lock(folder: Path) -> None:
    """Make this process the owner of `folder`. Raises `UserError` as `check_lock` does."""
    path, me = folder / "lock", Owner.me()
    while not _create(path, me):
        owner = _read(path)
        if owner is None:  # released between the two calls
            continue
        _refuse_unless_gone(folder, owner, me)
        with _alone(folder):
            if _read(path) == owner:  # no other process took it over meanwhile
                replace_text(path, _text(me))
                return


def release_lock(folder: Path) -> None:
    """Release `folder`; removes only the lock of this process."""
    path = folder / "lock"
    if _read(path) == Owner.me():
        path.unlink()


def _refuse_unless_gone(folder: Path, owner: Owner, me: Owner) -> None:
    live = owner.is_live(me)
    if live:
        raise UserError(f"run folder '{folder}' is in use by {owner}: wait for it, cancel it, or set another run_dir=")
    if live is None:
        raise UserError(
            f"run folder '{folder}' may be in use by {owner}, which cannot be asked from here: "
            f"if it has ended, remove '{folder / 'lock'}', or set another run_dir="
        )


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Admit one of the processes that take over a lock at the same time; the others get a `UserError`."""
    path = folder / "lock.takeover"
    if not _create(path, Owner.me()):
        raise UserError(
            f"run folder '{folder}' is being taken over by another run: try again, or set another run_dir=; "
            f"if there is no other, remove '{path}'"
        )
    try:
        yield
    finally:
        path.unlink()


def _create(path: Path, owner: Owner) -> bool:
    """Create a lock atomically, with its content; returns False if it exists already."""
    fresh = path.with_name(f"{path.name}.{owner.host}-{owner.pid}")
    fresh.write_text(_text(owner))
    try:
        os.link(fresh, path)
    except FileExistsError:
        return False
    finally:
        fresh.unlink()
    return True


def _text(owner: Owner) -> str:
    return json.dumps(dataclasses.asdict(owner)) + "\n"


def _read(path: Path) -> Owner | None:
    """The owner named in a lock; None if there is no lock. Raises `UserError` if it cannot be parsed."""
    try:
        return Owner(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise UserError(
            f"'{path}' is not the lock of a run: if no run works in its folder, remove it; or set another run_dir="
        ) from None


def _started(pid: int) -> int | None:
    """When a process of this host began, in clock ticks after boot; None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # state is the third field and this the twenty-second; the second, the name, may contain any character
    state, *fields = stat.rpartition(")")[2].split()
    return None if state == "Z" else int(fields[18])
