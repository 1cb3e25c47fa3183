"""Runs a program that a model wrote, once for each input; a script that is itself run within `sandbox.py`'s confines.

It reads one job as JSON from standard input and writes one line for each input: `[output]`, or `null` if the program
failed or took too long, which is the last line then. Comparing outputs is left to the other side: a program may do
anything to this process, and the expected outputs are not in it. It imports the standard library alone.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import functools
import importlib
import json
import math
import os
import platform
import resource
import select
import signal
import struct
import sys
import time
import types
from collections.abc import Callable
from typing import Any

_MEMORY_BYTES = 2 * 2**30
_FILE_BYTES = 16 * 2**20  # of any one file, standard output among them
_STACK_BYTES = 2**27  # what Linux leaves free for it, at least; recursion through C, as in lru_cache, uses it
_FILES = 64
_THREADS = 256  # what the default size of a thread's stack allows in this memory; with small stacks there could be more
_LOOK_SECONDS = 0.1  # between looks at how many there are

_IMPORTED = (
    *("bisect", "collections", "copy", "functools", "heapq", "itertools", "math", "operator", "random", "re", "string"),
    *("sys", "typing"),
)

_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 4, 22, 2  # linux/prctl.h, linux/seccomp.h
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _EQUAL, _ANY_BIT, _NOT_LESS, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06  # BPF_LD | BPF_W | BPF_ABS and so on
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
_CLONE_THREAD = 0x00010000  # linux/sched.h
_X32 = 0x40000000  # the bit of x86-64's second set of system calls
_CLONE3 = 435
# Machine -> AUDIT_ARCH of linux/audit.h, the number of clone, and those of calls that no program needs: fork, vfork,
# unshare; shmget, semget, msgget, memfd_create, whose memory is not limited as the process's is; ptrace;
# socket, of which some kinds reach beyond the network's namespace; add_key, request_key, keyctl, since keys are those
# of the user outside; bpf, perf_event_open, userfaultfd.
_CALLS = {
    "x86_64": (0xC000003E, 56, (57, 58, 272, 29, 64, 68, 319, 101, 41, 248, 249, 250, 321, 298, 323)),
    "aarch64": (0xC00000B7, 220, (97, 194, 190, 186, 279, 117, 198, 217, 218, 219, 280, 241, 282)),
}
_ALIKE = (425, 447)  # on all machines: io_uring_setup, whose rings hold files and make sockets; memfd_secret


def main() -> Callable[[], None] | None:
    """Run the job. In each child process it returns what the child is to do, so that this ends as any program does."""
    # No program may trace this process or open its files: without the limits it could outlive whoever asked.
    _prctl(_PR_SET_DUMPABLE, 0)
    job = json.load(sys.stdin)
    if job["kind"] == "call":
        _known_names()  # child processes have them then, and need not import them again
    for given in job["inputs"]:
        output = os.memfd_create("output")  # there is no folder to write to
        child = os.fork()
        if not child:
            return _prepared(job, given, output)
        done = _ended_well(child, job["clock_seconds"])
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = done and used.ru_utime + used.ru_stime < job["all_seconds"]
        os.lseek(output, 0, os.SEEK_SET)
        with os.fdopen(output, "rb") as file:
            text = file.read().decode(errors="replace")
        print(json.dumps([text] if done else None), flush=True)
        if not done:
            break
    return None


def _ended_well(child: int, seconds: float) -> bool:
    """Wait for a child process, and kill it when its time is over or it has too many threads."""
    pidfd = os.pidfd_open(child)
    deadline = time.monotonic() + seconds
    while not select.select([pidfd], [], [], _LOOK_SECONDS)[0]:
        if time.monotonic() > deadline or len(os.listdir(f"/proc/{child}/task")) > _THREADS:
            os.kill(child, signal.SIGKILL)
            break
    os.close(pidfd)
    return os.waitpid(child, 0)[1] == 0


def _prepared(job: dict[str, Any], given: Any, output: int) -> Callable[[], None]:
    """Confine this child process further; returns the program's run, whose output goes to the file `output`."""
    _prctl(_PR_SET_DUMPABLE, 1)  # else an ordinary user's program could not open /dev/stdin
    given_file, nothing = os.memfd_create("input"), os.open(os.devnull, os.O_WRONLY)
    if job["kind"] == "input":
        with open(given_file, "wb", closefd=False) as file:
            file.write(given.encode(errors="replace"))
        os.lseek(given_file, 0, os.SEEK_SET)
    os.dup2(given_file, 0)
    os.dup2(output if job["kind"] == "input" else nothing, 1)
    os.dup2(nothing, 2)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 (it is the program's; so is the next)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    limits = {
        resource.RLIMIT_AS: _MEMORY_BYTES,
        resource.RLIMIT_STACK: _STACK_BYTES,
        resource.RLIMIT_FSIZE: _FILE_BYTES,
        resource.RLIMIT_NOFILE: _FILES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: math.ceil(job["seconds"]),
    }
    for limit, most in limits.items():
        there = resource.getrlimit(limit)[1]  # a job may have limits of its own, which cannot be raised
        most = most if there == resource.RLIM_INFINITY else min(most, there)
        # Some programs set their stack's, which is part of all memory.
        resource.setrlimit(limit, (most, there if limit == resource.RLIMIT_STACK else most))
    _forbid_calls()

    def run() -> None:
        sys.argv = ["program.py"]
        module = types.ModuleType("__main__" if job["kind"] == "input" else "program")
        sys.modules[module.__name__] = module
        if job["kind"] == "call":
            module.__dict__["__builtins__"] = _known_names()
        # As here, annotations are not evaluated: what they name need not have been imported.
        exec(compile(job["program"], "program.py", "exec"), module.__dict__)
        if job["kind"] == "call":
            function = module.__dict__.get(job["function"]) or getattr(module.__dict__["Solution"](), job["function"])
            os.write(output, json.dumps(function(*given), default=lambda value: value.tolist()).encode())  # numpy's
        elif job["kind"] == "tests":
            exec(compile(given, "tests.py", "exec"), module.__dict__)
            os.write(output, job["passed"].encode())

    return run


