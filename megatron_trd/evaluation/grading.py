"""Grading: whether a response has the right answer, by math-verify on the content of its last \\boxed{}, or whether
the program in it passes its tests."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from megatron_trd.config import DataConfig
from megatron_trd.data.programs import ProgramTests
from megatron_trd.errors import JobFailed, UserError
from megatron_trd.evaluation.programs import last_program, passes
from megatron_trd.evaluation.sandbox import no_sandbox

_BOX = "\\boxed{"
# Escaped braces do not group. `\\` is a line break, also before a brace, but in `\\boxed{` it is a doubled backslash.
_BRACES = re.compile(r"\\boxed\{|\\\\(?!boxed\{)|\\[{}]|[{}]")
# 12 345 with any of LaTeX's spaces, which math-verify parses as two numbers; in `\frac12\,345` they are two.
_SPACED_NUMBER = re.compile(r"(?<![\w.^}\])])\d{1,3}(?:(?:\\[,;: ]|[~\s])+\d{3})+(?!\d)")
_SECONDS = 5.0  # for one comparison
_START_SECONDS = 600.0  # to start, which reads sympy's many files, at worst from a busy network disk
_PROGRAMS = 16  # at once: each may use 2 GiB
_LONGEST = 1000  # characters of an answer worth comparing


def check_gradable(data: DataConfig, what: str) -> None:
    """Raise `UserError` if responses to the problems that `what` uses cannot be graded."""
    if data.answer_field is None:
        raise UserError(f"{what} needs answers to grade with: set data.answer_field to their field")
    if data.task == "code" and (reason := no_sandbox()):
        raise UserError(
            f"{what} needs a sandbox to run programs in, and there is none on this machine: {reason}; "
            "install bubblewrap, or set data.answer_field=null to train without grades"
        )


def are_correct(data: DataConfig, responses: Sequence[tuple[str, str]]) -> list[bool]:
    """Whether each response is correct; `responses` are pairs of a response and its problem's `answer`.

    Programs are run beside one another, one on each core of this process, up to a number that bounds their memory.
    """
    if data.task == "math":
        return [is_correct(response, answer) for response, answer in responses]
    with ThreadPoolExecutor(min(_PROGRAMS, len(os.sched_getaffinity(0)))) as pool:
        return list(pool.map(_program_is_correct, responses))


def _program_is_correct(graded: tuple[str, str]) -> bool:
    response, tests = graded
    program = last_program(response)
    return program is not None and passes(program, ProgramTests.from_json(tests))


def is_correct(response: str, answer: str) -> bool:
    """Whether the last `\\boxed{…}` of `response` equals `answer` as mathematics (`1/2` is `0.5` is `\\frac12`).

    A response without a closed box is wrong: the prompt asks for one, and the last number of a truncated text is not an
    answer. So is one whose comparison takes more than five seconds. `answer` may be bare or boxed, text or LaTeX; if it
    is blank, every response is wrong.
    """
    found, wanted = last_boxed(response), last_boxed(answer)
    found, wanted = _plain(found or ""), _plain(answer.strip() if wanted is None else wanted)
    if not found or not wanted:
        return False
    if found == wanted or max(len(found), len(wanted)) > _LONGEST:
        return found == wanted
    if _is_integer(found) and _is_integer(wanted):
        return int(found) == int(wanted)
    with contextlib.suppress(_NoVerdict):
        return _equal(wanted, found)
    return False


def last_boxed(text: str) -> str | None:
    """Content of the last `\\boxed{…}` whose braces are closed; None if there is none."""
    first, end = -1, -1  # of its content
    open_braces: list[int] = []  # start of a box's content; -1 for other braces
    for found in _BRACES.finditer(text):
        if found[0] in (_BOX, "{"):
            open_braces.append(found.end() if found[0] == _BOX else -1)
        elif found[0] == "}" and open_braces and (begin := open_braces.pop()) > first:
            first, end = begin, found.start()
    return text[first:end].strip() if first >= 0 else None


def _plain(text: str) -> str:
    """An answer without a final period and without spaces inside numbers."""
    if text.endswith(".") and not text.endswith(("..", "\\right.")):
        text = text[:-1].rstrip()
    return _SPACED_NUMBER.sub(lambda number: re.sub(r"\D", "", number[0]), text)


def _is_integer(text: str) -> bool:
    return text.isascii() and text.removeprefix("-").isdecimal()


class _NoVerdict(Exception):
    """The judge took too long or died; on a busy machine, the next attempt may succeed."""


@functools.lru_cache(maxsize=65536)  # rollouts of one problem give few different answers; exceptions are not cached
def _equal(wanted: str, found: str) -> bool:
    return _judge().equal(wanted, found)


@functools.cache
def _judge() -> _Judge:
    return _Judge()


class _Judge:
    """The judge process of this process, started on first use and restarted after it had to be killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def equal(self, wanted: str, found: str) -> bool:
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-m", "megatron_trd.evaluation.judge", str(os.getpid())]
            pipe = subprocess.PIPE
            with tempfile.TemporaryFile() as errors:
                self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors)
                if not self._ask("1", "1.0", _START_SECONDS):
                    errors.seek(0)
                    said = errors.read().decode(errors="replace").strip()
                    reason = said.splitlines()[-1] if said else f"not ready after {_START_SECONDS:g} s"
                    raise JobFailed(f"answers cannot be compared, their judge does not start: {reason}")
        verdict = self._ask(wanted, found, _SECONDS)
        if verdict is None:
            raise _NoVerdict
        return verdict

    def _ask(self, wanted: str, found: str, seconds: float) -> bool | None:
        """The verdict; None if there is none in time, in which case the process is killed."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):  # it died during the previous comparison
            self._process.stdin.write(json.dumps([wanted, found]).encode() + b"\n")
            self._process.stdin.flush()
            with selectors.DefaultSelector() as ready:
                ready.register(self._process.stdout, selectors.EVENT_READ)
                if ready.select(seconds) and (line := self._process.stdout.readline()):
                    return line == b"true\n"
        self._process.kill()
        self._process.wait()
        return None
