"""The embedded world is what it says: its problems, its slips, its files and its tokenizer."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path

import pytest

from megatron_trd.demo import STUDENT, TEACHER, TEST_PROBLEMS, TRAIN_PROBLEMS
from megatron_trd.demo.make_data import SEED, TEST_COUNT, TRAIN_COUNT
from megatron_trd.demo.task import STYLES, corrupt, first_wrong_step, generate, mangle, own_solution, parse, split_of
from megatron_trd.demo.tokenizer import make_tokenizer
from megatron_trd.evaluation.grading import is_correct
from megatron_trd.models.architecture import read_architecture
from megatron_trd.models.folder import ModelFolder
from megatron_trd.models.loading import check_folder

PROBLEMS = generate(200, seed=7)


def test_problems_are_a_function_of_the_seed() -> None:
    assert generate(50, seed=7) == PROBLEMS[:50]
    assert generate(50, seed=8) != PROBLEMS[:50]


def test_answers_follow_from_the_problem() -> None:
    for problem in PROBLEMS:
        value, steps = parse(problem.problem)
        for step in steps:
            value = step.apply(value)
            assert 10 <= value <= 99
        assert problem.answer == str(value)
        assert is_correct(problem.solution, problem.answer)


@pytest.mark.parametrize("style", STYLES)
def test_own_solutions_are_right_in_every_line(style: str) -> None:
    for problem in PROBLEMS:
        solution = own_solution(problem, style)  # type: ignore[arg-type]
        assert first_wrong_step(problem, solution) is None
        assert is_correct(solution, problem.answer)


@pytest.mark.parametrize("style", STYLES)
def test_a_slip_is_where_it_is_said_to_be_and_the_rest_follows_from_it(style: str) -> None:
    rng = random.Random(0)
    for problem in PROBLEMS:
        solution, at = corrupt(problem, style, rng)  # type: ignore[arg-type]
        assert first_wrong_step(problem, solution) == at
        assert not is_correct(solution, problem.answer) or "Multiply" in problem.problem
        right = own_solution(problem, style).split("\n")  # type: ignore[arg-type]
        assert solution.split("\n")[:at] == right[:at]
        assert len(solution.split("\n")) == len(right)


def test_mangled_solutions_are_often_wrong_and_always_finished() -> None:
    rng = random.Random(0)
    texts = [mangle(problem, "symbols", rng) for problem in PROBLEMS]
    wrong = sum(first_wrong_step(problem, text) is not None for problem, text in zip(PROBLEMS, texts, strict=True))
    assert 100 < wrong < 200
    assert all("\\boxed{" in text for text in texts)


def test_missing_and_surplus_lines_are_wrong() -> None:
    problem = PROBLEMS[0]
    lines = own_solution(problem, "symbols").split("\n")
    assert first_wrong_step(problem, "\n".join(lines[:2])) == 2
    assert first_wrong_step(problem, "\n".join([*lines, "so"])) == len(lines)
    assert first_wrong_step(problem, "") == 0


def test_the_splits_never_meet() -> None:
    train, test = ({row["problem"] for row in rows(path)} for path in (TRAIN_PROBLEMS, TEST_PROBLEMS))
    assert not train & test
    assert {split_of(problem) for problem in train} == {"train"}
    assert {split_of(problem) for problem in test} == {"test"}


def test_the_committed_files_are_what_their_makers_make() -> None:
    assert rows(TRAIN_PROBLEMS) == [asdict(problem) for problem in generate(TRAIN_COUNT, SEED, "train")]
    assert rows(TEST_PROBLEMS) == [asdict(problem) for problem in generate(TEST_COUNT, SEED, "test")]
    made = make_tokenizer()
    for folder in (STUDENT, TEACHER):
        kept = ModelFolder(folder).tokenizer
        assert kept.get_vocab() == made.get_vocab()
        for problem in PROBLEMS[:20]:
            text = f"{problem.problem}\n{problem.solution}\n{own_solution(problem, 'words')}"
            assert kept(text)["input_ids"] == made(text)["input_ids"]
            assert kept.decode(kept(text)["input_ids"]) == text


def test_student_and_teacher_are_whole_and_differ_in_width() -> None:
    student, teacher = (ModelFolder(folder) for folder in (STUDENT, TEACHER))
    for folder in (student, teacher):
        check_folder(folder, read_architecture(folder))
    assert read_architecture(student).vocab_size == read_architecture(teacher).vocab_size
    assert read_architecture(student).hidden_size < read_architecture(teacher).hidden_size


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
