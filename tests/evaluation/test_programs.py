"""A program is right if it passes its tests, whatever it is and does."""

from __future__ import annotations

import time
import tracemalloc

import pytest

from megatron_trd.config import DataConfig
from megatron_trd.data.programs import ProgramTests
from megatron_trd.evaluation import sandbox
from megatron_trd.evaluation.grading import are_correct
from megatron_trd.evaluation.programs import last_program, passes
from tests.marks import needs_sandbox

pytestmark = needs_sandbox

INPUTS = ProgramTests(inputs=("1 2\n", "30 4\n"), outputs=("3\n", "34"))
CALLS = ProgramTests(inputs=([1, 2], [30, 4]), outputs=(3, [34]), function="add")
ASSERTS = ProgramTests(code="import math\nassert add(1, 2) == 3\nassert math.isclose(add(1, 0.5), 1.5)")

READS = "a, b = map(int, input().split())\nprint(a + b)"
DEFINES = "def add(a, b):\n    return a + b"


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        (READS, INPUTS),
        ("import sys\nfor line in sys.stdin:\n    print(sum(map(int, line.split())), ' ')\n    exit()", INPUTS),
        ("import os\nos.write(1, str(sum(map(int, os.read(0, 99).split()))).encode())", INPUTS),
        ("import atexit\natexit.register(print, sum(map(int, open(0).read().split())))", INPUTS),
        ("if __name__ == '__main__':\n    " + READS.replace("\n", "\n    "), INPUTS),
        (
            "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**27)\n"
            "def main():\n    print(sum(map(int, input().split())))\nthreading.Thread(target=main).start()",
            INPUTS,
        ),
        (
            "import resource\nresource.setrlimit(resource.RLIMIT_STACK, [resource.RLIM_INFINITY] * 2)\n" + READS,
            INPUTS,
        ),
        (
            "import functools, sys\nsys.setrecursionlimit(10**6)\n@functools.lru_cache(None)\n"
            "def add(a, b):\n    return add(a + 1, b - 1) if b else a\n"
            "print(sum(map(int, input().split())) + add(0, 30000) - 30000)",
            INPUTS,
        ),
        (DEFINES, CALLS),
        ("class Solution:\n    def add(self, a, b):\n        print('adds')\n        return a + b", CALLS),
        (
            "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass Pair:\n"
            "    a: int\n    b: int\ndef add(a, b):\n    pair = Pair(a, b)\n    return pair.a + pair.b",
            CALLS,
        ),
        (
            "class Solution:\n    def gcd(self, a: List[int]) -> int:\n        left = deque(a)\n"
            "        return pow(reduce(math.gcd, left), 1, 10**9) * gcd(1, 1) if bisect.bisect(a, 0) == 0 else inf",
            ProgramTests(inputs=([[4, 6]],), outputs=(2,), function="gcd"),
        ),
        (
            "import numpy\ndef sums(a):\n    return [numpy.sum(a), numpy.cumsum(a)]",
            ProgramTests(inputs=([[4, 6]],), outputs=([10, [4, 10]],), function="sums"),
        ),
        (DEFINES, ASSERTS),
        (DEFINES + "\nif __name__ == '__main__':\n    print(add(*input().split()))", ASSERTS),
        ("import numpy as np\ndef add(a, b):\n    return np.add(a, b)", ASSERTS),
        ("print(10**18, '0.33333334')", ProgramTests(inputs=("",), outputs=(f"{10**18} 0.3333333333",))),
        (
            "def pair(x):\n    return (x, [x / 3])",
            ProgramTests(inputs=([1],), outputs=([1, [0.33333333]],), function="pair"),
        ),
    ],
)
def test_passes(program: str, tests: ProgramTests) -> None:
    assert passes(program, tests)


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("print(3)", INPUTS),  # right once
        ("", INPUTS),
        (READS + "\nraise SystemExit(1)", INPUTS),
        (READS + "\n1 / 0", INPUTS),
        (READS + "\nprint()\nprint('and more')", INPUTS),
        ("a, b = map(int, input().split())\nprint(float(a + b))", INPUTS),
        ("while True: pass", ProgramTests(inputs=("",), outputs=("",))),
        ("def add(a, b) return a + b", CALLS),
        ("def add(a, b):\n    return str(a + b)", CALLS),
        ("def add(a, b):\n    return {a + b}", CALLS),  # no JSON
        ("def sub(a, b):\n    return a + b", CALLS),
        ("", ProgramTests(inputs=([4, 6],), outputs=(2,), function="gcd")),
        ("", ProgramTests(code="assert gcd(4, 6) == 2")),
        ("def add(a, b):\n    exit()", CALLS),
        ("print(3)\nexit()", CALLS),
        ("import os\nos.write(3, b'[' * 10**6)\nos._exit(0)", CALLS),  # its output's file
        ("import sys\nsys.set_int_max_str_digits(0)\ndef add(a, b):\n    return 10**5000", CALLS),
        ("def add(a, b):\n    return 10**400", ProgramTests(inputs=([1, 2],), outputs=(3.5,), function="add")),
        ("def add(a, b):\n    return [a + b] if a > 1 else a - b", CALLS),
        ("def add(a, b):\n    return a - b", ASSERTS),
        ("def add(a, b):\n    raise SystemExit", ASSERTS),
        ("import os\nos._exit(0)", ASSERTS),
        ("import os\nos.close(1)\nos.kill(os.getppid(), 9)", ASSERTS),
        ("print(10**18 + 1)", ProgramTests(inputs=("",), outputs=(str(10**18),))),  # equal as floats
        ("print(0.3334)", ProgramTests(inputs=("",), outputs=("0.3333333333",))),
        ("print('0 .5')", ProgramTests(inputs=("",), outputs=("0.5",))),
        ("print('nan')", ProgramTests(inputs=("",), outputs=("0.5",))),
    ],
)
def test_does_not_pass(program: str, tests: ProgramTests, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 2.0)
    assert not passes(program, tests)


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("So:\n```python\nprint(1)\n```\nDone.", "print(1)\n"),
        ("```python\nprint(1)\n```\nNo:\n```Python\nprint(2)\n```", "print(2)\n"),
        ("```py\nprint(1)\n```\nIt prints\n```\n1\n```\nand\n```text\n1\n```", "print(1)\n"),
        ("```\nprint(1)\n```", "print(1)\n"),
        ("1. So:\n\n   ```python3 \n   if x:\n\n       print(1)\n   ```", "if x:\n\n    print(1)\n"),
        ("~~~python\nprint(1)\n~~~\n````\n```python\n```\n````", "print(1)\n"),
        ("````python title='a.py'\n'''\n```\n'''\n````\n", "'''\n```\n'''\n"),
        ('```python\n"""\n    ```\n    f(1)\n    ```\n"""\n```', '"""\n    ```\n    f(1)\n    ```\n"""\n'),
        ("```python\nprint(\nNo.\n</think>\n```python\nprint(1)\n```", "print(1)\n"),
        ("```python\r\nprint(1)\r\n```\r\n", "print(1)\r\n"),
        ("```python\nprint('```')\n```", "print('```')\n"),
        ("```python\nprint(1)\n```\nBetter:\n```python\nprint(2", "print(1)\n"),  # cut off
        ("```python\nprint(1)", None),
        ("```cpp\nint main() {}\n```", None),
        ("print(1)", None),
    ],
)
def test_the_last_closed_block_of_python_is_the_program(response: str, program: str | None) -> None:
    assert last_program(response) == program


def test_a_response_that_repeats_itself_is_read_quickly() -> None:
    begin = time.process_time()
    assert last_program("```python\n" * 20_000) is None
    assert time.process_time() - begin < 2


def test_what_a_program_prints_without_end_is_not_taken_apart() -> None:
    tracemalloc.start()
    try:
        assert not passes("print('0\\n' * (8 * 10**6))", ProgramTests(inputs=("",), outputs=("1",)))
        assert tracemalloc.get_traced_memory()[1] < 2**28
    finally:
        tracemalloc.stop()


def test_responses_are_graded_in_their_order() -> None:
    data, tests = DataConfig(task="code"), CALLS.to_json()
    right, wrong = f"```python\n{DEFINES}\n```", "```python\nadd = max\n```"
    assert are_correct(data, [(wrong, tests), (right, tests), ("no program", tests)] * 3) == [False, True, False] * 3
    assert are_correct(data, []) == []
    assert are_correct(DataConfig(), [("\\boxed{1}", "1"), ("\\boxed{2}", "1")]) == [True, False]
