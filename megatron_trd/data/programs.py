"""Tests of programs, in the forms that data sets of programming problems have."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

_FORMS = (
    "Python that raises if the program is wrong (text, or a list of statements), or inputs and outputs of equal number "
    "(and fn_name)"
)


class NoTests(ValueError):
    """A value that holds no tests, with the reason."""


@dataclass(frozen=True)
class ProgramTests:
    """What a program must do to be correct: pass `code`, or turn every input into its output."""

    code: str | None = None  # Python that runs after the program, in its namespace, and raises if it is wrong
    inputs: tuple[Any, ...] = ()  # standard input, or arguments of `function`
    outputs: tuple[Any, ...] = ()  # standard output, or what `function` returns
    function: str | None = None  # defined by the program or by its class `Solution`; None: inputs are standard input

    def to_json(self) -> str:
        """A lossless JSON representation."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`."""
        values = json.loads(text)
        return cls(values["code"], tuple(values["inputs"]), tuple(values["outputs"]), values["function"])


def read_tests(value: Any, row: Mapping[str, Any]) -> ProgramTests:
    """The tests in a field of a data set's row. Raises `NoTests`.

    - Text: Python. If it defines `check(candidate)`, as HumanEval's does, the row's `entry_point` is checked with it.
    - A list of texts: Python, a statement each (MBPP's `test_list`, after the row's `test_imports` and
      `test_setup_code`).
    - An object with `inputs` and `outputs`, and `fn_name` if they are arguments and results of a function
      (`input_output` of APPS and TACO); it may also be written as JSON in a text.
    """
    if isinstance(value, str):
        found = _json(value)
        return _python(value, row) if found is None else read_tests(found, row)
    if isinstance(value, list) and value and all(isinstance(line, str) for line in value):
        imports = row.get("test_imports")
        lines = [*(imports if isinstance(imports, list) else []), row.get("test_setup_code"), *value]
        return _python("\n".join(line for line in lines if isinstance(line, str) and line), row)
    if isinstance(value, dict):
        return _cases(value)
    raise NoTests(f"expected {_FORMS}, got {type(value).__name__}")


def _json(text: str) -> Any:
    """The object or list that a text is the JSON of; None for other text. Raises `NoTests`."""
    if text.lstrip()[:1] not in ("{", "["):
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None
    except (ValueError, RecursionError) as error:  # more digits, or lists in lists, than Python reads
        raise NoTests(str(error)) from None


def _python(code: str, row: Mapping[str, Any]) -> ProgramTests:
    if not code.strip():
        raise NoTests(f"expected {_FORMS}, got blank text")
    if "def check(" in code and isinstance(name := row.get("entry_point"), str):
        code += f"\n\ncheck({name})\n"
    try:
        parsed = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise NoTests(f"no Python: {error}") from None
    if not any(map(_can_fail, parsed.body)):
        raise NoTests(f"expected {_FORMS}, got Python in which nothing is checked: {code.strip():.50}")
    return ProgramTests(code=code)


def _can_fail(statement: ast.stmt) -> bool:
    """Whether a statement may raise; the definition of a function or class does not check anything.

    Nor does what is for a script alone: tests are none.
    """
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return False
    if isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test):
        return False
    return any(isinstance(node, ast.Assert | ast.Raise | ast.Call) for node in ast.walk(statement))


def _cases(value: Mapping[str, Any]) -> ProgramTests:
    inputs, outputs, function = value.get("inputs"), value.get("outputs"), value.get("fn_name")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs) or not inputs:
        raise NoTests(f"expected {_FORMS}, got an object with {', '.join(value) or 'nothing'} in it")
    if not function:
        return ProgramTests(inputs=tuple(map(_text, inputs)), outputs=tuple(map(_text, outputs)))
    for arguments in inputs:
        if not isinstance(arguments, list):
            raise NoTests(f"expected a list of arguments of {function} as each of inputs, got {arguments!r:.50}")
    return ProgramTests(inputs=tuple(inputs), outputs=tuple(outputs), function=function)


def _text(stream: Any) -> str:
    """Standard input or output; some data sets write its lines as a list."""
    return "\n".join(map(str, stream)) if isinstance(stream, list) else str(stream)
