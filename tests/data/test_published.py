"""Published problems become files that evaluations read, by rows of the shape that the hub's data sets have."""

from __future__ import annotations

import base64
import json
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import datasets
import pytest

from megatron_trd.config import DataConfig
from megatron_trd.data.problems import load_problems
from megatron_trd.data.published import PUBLISHED, fetch
from megatron_trd.evaluation.grading import are_correct
from megatron_trd.evaluation.sandbox import no_sandbox
from tests.data.errors import user_error


def packed(cases: Any) -> str:
    """As LiveCodeBench has its hidden tests."""
    return base64.b64encode(zlib.compress(pickle.dumps(cases))).decode()


def case(given: str, wanted: str, kind: str) -> dict[str, str]:
    return {"input": given, "output": wanted, "testtype": kind}


PROBLEM = {"problem": "1 + 1 = ?", "problem_idx": 1}
BENCH: dict[str, Any] = {"question_title": "A", "platform": "leetcode", "difficulty": "easy", "metadata": "{}"}
TACO: dict[str, Any] = {"difficulty": "EASY", "tags": "[]", "starter_code": ""}

# Name -> rows, a program or answer that is right and one that is wrong for all of them, and what the problem shows.
ROWS: dict[str, tuple[list[dict[str, Any]], str, str, str]] = {
    "aime_2024": ([{"id": 60, **PROBLEM, "solution": "2", "answer": "2"}], "2", "3", "1 + 1"),
    "aime_2025": ([PROBLEM | {"answer": 2}], "2", "3", "1 + 1"),
    "hmmt_2025": ([PROBLEM | {"answer": "\\frac{1}{3}"}], "\\frac13", "3", "1 + 1"),
    "beyond_aime": ([PROBLEM | {"answer": "2"}], "2", "3", "1 + 1"),
    "amo_bench": (
        [
            {"question_id": 1, "prompt": "1 + 1 = ?", "answer": "\\boxed{2}", "answer_type": "number"},
            {"question_id": 2, "prompt": "Why?", "answer": "So.", "answer_type": "description"},
        ],
        "2",
        "3",
        "1 + 1",
    ),
    "human_eval_plus": (
        [
            {
                "task_id": "HumanEval/0",
                "prompt": 'def half(x):\n    """Half of x."""\n',
                "canonical_solution": "    return x / 2\n",
                "entry_point": "half",
                "test": "import numpy as np\ndef check(candidate):\n    assert np.allclose(candidate(3), 1.5)\n",
            }
        ],
        "def half(x):\n    return x / 2",
        "def half(x):\n    return x // 2",
        'python\ndef half(x):\n    """Half of x."""\n```',
    ),
    "mbpp_plus": (
        [
            {
                "task_id": 2,
                "prompt": "Write a function to halve.",
                "code": "def half(x): return x / 2",
                "test_imports": [],
                "test_list": ["assert half(4) == 2"],
                "test": "for given, wanted in [(4, 2), (3, 1.5)]:\n    assert half(given) == wanted\n",
            }
        ],
        "def half(x):\n    return x / 2",
        "def half(x):\n    return x // 2",
        "assert half(4) == 2",
    ),
    "live_code_bench_v6": (
        [
            BENCH
            | {
                "question_content": "Add.",
                "starter_code": "class Solution:\n    def add(self, a: int, b: List[int]) -> int:\n        ",
                "public_test_cases": json.dumps([case("1\n[2]", "3", "functional")]),
                "private_test_cases": packed(json.dumps([case("1\n[2, 3]\n", "6", "functional")])),
                "metadata": json.dumps({"func_name": "add"}),
            },
            BENCH
            | {
                "question_content": "Add.",
                "starter_code": "",
                "public_test_cases": json.dumps([case("1 2\n", "3\n", "stdin")]),
                "private_test_cases": json.dumps([case("1 2 3\n", "6\n", "stdin")]),
            },
        ],
        "class Solution:\n    def add(self, a: int, b: List[int]) -> int:\n        return a + sum(b)\n"
        "if __name__ == '__main__':\n    print(sum(map(int, input().split())))",
        "class Solution:\n    def add(self, a, b):\n        return a + b[0]\n"
        "if __name__ == '__main__':\n    print(sum(map(int, input().split()[:2])))",
        "Add.",
    ),
    "taco": (
        [
            TACO
            | {
                "question": "Double.",
                "solutions": json.dumps(["print(2 * int(input()))", "print(int(input()) * 2)"]),
                "input_output": json.dumps({"inputs": ["2\n"], "outputs": ["4\n"]}),
            },
            TACO
            | {
                "question": "Double.",
                "starter_code": "def double(x):\n\t",
                "solutions": "[]",
                "input_output": json.dumps({"fn_name": "double", "inputs": [[2]], "outputs": [[4]]}),
            },
            TACO | {"question": "No tests.", "solutions": "", "input_output": ""},
            TACO | {"question": "No tests.", "solutions": "[]", "input_output": '{"inputs": [], "outputs": []}'},
        ],
        "def double(x):\n    return 2 * x\nif __name__ == '__main__':\n    print(double(int(input())))",
        "def double(x):\n    return x + 1\nif __name__ == '__main__':\n    print(double(int(input())))",
        "Double.",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_fetched_is_read_and_graded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, right, wrong, shown = ROWS[name]
    asked: list[Any] = []

    def load_dataset(path: str, **given: Any) -> Any:
        asked.append((path, given))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    out = tmp_path / "new" / f"{name}.jsonl"
    said = fetch(name, out)
    set_ = PUBLISHED[name]
    assert asked == [(set_.path, {"split": set_.split, "data_files": set_.files or None})]
    code = name in ("human_eval_plus", "mbpp_plus", "live_code_bench_v6", "taco")
    if code and no_sandbox() is not None:
        pytest.skip(f"no sandbox: {no_sandbox()}")
    data = DataConfig(path=str(out), task="code" if code else "math", missing_reference="drop")
    if name != "taco":
        data.reference_field = None
    problems = load_problems(data)
    assert said.startswith(f"{out}: {len(problems)} problems")
    assert (" without " in said) == (len(problems) < len(rows))
    assert all(shown in problem.problem for problem in problems)
    form = "```python\n{}\n```" if code else "\\boxed{{{}}}"
    for text, verdict in ((right, True), (wrong, False)):
        graded = [(form.format(text), problem.answer or "") for problem in problems]
        assert are_correct(data, graded) == [verdict] * len(problems)


def test_arguments_are_lines_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [case('"a\u2028b"\n', "3", "functional")]
    row = ROWS["live_code_bench_v6"][0][0] | {"public_test_cases": json.dumps(cases), "private_test_cases": "[]"}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [row])
    fetch("live_code_bench_v6", tmp_path / "out")
    assert json.loads(json.loads((tmp_path / "out").read_text())["answer"])["inputs"] == [["a\u2028b"]]


def test_only_what_the_model_is_asked_for_is_in_the_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("live_code_bench_v6", "taco"):
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, rows=ROWS[name][0], **__: rows)
        fetch(name, tmp_path / name)
        problems = [json.loads(line)["problem"] for line in (tmp_path / name).read_text().splitlines()]
        reads = [text for text in problems if text.endswith("reads standard input and writes standard output.")]
        begins = [text for text in problems if "Begin the program with:\n\n```python\n" in text]
        assert (len(problems), len(reads), len(begins)) == (2, 1, 1)
    first, second = (json.loads(line) for line in (tmp_path / "taco").read_text().splitlines())
    assert (first["solution"], second["solution"]) == ("print(2 * int(input()))", None)
    assert '"4\\\\n"' not in json.dumps([first["problem"], second["problem"]])


def test_hidden_tests_cannot_run_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    row = ROWS["live_code_bench_v6"][0][0] | {"private_test_cases": packed(Runs())}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [row])
    (tmp_path / "out").write_text("as before\n")
    says = user_error(fetch, "live_code_bench_v6", tmp_path / "out")
    assert "test6.jsonl' problem 1 is not in the form that it was published in: UnpicklingError: " in says
    assert "mkdir is in it" in says
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out").read_text() == "as before\n"


def test_an_unknown_name_and_no_hub_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert "'aime' is not known; known are aime_2024, aime_2025, " in user_error(fetch, "aime", tmp_path)
    says = user_error(fetch, "aime_2024", tmp_path / "new" / "out")
    assert says.startswith("'HuggingFaceH4/aime_2024' cannot be fetched: Couldn't reach the Hub")
    assert not (tmp_path / "new").exists()
