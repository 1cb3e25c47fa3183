"""A program in the sandbox sees nothing, changes nothing, reaches nobody, and ends."""

from __future__ import annotations

import ast
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_trd.config import DataConfig
from megatron_trd.errors import JobFailed, UserError
from megatron_trd.evaluation import sandbox
from megatron_trd.evaluation.grading import check_gradable
from tests.marks import needs_sandbox


def run(program: str, *inputs: str, seconds: float = 60.0) -> list[str]:
    """Outputs of a program for inputs; for a single empty one, if there are none."""
    return list(sandbox.run_program({"kind": "input", "program": program, "inputs": inputs or [""]}, seconds))


@needs_sandbox
@pytest.mark.parametrize(
    "forbidden",
    [
        "os.fork()",
        "subprocess.run(['/bin/true'])",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "multiprocessing.get_context('spawn').Process().start()",
        "open('/new', 'w')",
        "open('/tmp/new', 'w')",
        "open('/dev/new', 'w')",
        "open('/dev/shm/new', 'w')",
        "open('/in_sandbox.py', 'w')",
        "open('/proc/sys/kernel/core_pattern', 'w')",
        "open('/proc/self/oom_score_adj', 'w')",
        "open('/etc/passwd')",
        "open(FILE)",
        "os.stat(os.path.dirname(FILE))",
        "socket.create_connection(ADDRESS, timeout=5)",
        "os.kill(PID, 0)",
        "os.environ['TRD_SECRET']",
        "bytearray(2 * 2**30)",
        "mmap.mmap(-1, 2 * 2**30)",
        "resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))",
        "ctypes.CDLL(None).unshare(0x10000000) and 1 / 0",  # CLONE_NEWUSER
        "ctypes.CDLL(None).ptrace(0x4206, os.getppid(), None, None) and 1 / 0",  # PTRACE_SEIZE
        "open(f'/proc/{os.getppid()}/fd/1', 'wb', 0)",  # where outputs are read
        "open('/proc/1/environ')",
        "os.memfd_create('new')",
        "ctypes.CDLL(None).shmget(0, 4096, 0o600) < 0 and 1 / 0",
        "ctypes.CDLL(None).msgget(0, 0o600) < 0 and 1 / 0",
        "ctypes.CDLL(None).semget(0, 1, 0o600) < 0 and 1 / 0",
        "ctypes.CDLL(None).syscall(250 if os.uname().machine == 'x86_64' else 219, 0, -3, 1) < 0 and 1 / 0",  # keyctl
        "ctypes.CDLL(None).syscall(425, 1, bytes(200)) < 0 and 1 / 0",  # io_uring_setup
        "socket.socket(40, socket.SOCK_STREAM)",  # to a virtual machine's host
    ],
)
def test_forbidden(forbidden: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret"
    secret.write_text("text")
    monkeypatch.setenv("TRD_SECRET", "text")
    with socket.create_server(("127.0.0.1", 0)) as server:
        known = f"FILE, ADDRESS, PID = {str(secret)!r}, {server.getsockname()!r}, {os.getpid()}\n"
        imports = "import ctypes, mmap, multiprocessing, os, resource, socket, subprocess\nprint('begun', flush=True)\n"
        caught = f"try:\n    {forbidden}\nexcept (Exception, MemoryError) as error:\n    print(type(error).__name__)\n"
        (output,) = run(known + imports + caught)
        assert output.startswith("begun\n")
        assert output.removeprefix("begun\n").strip(), "nothing was raised"
        if "TRD_SECRET" not in forbidden and "FILE" not in forbidden:
            return
        exec(f"import os\nFILE = {str(secret)!r}\n{forbidden}")  # outside it works: the test is of the sandbox


@needs_sandbox
def test_limits_end_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 1.0)
    monkeypatch.setattr(sandbox, "PATIENCE", 1.5)
    for endless in ("while True: pass", "import time; time.sleep(1e6)", "while True: print('more')", "input()"):
        begin = time.monotonic()
        assert run(endless) == []
        assert time.monotonic() - begin < 30
    waits = "import time\nfor _ in range(int(input())): time.sleep(100)\nprint('ended')"
    assert run(waits, "0", "0", "1", "0") == ["ended\n"] * 2  # nothing is run after what failed


@needs_sandbox
def test_a_program_cannot_stop_who_watches_it() -> None:
    assert run("import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)\nprint('on')", seconds=10.0) == ["on\n"]


@needs_sandbox
def test_a_program_that_waits_for_its_turn_may_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 1.0)
    assert run("import time; time.sleep(1.2); print('ended')") == ["ended\n"]


@needs_sandbox
@pytest.mark.parametrize("waits", ["time.sleep(0.2)", "while time.process_time() < 0.2: pass"])
def test_all_inputs_together_have_a_limit_and_nothing_outlives_it(waits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "PATIENCE", 1.0 if "sleep" in waits else 100.0)
    begin = time.monotonic()
    found = run(f"import time\n{waits}\nprint('ended')", *[""] * 1000, seconds=2.0)
    assert 0 < len(found) < 20
    assert time.monotonic() - begin < 30
    assert not _running()


