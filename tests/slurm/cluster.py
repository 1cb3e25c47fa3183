"""A real SLURM of a few nodes on this machine, and jobs on it."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
SCRIPTS = PROJECT / "slurm"
SECONDS = 900  # a job may take on a busy machine; a hang is far longer
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


class Cluster:
    """SLURM's commands, run in `folder`, where the jobs' output goes too."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self.environment, self.folder = environment, folder

    def run(self, *command: object, **variables: str) -> subprocess.CompletedProcess[str]:
        """Any program that may talk to the cluster."""
        return subprocess.run(
            list(map(str, command)),
            env=self.environment | variables,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )

    def submit(self, *arguments: object, **variables: str) -> str:
        """`sbatch ARGUMENTS`; returns the number of the job."""
        done = self.run("sbatch", "--parsable", *arguments, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def field(self, job: str, name: str) -> str:
        """What SLURM says of a job, e.g. its JobState."""
        line = self.run("scontrol", "show", "job", "--oneliner", job).stdout
        found = re.search(rf"(?:^| ){name}=(\S*)", line)
        assert found, f"{name} in {line}"
        return found[1]

    def output(self, job: str) -> str:
        """What a job has printed so far."""
        [*paths] = self.folder.glob(f"slurm-*-{job}.out")
        return paths[0].read_text() if paths else ""

    def wait_for(self, job: str, text: str, times: int = 1) -> None:
        """Wait until a job has printed `text` so often."""
        deadline = time.monotonic() + SECONDS
        while self.output(job).count(text) < times:
            assert time.monotonic() < deadline, self.output(job)
            assert self.field(job, "JobState") not in _ENDED, self.output(job)
            time.sleep(0.1)

    def start_again(self, job: str) -> None:
        """Start a job now that was requeued: SLURM would let it wait for minutes."""
        deadline = time.monotonic() + SECONDS
        while not self._release(job):
            assert time.monotonic() < deadline, self.output(job)
            time.sleep(0.2)

    def _release(self, job: str) -> bool:
        """Whether a job waited for its time after a requeue; if so, it starts now."""
        if (self.field(job, "JobState"), self.field(job, "Reason")) != ("PENDING", "BeginTime"):
            return False
        time.sleep(2)  # a node takes no job that it was told to end within the last second
        return self.run("scontrol", "update", f"jobid={job}", "StartTime=now").returncode == 0

    def finish(self, job: str) -> tuple[str, str]:
        """Wait for a job's end, however often it is requeued; its exit code and what it printed."""
        deadline = time.monotonic() + SECONDS
        while self.field(job, "JobState") not in _ENDED:
            assert time.monotonic() < deadline, self.output(job)
            self._release(job)
            time.sleep(0.2)
        return self.field(job, "ExitCode").partition(":")[0], self.output(job)


def plain_environment() -> dict[str, str]:
    """This process's environment variables without those of a site or a job."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("TRD_", "SLURM_", "SBATCH_"))}


@contextlib.contextmanager
def dev_cluster(nodes: int) -> Iterator[dict[str, str]]:
    """Environment variables with which SLURM's commands talk to a cluster made for the purpose."""
    script = str(SCRIPTS / "dev_cluster.sh")
    settings = {"TRD_CLUSTER_DIR": f"/tmp/trd-test-{os.getpid()}", "TRD_CLUSTER_NODES": str(nodes)}
    environment = plain_environment() | settings
    started = subprocess.run([script, "up"], env=environment, capture_output=True, text=True)
    if started.returncode == 3:
        pytest.skip(started.stderr.strip())
    try:
        assert started.returncode == 0, started.stderr
        exports = [word.partition("=") for word in shlex.split(started.stdout) if "=" in word]
        yield environment | {name: value for name, _, value in exports}
    finally:
        subprocess.run([script, "down"], env=environment, check=True)


def ranks(cluster: Cluster, job: str) -> list[int]:
    """Process ids of a job's ranks, in the order of their ranks."""
    ours = {"SLURM_JOB_ID": job, "SLURM_CONF": cluster.environment["SLURM_CONF"]}
    found: dict[int, tuple[int, int]] = {}  # rank and parent, by process
    for path in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if path.name.isdecimal() and b"training.worker\0" in (path / "cmdline").read_bytes():
                variables = dict(
                    entry.split("=", 1)
                    for entry in (path / "environ").read_bytes().decode().split("\0")
                    if "=" in entry
                )
                if ours.items() <= variables.items() and "RANK" in variables:
                    parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                    found[int(path.name)] = int(variables["RANK"]), parent
    # What a rank forks, to write a checkpoint, looks like the rank.
    return [pid for pid, (_, parent) in sorted(found.items(), key=lambda item: item[1]) if parent not in found]