@functools.cache
def _known_names() -> dict[str, Any]:
    """The built-in names, and what sites whose problems ask for a function import for every program."""
    modules = {name: importlib.import_module(name) for name in _IMPORTED}
    names: dict[str, Any] = {}
    for module in modules.values():
        exported = getattr(module, "__all__", vars(module))
        names |= {key: vars(module)[key] for key in exported if not key.startswith("_")}
    return names | modules | vars(builtins)


def _forbid_calls() -> None:
    """Let this process start threads and no processes: a program that forks without end would fill the machine.

    Nor anything else that its limits do not cover.
    """
    architecture, clone, others = _CALLS[platform.machine()]
    forbidden, unknown = _ERRNO | errno.EPERM, _ERRNO | errno.ENOSYS  # C libraries try clone when clone3 is unknown
    refused = dict.fromkeys(others + _ALIKE, forbidden) | {_CLONE3: unknown}
    rules = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        (_NOT_LESS, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL),
        *(rule for number, how in refused.items() for rule in ((_EQUAL, 0, 1, number), (_RETURN, 0, 0, how))),
        (_EQUAL, 0, 3, clone),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_ANY_BIT, 1, 0, _CLONE_THREAD),
        (_RETURN, 0, 0, forbidden),
        (_RETURN, 0, 0, _ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *rule) for rule in rules))
    program = struct.pack("@HP", len(rules), ctypes.addressof(code))
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program)


def _prctl(option: int, value: int, more: bytes | None = None) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, more, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl {option}")


if __name__ == "__main__":
    if program := main():
        program()
