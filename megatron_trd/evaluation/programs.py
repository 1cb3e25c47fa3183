"""Whether a program that a model wrote passes its tests."""

from __future__ import annotations

import contextlib
import json
import math
import re
import secrets
from typing import Any

from megatron_trd.data.programs import ProgramTests
from megatron_trd.evaluation.sandbox import run_program

_FENCE = re.compile(r"([ \t]*)(`{3,}(?=[^`]*$)|~{3,})(.*)")
_PYTHON = ("python", "python3", "py")
_CLOSE = 1e-6  # relative or absolute, where a decimal fraction is expected: what such problems usually allow


def last_program(response: str) -> str | None:
    """Content of the last closed ```python block, or, if there is none, of the last one of no language; else None."""
    blocks = _blocks(response)
    for languages in (_PYTHON, ("",)):
        if fitting := [text for language, text in blocks if language in languages]:
            return fitting[-1]
    return None


def _blocks(text: str) -> list[tuple[str, str]]:
    """Language and content of the closed code blocks, fenced as in CommonMark, but at any indentation.

    A fence that names a language also begins a block within one: a text that thinks aloud leaves some open.
    """
    blocks: list[tuple[str, str]] = []
    indent, fence, language = 0, "", ""  # of the open block; no fence if none is open
    lines: list[str] = []
    for line in text.split("\n"):
        found = _FENCE.match(line.rstrip())
        # Further in, or shorter, it is part of the program, as in a docstring.
        if found and (not fence or (found[2].startswith(fence) and len(found[1]) <= indent + 3)):
            named = "".join(found[3].lower().split()[:1])
            if fence and not named:
                blocks.append((language, "".join(lines)))
                fence = ""
            else:
                indent, fence, language, lines = len(found[1]), found[2], named, []
        elif fence:
            before = len(line) - len(line.lstrip(" \t"))
            lines.append(line[min(before, indent) :] + "\n")
    return blocks


def passes(program: str, tests: ProgramTests) -> bool:
    """Whether a program passes all its tests, run in the sandbox; one that takes too long does not."""
    job: dict[str, Any] = {"program": program, "inputs": tests.inputs}
    if tests.code is not None:
        passed = secrets.token_hex()  # a program that ends early cannot say so
        job |= {"kind": "tests", "inputs": [tests.code], "passed": passed}
        return list(run_program(job)) == [passed]
    job |= {"kind": "call", "function": tests.function} if tests.function else {"kind": "input"}
    same = _same_result if tests.function else _same_text
    with contextlib.closing(run_program(job)) as outputs:  # the program ends at its first wrong output
        for wanted in tests.outputs:
            found = next(outputs, None)
            if found is None or not same(found, wanted):
                return False
    return True


def _same_text(found: str, wanted: str) -> bool:
    """Whether two outputs have the same words in the same lines, except for the last digits of decimal fractions."""
    if len(found) > 10 * len(wanted) + 2**20:  # more than digits and spaces explain; split, it would fill the memory
        return False
    lines, others = (text.strip().splitlines() for text in (found, wanted))
    return len(lines) == len(others) and all(map(_same_line, lines, others))


def _same_line(found: str, wanted: str) -> bool:
    words, others = found.split(), wanted.split()
    return len(words) == len(others) and all(map(_same_word, words, others))


def _same_word(found: str, wanted: str) -> bool:
    if found == wanted:
        return True
    try:
        return "." in wanted and math.isclose(float(found), float(wanted), rel_tol=_CLOSE, abs_tol=_CLOSE)
    except ValueError:
        return False


def _same_result(found: str, wanted: Any) -> bool:
    """Whether a function returned what was expected. Data sets write a result as it is or as a list of one."""
    only = wanted[0] if isinstance(wanted, list) and len(wanted) == 1 else wanted
    try:
        result = json.loads(found)
        return _same_value(result, wanted) or _same_value(result, only)
    # A program that ends inside its function writes no result, and one may return 10**400 or lists in lists in lists.
    except (ValueError, OverflowError, RecursionError):
        return False


def _same_value(found: Any, wanted: Any) -> bool:
    if isinstance(found, list) and isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(_same_value, found, wanted))
    if isinstance(wanted, float) and isinstance(found, int | float):
        return math.isclose(found, wanted, rel_tol=_CLOSE, abs_tol=_CLOSE)
    return bool(found == wanted)
