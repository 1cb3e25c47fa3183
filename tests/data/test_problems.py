"""Problems: every source they come from, every way a source is broken, and which of them a step sees."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_trd.config import DataConfig
from megatron_trd.data.problems import Problem, load_problems, step_indices
from tests.data.errors import user_error

ROWS = [
    {"problem": "1 + 1 = ?", "answer": "2", "solution": "one and one make two"},
    {"problem": "∫ x dx = ?", "answer": "x²/2", "solution": "power rule\n\\boxed{x^2/2}"},
    {"problem": "cost of $rollout?", "answer": "$5", "solution": "$$"},
]
PROBLEMS = [Problem(index, row["problem"], row["answer"], row["solution"]) for index, row in enumerate(ROWS)]


def write(path: Path, content: str | bytes) -> DataConfig:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return DataConfig(path=str(path))


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def dataset(rows: list[dict[str, Any]]) -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets.Dataset.from_list(rows)


# Sources


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_jsonl_gives_its_problems_in_order(tmp_path: Path, suffix: str) -> None:
    assert load_problems(write(tmp_path / f"data.{suffix}", jsonl(ROWS))) == PROBLEMS


def test_parquet_gives_its_problems_in_order(tmp_path: Path) -> None:
    dataset(ROWS).to_parquet(tmp_path / "data.parquet")
    assert load_problems(DataConfig(path=str(tmp_path / "data.parquet"))) == PROBLEMS


def test_a_folder_of_parquet_parts_is_one_data_set(tmp_path: Path) -> None:
    """As Spark writes it."""
    (tmp_path / "data.parquet").mkdir()
    for number, row in enumerate(ROWS):
        dataset([row]).to_parquet(tmp_path / "data.parquet" / f"part-{number:05d}.parquet")
    assert load_problems(DataConfig(path=str(tmp_path / "data.parquet"))) == PROBLEMS


def test_a_saved_dataset_gives_its_problems_whatever_the_split(tmp_path: Path) -> None:
    dataset(ROWS).save_to_disk(tmp_path / "data")
    assert load_problems(DataConfig(path=str(tmp_path / "data"), split="test")) == PROBLEMS


def test_a_saved_dataset_dict_gives_the_split_asked_for(tmp_path: Path) -> None:
    import datasets

    datasets.DatasetDict(train=dataset(ROWS), test=dataset(ROWS[1:])).save_to_disk(tmp_path / "data")
    assert load_problems(DataConfig(path=str(tmp_path / "data"))) == PROBLEMS
    found = load_problems(DataConfig(path=str(tmp_path / "data"), split="test"))
    assert [problem.problem for problem in found] == [row["problem"] for row in ROWS[1:]]
    assert [problem.index for problem in found] == [0, 1]
    message = user_error(load_problems, DataConfig(path=str(tmp_path / "data"), split="validation"))
    assert all(part in message for part in ("'validation'", "data.split", "train", "test", str(tmp_path))), message


def test_a_folder_of_files_is_read_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl", jsonl(ROWS))
    assert load_problems(DataConfig(path=str(tmp_path / "data"))) == PROBLEMS
    message = user_error(load_problems, DataConfig(path=str(tmp_path / "data"), split="test"))
    assert all(part in message for part in ("'test'", "'train'", "set data.split")), message
    write(tmp_path / "data" / "train-2.jsonl", '{"question": "q"}\n')
    message = user_error(load_problems, DataConfig(path=str(tmp_path / "data")))
    assert all(part in message for part in ("question", "set data.path")), message


def test_fields_are_those_of_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    write(path, jsonl([{"question": "q", "final": 42, "proof": True, "problem": "not this"}]))
    config = DataConfig(path=str(path), problem_field="question", answer_field="final", reference_field="proof")
    assert load_problems(config) == [Problem(0, "q", "42", "True")]


def test_fields_set_to_none_are_not_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    write(path, jsonl([{"problem": "q"}]))
    config = DataConfig(path=str(path), answer_field=None, reference_field=None)
    assert load_problems(config) == [Problem(0, "q", None, None)]


def test_blank_lines_are_no_problems(tmp_path: Path) -> None:
    text = "\n" + jsonl(ROWS).replace("\n", "\r\n \t\n") + "\n\n"
    assert load_problems(write(tmp_path / "data.jsonl", text)) == PROBLEMS


def test_byte_order_mark_and_missing_last_newline_are_no_fault(tmp_path: Path) -> None:
    assert load_problems(write(tmp_path / "data.jsonl", b"\xef\xbb\xbf" + jsonl(ROWS).rstrip().encode())) == PROBLEMS


def test_line_separators_inside_a_string_do_not_end_the_line(tmp_path: Path) -> None:
    # U+2028 and U+0085 are line ends to str.splitlines, not to JSONL
    row = ROWS[0] | {"problem": "a\u2028b\u0085c\x0cd"}
    text = json.dumps(row, ensure_ascii=False).replace("\\f", "\\u000c")
    assert load_problems(write(tmp_path / "data.jsonl", text))[0].problem == row["problem"]


# Broken sources


@pytest.mark.parametrize("before", ["", "\ufeff", " "])
def test_an_array_is_told_what_to_be(tmp_path: Path, before: str) -> None:
    message = user_error(load_problems, write(tmp_path / "data.json", before + json.dumps(ROWS, indent=1)))
    assert all(part in message for part in (str(tmp_path / "data.json"), "an object a line", "jq")), message


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"problem": "q", ', ["not JSON"]),
        (b"nonsense", ["not JSON"]),
        (b'{"problem": "\xe9", "answer": "1", "solution": "s"}', ["UTF-8"]),
        (b'["problem", "q"]', ["object", "list"]),
        (b'"text"', ["object", "str"]),
        (b"3", ["object", "int"]),
        (b"null", ["object", "NoneType"]),
    ],
)
def test_a_broken_line_is_named_by_its_number_in_the_file(tmp_path: Path, line: bytes, says: list[str]) -> None:
    config = write(tmp_path / "data.jsonl", jsonl(ROWS[:1]).encode() + b"\n\n" + line + b"\n" + jsonl(ROWS).encode())
    message = user_error(load_problems, config)
    assert all(part in message for part in [*says, "line 4", config.path]), message


@pytest.mark.parametrize("content", ["", "\n", " \n\t\n"])
def test_an_empty_file_is_named(tmp_path: Path, content: str) -> None:
    config = write(tmp_path / "data.jsonl", content)
    message = user_error(load_problems, config)
    assert config.path in message
    assert "no problems" in message


def test_an_empty_parquet_file_is_named(tmp_path: Path) -> None:
    dataset(ROWS).select([]).to_parquet(tmp_path / "data.parquet")
    message = user_error(load_problems, DataConfig(path=str(tmp_path / "data.parquet")))
    assert str(tmp_path) in message
    assert "no problems" in message


@pytest.mark.parametrize("content", [b"", b"PAR1", b"not parquet at all"])
def test_a_broken_parquet_file_is_named(tmp_path: Path, content: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path / "data.parquet", content)
    message = user_error(load_problems, config)
    assert config.path in message
    assert "cannot be read" in message
    assert capfd.readouterr() == ("", ""), "the message is all that is said"


def test_a_broken_saved_dataset_is_named(tmp_path: Path) -> None:
    dataset(ROWS).save_to_disk(tmp_path / "data")
    (tmp_path / "data" / "state.json").write_text("{")
    message = user_error(load_problems, DataConfig(path=str(tmp_path / "data")))
    assert str(tmp_path / "data") in message


@pytest.mark.parametrize("name", ["none.jsonl", "none.parquet", "folder.jsonl", "none"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    message = user_error(load_problems, DataConfig(path=str(tmp_path / name)))
    assert str(tmp_path / name) in message
    assert "no" in message


def test_no_path_says_what_to_give() -> None:
    message = user_error(load_problems, DataConfig())
    assert "data.path" in message
    assert "JSONL" in message


@pytest.mark.parametrize(
    ("key", "field", "null"),
    [
        ("problem_field", "problem", False),
        ("problem_field", "problem", True),
        ("answer_field", "answer", False),
        ("answer_field", "answer", True),
        ("reference_field", "solution", False),
    ],
)
def test_a_missing_field_is_named_with_the_fields_there_are(tmp_path: Path, key: str, field: str, null: bool) -> None:
    second = {name: value for name, value in ROWS[1].items() if name != field} | {"level": 3}
    if null:
        second[field] = None
    message = user_error(load_problems, write(tmp_path / "data.jsonl", jsonl([ROWS[0], second])))
    for part in (str(tmp_path), "problem 2", f"'{field}'", f"data.{key}", *second):
        assert part in message, message
    assert ("is null" in message) == null, "a field that is there must not be called missing"
    assert ("null for none" in message) == (key != "problem_field")


@pytest.mark.parametrize(("nothing", "word"), [(float("nan"), "NaN"), ("", "blank"), (" \n", "blank")])
@pytest.mark.parametrize("field", ["problem", "answer"])
def test_what_says_nothing_is_as_null(tmp_path: Path, field: str, nothing: Any, word: str) -> None:
    message = user_error(load_problems, write(tmp_path / "data.jsonl", jsonl([ROWS[0], ROWS[1] | {field: nothing}])))
    for part in (str(tmp_path), "problem 2", f"field '{field}' is {word}", f"data.{field}_field"):
        assert part in message, message


CHAT = [{"role": "user", "content": "What is 2 + 2?"}]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("key", "field", "value"),
    [
        ("problem_field", "problem", CHAT),
        ("answer_field", "answer", ["4", "four"]),
        ("answer_field", "answer", {"value": "4"}),
        ("reference_field", "solution", ["step", "step"]),
    ],
)
def test_a_field_that_is_neither_text_nor_a_number_is_named(
    tmp_path: Path, suffix: str, key: str, field: str, value: Any
) -> None:
    rows, path = [ROWS[1] | {field: value}], tmp_path / f"data.{suffix}"
    write(path, jsonl(rows)) if suffix == "jsonl" else dataset(rows).to_parquet(path)
    message = user_error(load_problems, DataConfig(path=str(path)))
    for part in (str(path), "problem 1", f"field '{field}' is a {type(value).__name__}", f"data.{key}"):
        assert part in message, message


@pytest.mark.parametrize("nothing", [None, "", " \n", float("nan")])
def test_a_problem_may_have_no_reference_solution(tmp_path: Path, nothing: Any) -> None:
    rows = [ROWS[0], ROWS[1] | {"solution": nothing}]
    first, second = load_problems(write(tmp_path / "data.jsonl", jsonl(rows)))
    assert (first.reference, second.reference) == (ROWS[0]["solution"], None)


# Steps


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**31), st.booleans())
def test_every_problem_is_seen_once_an_epoch(count: int, batch: int, seed: int, shuffle: bool) -> None:
    steps = -(-3 * count // batch)
    visited = [index for step in range(steps) for index in step_indices(count, batch, step, seed=seed, shuffle=shuffle)]
    for start in range(0, 3 * count, count):
        assert Counter(visited[start : start + count]) == Counter(range(count))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 30), st.integers(0, 2**31))
def test_a_step_is_a_function_of_its_number_alone(count: int, batch: int, step: int, seed: int) -> None:
    unbroken = [step_indices(count, batch, number, seed=seed, shuffle=True) for number in range(step + 1)]
    assert step_indices(count, batch, step, seed=seed, shuffle=True) == unbroken[-1]
    assert len(unbroken[-1]) == batch


def test_a_batch_may_span_epochs() -> None:
    assert step_indices(3, 7, 0, seed=0, shuffle=False) == [0, 1, 2, 0, 1, 2, 0]
    assert step_indices(3, 2, 1, seed=0, shuffle=False) == [2, 0]


def test_without_shuffle_problems_keep_their_order() -> None:
    assert [step_indices(10, 4, step, seed=5, shuffle=False) for step in (0, 1, 2)] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]
    ]  # fmt: skip


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    epochs = [tuple(step_indices(50, 50, step, seed=1, shuffle=True)) for step in range(3)]
    assert len({*epochs, tuple(step_indices(50, 50, 0, seed=2, shuffle=True)), tuple(range(50))}) == 5


def test_the_order_is_the_one_that_checkpoints_were_written_with() -> None:
    # a resumed run reads on only as long as this does not change
    assert step_indices(10, 10, 0, seed=7, shuffle=True) == [8, 0, 7, 1, 3, 6, 2, 4, 5, 9]


def test_an_epoch_s_order_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[int]] = []
    default_rng = np.random.default_rng

    def counted(seed: list[int]) -> np.random.Generator:
        drawn.append(seed)
        return default_rng(seed)

    monkeypatch.setattr(np.random, "default_rng", counted)
    seed = 20_250_101  # of no other test
    found = [index for step in range(5) for index in step_indices(10, 4, step, seed=seed, shuffle=True)]
    assert drawn == [[seed, 0], [seed, 1]]
    assert found == [*default_rng([seed, 0]).permutation(10), *default_rng([seed, 1]).permutation(10)]


def test_another_kind_of_file_is_told_what_to_be(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("problem,answer\n1,2\n")
    message = user_error(load_problems, DataConfig(path=str(tmp_path / "data.csv")))
    assert ".jsonl" in message
    assert ".parquet" in message
