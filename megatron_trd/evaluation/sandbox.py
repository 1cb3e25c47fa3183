"""Runs programs that a model wrote, within bubblewrap: no network, no files but Python's own, nothing to write to.

Inside, `in_sandbox.py` runs the program once for each input, with limits of memory, time and output and without the
means to start processes. numpy is there, which some data sets' tests import.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron_trd.errors import JobFailed
from megatron_trd.evaluation import in_sandbox

SECONDS = 6.0  # of CPU time, for one input
ALL_SECONDS = 60.0  # of CPU time, for all inputs of a program
PATIENCE = 4.0  # times as long by the clock: on a busy machine a right program may have to wait
_START_SECONDS = 600.0  # of the first, which reads Python from a disk that may be busy
_BASE_PYTHON: str = getattr(sys, "_base_executable", sys.executable)  # a virtual environment's may be a copy of it
_ENVIRONMENT = {
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONHASHSEED": "0",  # the same verdict each time
    "PYTHONUTF8": "1",
    "OPENBLAS_NUM_THREADS": "1",  # each thread's buffers count as memory
}


def run_program(job: Mapping[str, Any], seconds: float = ALL_SECONDS) -> Generator[str, None, None]:
    """Outputs of a job of `in_sandbox`, each as soon as it is there; fewer than it has inputs if the program fails.

    The program ends when it has used `seconds` of CPU time. It is killed after `PATIENCE` times that, and when the
    iterator is closed. Raises `JobFailed` if it could not be run, as when the user may have no more processes.
    """
    with _started() as (process, errors), contextlib.ExitStack() as cleanup:
        timer = threading.Timer(seconds * PATIENCE, process.kill)
        timer.start()
        cleanup.callback(timer.cancel)
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(_as_json(job, SECONDS * PATIENCE, seconds))
        verdict = False
        with contextlib.suppress(ValueError):  # a line cut short by the kill
            for line in process.stdout:
                found = json.loads(line)
                if found is None:
                    return
                yield found[0]
                verdict = True
        # The script inside says how each input ended, whatever the program does; only a kill for time stops it.
        if not verdict and process.wait() != -signal.SIGKILL:
            raise JobFailed(f"programs cannot be run, their sandbox fails: {_last_line(errors, process.returncode)}")


@contextlib.contextmanager
def _started() -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """A sandbox that waits for its job, and where its errors go; killed at the end of the block."""
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(_command(), stdin=pipe, stdout=pipe, stderr=errors, env=_environment()) as process,
    ):
        try:
            yield process, errors
        finally:
            process.kill()


def _last_line(errors: IO[bytes], code: int) -> str:
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"it ended with {code} and said nothing"


@functools.cache
def no_sandbox() -> str | None:
    """Why programs cannot be run here, in a few words; None if they can."""
    if _bwrap() is None:
        return "bubblewrap (bwrap) is not installed"
    job = {"kind": "input", "program": "import numpy\nprint(1)", "inputs": [""]}
    with _started() as (process, errors):
        try:
            said, _ = process.communicate(_as_json(job, _START_SECONDS, ALL_SECONDS), _START_SECONDS)
        except subprocess.TimeoutExpired:
            return f"it was not ready after {_START_SECONDS:g} s"
        if said == b"null\n":
            return "a program that imports numpy fails in it"
        return None if said == b'["1\\n"]\n' else _last_line(errors, process.returncode)


def _as_json(job: Mapping[str, Any], clock_seconds: float, all_seconds: float) -> bytes:
    limits = {"seconds": SECONDS, "clock_seconds": clock_seconds, "all_seconds": all_seconds}
    return json.dumps({**job, **limits}).encode()


def _environment() -> dict[str, str]:
    """Nothing of this process's environment, which may hold secrets, except where Python finds its libraries."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return _ENVIRONMENT | kept | {"PYTHONPATH": str(_packages())}


def _packages() -> Path:
    """Where numpy is: of this folder it alone is in the sandbox, in its own place, where it finds other libraries."""
    return Path(np.__file__).parents[1]


def _bwrap() -> str | None:
    return shutil.which("bwrap")


def _command() -> tuple[str, ...]:
    """bubblewrap with this Python in it. Its options are those of version 0.4, which is as old as clusters have."""
    seen: list[str | Path] = []
    for folder in ("bin", "lib", "lib64"):
        path = Path("/", folder)
        if path.is_symlink():
            seen += ["--symlink", path.readlink(), path]
        elif path.exists():
            seen += ["--ro-bind", path, path]
    python = [os.path.join(os.path.realpath(sys.base_prefix), folder) for folder in ("bin", "lib", "lib64")]
    listed = filter(os.path.isabs, os.environ.get("LD_LIBRARY_PATH", "").split(":"))
    home = Path(os.path.expanduser("~"))  # which, unlike Path.home, raises nothing
    libraries = (name for name in listed if not home.is_relative_to(name))  # a slip, which would show all of it
    numpy = [str(_packages() / name) for name in ("numpy", "numpy.libs")]
    for name in ("/usr", "/etc/ld.so.cache", "/etc/alternatives", *python, *libraries, *numpy):
        seen += ["--ro-bind-try", name, name]
    return (
        *(_bwrap() or "bwrap", "--unshare-all", "--as-pid-1", "--die-with-parent", "--new-session"),
        *("--cap-drop", "ALL"),
        *map(str, seen),
        *("--ro-bind", in_sandbox.__file__, "/in_sandbox.py", "--proc", "/proc", "--dev", "/dev", "--chdir", "/"),
        # Without capabilities root could still write to /proc/sys.
        *("--remount-ro", "/proc", "--remount-ro", "/dev", "--remount-ro", "/"),
        *(os.path.realpath(_BASE_PYTHON), "-s", "/in_sandbox.py"),
    )