@needs_sandbox
def test_threads_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 40.0)
    starts = (
        "import threading, time\nthreading.stack_size(2**15)\nfor _ in range({}):\n"
        "    threading.Thread(target=time.sleep, args=[0.2]).start()\n"
    )
    assert run(starts.format(100) + "print('ended')") == ["ended\n"]
    endless = starts.format(10**6).replace("0.2", "1e6")
    begin = time.monotonic()
    assert run(endless) == []
    assert time.monotonic() - begin < 30  # before its time is over


@needs_sandbox
def test_who_has_seen_enough_ends_the_program() -> None:
    outputs = sandbox.run_program({"kind": "input", "program": "print(input())", "inputs": ["1"] * 10**5})
    assert next(outputs) == "1\n"
    outputs.close()
    assert not _running()


def test_a_sandbox_that_fails_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    fails = "cat >/dev/null; echo 'bwrap: Creating new namespace failed: nesting depth' >&2; exit 1"
    monkeypatch.setattr(sandbox, "_command", lambda: ("/bin/sh", "-c", fails))
    with pytest.raises(JobFailed, match="programs cannot be run, their sandbox fails: bwrap: Creating new namespace"):
        run("print(1)")
    monkeypatch.setattr(sandbox, "_command", lambda: ("/bin/sleep", "100"))
    assert run("print(1)", seconds=0.1) == [], "a program that is killed for its time is wrong"


@needs_sandbox
def test_the_sandbox_ends_with_whoever_asked() -> None:
    program = "import time; time.sleep(1e6)"
    asks = f"from tests.evaluation.test_sandbox import run\nprint('begun', flush=True)\nrun({program!r})"
    asker = subprocess.Popen([sys.executable, "-c", asks], stdout=subprocess.PIPE)
    assert asker.stdout is not None
    assert asker.stdout.readline() == b"begun\n"
    while not (found := _running(asker.pid)):
        time.sleep(0.05)
    asker.kill()
    asker.communicate()
    for pid in found:
        deadline = time.monotonic() + 60
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < deadline, "the sandbox is still there"
            time.sleep(0.05)


def _running(parent: int | None = None) -> list[int]:
    """bwrap processes that a process has started; this one, if none is given."""
    children = Path(f"/proc/{parent or os.getpid()}/task").glob("*/children")
    pids = [int(pid) for listed in children for pid in listed.read_text().split()]
    return [pid for pid in pids if Path(f"/proc/{pid}/comm").read_text() == "bwrap\n"]


@needs_sandbox
def test_of_python_the_sandbox_has_what_runs_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text("text")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{tmp_path}:/:lib:")
    shows = f"import numpy, os\nprint(numpy.__file__)\nprint(os.listdir({sys.base_prefix!r}))\n"
    (output,) = run(shows + f"print(os.path.exists({str(tmp_path / 'secret')!r}), os.path.exists('/sys'))")
    place, folders, seen = output.splitlines()
    assert place == np.__file__
    assert sys.base_prefix == "/usr" or set(ast.literal_eval(folders)) <= {"bin", "lib", "lib64"}
    assert seen == "False False"


@needs_sandbox
def test_a_copied_python_runs_programs(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--copies", "--without-pip", tmp_path / "copy"], check=True)
    asks = "from megatron_trd.evaluation import sandbox; print(sandbox.no_sandbox())"
    path = os.pathsep.join([str(Path(sandbox.__file__).parents[2]), str(Path(np.__file__).parents[1])])
    environment = os.environ | {"PYTHONPATH": path}
    found = subprocess.run([tmp_path / "copy/bin/python", "-c", asks], env=environment, capture_output=True, check=True)
    assert found.stdout == b"None\n"


@needs_sandbox
def test_a_sandbox_without_numpy_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy/__init__.py").write_text("raise ImportError")
    monkeypatch.setattr(np, "__file__", str(tmp_path / "numpy/__init__.py"))
    assert sandbox.no_sandbox.__wrapped__() == "a program that imports numpy fails in it"


@pytest.mark.parametrize(
    ("bwrap", "says"),
    [
        (None, "bubblewrap (bwrap) is not installed; install bubblewrap, or set data.answer_field=null"),
        (
            "echo 'bwrap: No permissions to create new namespace' >&2; exit 1",
            "No permissions to create new namespace; ",
        ),
        ("exit 3", "it ended with 3 and said nothing; "),
        ("echo '[\"2\\n\"]'", "it ended with 0 and said nothing; "),
    ],
)
def test_without_a_sandbox_programs_are_not_run(
    bwrap: str | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if bwrap is not None:
        (tmp_path / "bwrap").write_text(f"#!/bin/sh\ncat >/dev/null\n{bwrap}\n")
        (tmp_path / "bwrap").chmod(0o755)
    shell = shutil.which("cat")
    assert shell is not None
    (tmp_path / "cat").symlink_to(shell)
    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox.no_sandbox.cache_clear()
    try:
        with pytest.raises(UserError) as refusal:
            check_gradable(DataConfig(task="code"), "held_out.path")
    finally:
        sandbox.no_sandbox.cache_clear()
    assert str(refusal.value).startswith("held_out.path needs a sandbox to run programs in, and there is none on this")
    assert says in str(refusal.value)
