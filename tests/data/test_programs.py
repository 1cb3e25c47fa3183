"""The tests of programs are read in the forms that data sets have, and what holds none is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_trd.config import DataConfig
from megatron_trd.data.problems import load_problems, shown_answer
from megatron_trd.data.programs import NoTests, ProgramTests, read_tests
from megatron_trd.errors import UserError

HUMAN_EVAL = "def check(candidate):\n    assert candidate(1) == 2\n"


@pytest.mark.parametrize(
    ("value", "row", "tests"),
    [
        ("assert f(1) == 2", {}, ProgramTests(code="assert f(1) == 2")),
        ("[f(1) for _ in [1, 2]]", {}, ProgramTests(code="[f(1) for _ in [1, 2]]")),
        (["assert f(1) == 2", "assert f(2) == 3"], {}, ProgramTests(code="assert f(1) == 2\nassert f(2) == 3")),
        (
            ["assert f(root) == 2"],
            {"test_imports": ["import math"], "test_setup_code": "root = Node(1)"},
            ProgramTests(code="import math\nroot = Node(1)\nassert f(root) == 2"),
        ),
        (HUMAN_EVAL, {"entry_point": "f"}, ProgramTests(code=f"{HUMAN_EVAL}\n\ncheck(f)\n")),
        ("assert f(1) == 2", {"entry_point": "f"}, ProgramTests(code="assert f(1) == 2")),
        (
            {"inputs": ["1\n", ["1", "2"]], "outputs": ["2", ["3", "4"]]},
            {},
            ProgramTests(inputs=("1\n", "1\n2"), outputs=("2", "3\n4")),
        ),
        (
            {"inputs": ["1"], "outputs": ["2"], "fn_name": None},
            {},
            ProgramTests(inputs=("1",), outputs=("2",)),
        ),
        ({"inputs": ["1"], "outputs": ["2"], "fn_name": ""}, {}, ProgramTests(inputs=("1",), outputs=("2",))),
        (
            json.dumps({"fn_name": "f", "inputs": [[1, [2]]], "outputs": [[3]]}),
            {},
            ProgramTests(inputs=([1, [2]],), outputs=([3],), function="f"),
        ),
    ],
)
def test_the_forms_that_data_sets_have(value: Any, row: dict[str, Any], tests: ProgramTests) -> None:
    found = read_tests(value, row)
    assert found == tests
    assert ProgramTests.from_json(found.to_json()) == tests


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("assert f(1) = 2", "no Python: "),
        ("assert \0", "no Python: "),
        ([" "], "got blank text"),
        ("5", "nothing is checked: 5"),  # an answer, or what a program should print
        (HUMAN_EVAL, r"nothing is checked: def check\(candidate\)"),
        ("import unittest\nclass Test(unittest.TestCase):\n    def test(self): assert f(1)", "nothing is checked: "),
        ("if __name__ == '__main__':\n    assert f(1)", "nothing is checked: "),
        (f'{{"fn_name": "f", "inputs": [[1]], "outputs": [{"9" * 5000}]}}', r"^Exceeds the limit \(4300 digits\)"),
        ("[" * 10**5, "^maximum recursion depth exceeded"),
        ("assert x" + ".a" * 10**5, "no Python: "),
        (7, "got int"),
        ([], "got list"),
        ([1, 2], "got list"),
        ({}, "an object with nothing in it"),
        ({"inputs": ["1"]}, "an object with inputs in it"),
        ({"inputs": ["1"], "outputs": []}, "of equal number"),
        ({"inputs": [], "outputs": []}, "inputs, outputs"),
        ({"inputs": "1", "outputs": "2"}, "inputs, outputs"),
        ({"inputs": [3], "outputs": [4], "fn_name": "f"}, "a list of arguments of f as each of inputs, got 3"),
        ('{"inputs": ["1"]}', "an object with inputs in it"),
    ],
)
def test_what_holds_no_tests_is_refused(value: Any, says: str) -> None:
    with pytest.raises(NoTests, match=says):
        read_tests(value, {})


def test_problems_have_their_tests_and_a_row_without_is_named(tmp_path: Path) -> None:
    path = tmp_path / "programs.jsonl"
    rows = [{"problem": "Add.", "answer": "assert f(1) == 2"}, {"problem": "Add.", "answer": "assert f("}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:1]))
    config = DataConfig(path=str(path), task="code", reference_field=None)
    (problem,) = load_problems(config)
    assert problem.answer is not None
    assert ProgramTests.from_json(problem.answer) == ProgramTests(code="assert f(1) == 2")
    assert shown_answer(config, problem) is None  # tests are too long to show
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"problem 2: field 'answer' holds no tests of a program: no Python: "):
        load_problems(config)
    path.write_text('{"problem": "Add.", "tests": "assert f(1) == 2"}\n')
    with pytest.raises(UserError, match=r"no field 'answer'; set data.answer_field to one of its fields \(problem, t"):
        load_problems(config)
    (problem,) = load_problems(DataConfig(path=str(path), task="code", answer_field=None, reference_field=None))
    assert problem.answer is None
