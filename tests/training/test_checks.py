"""Bad input of a run: one line that says what, where and how to mend, before any weight is loaded."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_trd import platform
from megatron_trd.config import TrainConfig, from_dict, known_keys, load, save
from megatron_trd.data.programs import ProgramTests
from megatron_trd.models.folder import ModelFolder
from megatron_trd.training import command
from megatron_trd.training.checks import Inputs, check
from megatron_trd.training.run_folder import _LAYOUT, check_run_folder, claim
from megatron_trd.training.run_lock import release_lock
from tests.data.errors import user_error
from tests.models import VOCAB, write_model

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole models, written once: 4 heads over 2 groups, 2 layers, feed-forward 96, context 512."""
    root = tmp_path_factory.mktemp("models")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    write_model(root / "student", **small)
    write_model(root / "larger", **small | {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8})
    write_model(root / "other", **small | {"vocab_size": VOCAB + 1})
    return root


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(_: ModelFolder, name: str) -> None:
        raise AssertionError(f"read the weights of {name}")

    monkeypatch.setattr(ModelFolder, "tensor", read)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"problem": "1 + 1 = ?", "answer": "2", "solution": "2"}) + "\n")
    return path


@pytest.fixture
def run(models: Path, data: Path) -> Callable[..., TrainConfig]:
    """A good configuration with some sections changed."""

    def make(**changes: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "model": str(models / "student"),
            "sampler": {"max_rollout_tokens": 64, "max_refinement_tokens": 64},
            "data": {"path": str(data), "max_prompt_tokens": 64, "max_reference_tokens": 64},
        }
        for key, value in changes.items():
            values[key] = values.get(key, {}) | value if isinstance(value, dict) else value
        return from_dict(values, "test")

    return make


@pytest.fixture
def copy(models: Path, tmp_path: Path) -> Path:
    """A student folder of one's own, to break."""
    return Path(shutil.copytree(models / "student", tmp_path / "copy"))


Run = Callable[..., TrainConfig]


def says(config: TrainConfig, *parts: str) -> None:
    message = user_error(check, config)
    assert all(part in message for part in parts), message


# Held-out problems


def test_held_out_problems_are_read_and_not_mixed_in(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text('{"problem": "2 + 2 = ?", "answer": "4"}\n{"problem": "2 + 3 = ?", "answer": "5"}\n')
    inputs = check(run(held_out={"path": str(path)}, data={"max_prompt_tokens": 128}))
    assert [problem.problem for problem in inputs.held_out] == ["2 + 2 = ?", "2 + 3 = ?"]
    assert [problem.problem for problem in inputs.problems] == ["1 + 1 = ?"]
    path.write_text(json.dumps({"problem": "2 + 2 = ?" * 30, "answer": "4"}) + "\n")
    says(run(held_out={"path": str(path)}), "problem 1 of held_out.path", str(path), "data.max_prompt_tokens is 64")
    path.write_text('{"problem": "2 + 2 = ?"}\n')
    says(run(held_out={"path": str(path)}), str(path), "no field 'answer'")
    says(run(held_out={"path": str(path)}, data={"answer_field": None}), "held_out.path needs answers")
    says(run(held_out={"path": "elsewhere.jsonl"}), "elsewhere.jsonl", "no such file; set held_out.path")
    says(run(held_out={"every": 5}), "held_out.every is set", "set held_out.path")


def test_programs_need_tests_and_a_sandbox(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "programs.jsonl"
    path.write_text(
        json.dumps({"problem": "Write f.", "tests": ["assert f(1) == 2"], "solution": "def f(x): ..."}) + "\n"
    )
    data = {"path": str(path), "task": "code", "answer_field": "tests"}
    no_sandbox = mock.patch("megatron_trd.evaluation.grading.no_sandbox")
    with no_sandbox as reason:
        reason.return_value = None
        assert check(run(data=data)).problems[0].answer == ProgramTests(code="assert f(1) == 2").to_json()
        says(run(data=data | {"answer_field": "solution"}), str(path), "field 'solution' holds no tests", "nothing is")
        reason.return_value = "bubblewrap (bwrap) is not installed"
        says(run(data=data), "data.answer_field", "bubblewrap (bwrap) is not installed", "data.answer_field=null")
        assert check(run(data=data | {"answer_field": None})).problems[0].answer is None
        reason.return_value = None
        config = run(data=data | {"max_prompt_tokens": 128}, held_out={"path": str(path)})
        inputs = check(config, grades=False)  # on ranks that do not grade
        assert [problem.answer for problem in (*inputs.problems, *inputs.held_out)] == [None, None]


# A good run


def test_a_good_run_passes_and_its_inputs_are_told(run: Run, models: Path) -> None:
    found: Inputs = check(run())
    assert found.world_size == 1
    assert found.teacher is found.student
    assert found.student.arch.layers == 2
    assert found.problems[0].answer == "2"
    assert found.max_length == (64 + 64 + 64) + 64  # problem, reference and rollout, then the refinement


@pytest.mark.parametrize(
    ("method", "length"),
    # problem 64, reference 64, rollout 32, refinement 16
    [("trd-opsd", 176), ("trd-opd", 112), ("opd-forward-kl", 96), ("opsd-jsd", 160)],
)
def test_the_longest_sequence_is_the_method_s(run: Run, models: Path, method: str, length: int) -> None:
    sampler = {"max_rollout_tokens": 32, "max_refinement_tokens": 16}
    teacher = {"model": str(models / "larger")}
    assert check(run(method=method, sampler=sampler, teacher=teacher)).max_length == length


def test_the_papers_lengths_are_the_papers(run: Run) -> None:
    from megatron_trd.training.checks import _longest, prompt_limit

    lengths = {name: _longest(TrainConfig(method=name)) for name in ("opd-forward-kl", "opsd-forward-kl", "trd-opsd")}
    assert lengths == {"opd-forward-kl": 18432, "opsd-forward-kl": 22528, "trd-opsd": 38912}
    assert prompt_limit(TrainConfig(), "refine_reference") == 22528


@pytest.mark.parametrize(
    ("student", "teacher", "sampler", "world"),
    [
        ((1, 1), (1, 1), 1, 1),
        ((2, 1), (1, 2), 1, 2),
        ((2, 2), (1, 1), 1, 4),
        ((1, 1), (2, 2), 2, 4),
        ((1, 2), (2, 1), 2, 2),
    ],
)
def test_the_world_is_the_smallest_that_holds_every_layout(
    run: Run, student: tuple[int, int], teacher: tuple[int, int], sampler: int, world: int
) -> None:
    layouts = {
        "student": {"tp": student[0], "pp": student[1]},
        "teacher": {"tp": teacher[0], "pp": teacher[1]},
        "sampler": {"tp": sampler},
    }
    assert check(run(**layouts)).world_size == world
    assert check(run(**layouts, world_size=2 * world)).world_size == 2 * world


def test_the_world_is_a_multiple_of_layouts_that_do_not_divide_each_other(run: Run, tmp_path: Path) -> None:
    model = str(write_model(tmp_path / "deep", hidden_size=32, num_hidden_layers=6, head_dim=16))
    assert check(run(model=model, student={"pp": 2}, teacher={"pp": 3})).world_size == 6


def test_experts_count_in_the_smallest_world() -> None:
    layouts = {"student": {"tp": 4, "pp": 2, "ep": 8}, "sampler": {"tp": 4}}
    assert from_dict(layouts, "test").fewest_ranks == 16


@pytest.mark.parametrize("shared", [{"teacher": {"weights": "live"}}, {"lora": {"rank": 4}, "teacher": {}}])
def test_a_teacher_that_is_the_student_asks_for_no_ranks(shared: dict[str, Any]) -> None:
    teacher = shared["teacher"] | {"tp": 3}
    assert from_dict(shared | {"student": {"tp": 2}, "teacher": teacher}, "test").fewest_ranks == 2


def test_a_machine_s_gpus_are_the_world_where_layouts_fit_them(monkeypatch: pytest.MonkeyPatch) -> None:
    current = platform.current()
    monkeypatch.setattr(current, "gpu_count", lambda: 8)
    assert [current.ranks(fewest) for fewest in (1, 2, 3, 8, 16)] == [8, 8, 6, 8, 16]


def test_a_larger_teacher_of_the_same_vocabulary_passes(run: Run, models: Path) -> None:
    found = check(run(teacher={"model": str(models / "larger")}))
    assert (found.student.arch.hidden_size, found.teacher.arch.hidden_size) == (32, 64)


def test_a_teacher_must_end_its_responses_as_the_student_does(run: Run, models: Path, copy: Path) -> None:
    """Or the student learns an end at which its own sampler goes on, to the limit."""
    teacher = Path(shutil.copytree(models / "larger", copy.parent / "teacher"))
    end = ModelFolder(copy).tokenizer.eos_token_id
    other = end + 1
    for folder, ends in ((teacher, [end, other]), (copy, end)):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    config = run(model=str(copy), method="trd-opd", teacher={"model": str(teacher)})
    says(config, f"teacher.model '{teacher}'", f"add {other} to eos_token_id in '{copy}/generation_config.json'")
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, other, 7]}))
    assert check(config).student.folder.stop_tokens == {end, other, 7}
    (copy / "generation_config.json").write_text("{")
    says(config, str(copy), "generation_config.json")


# Data


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["no such file"]),
        ("", ["no problems"]),
        ('{"problem": "q", "answer": "1", "solution": "s"}\n{"problem"\n', ["line 2", "not JSON"]),
        ('{"problem": "q", "answer": "1"}\n', ["problem 1", "'solution'", "data.reference_field", "problem, answer"]),
    ],
)
def test_broken_data(run: Run, tmp_path: Path, content: str | None, parts: list[str]) -> None:
    path = tmp_path / "broken.jsonl"
    if content is not None:
        path.write_text(content)
    says(run(data={"path": str(path)}), str(path), *parts)


def test_no_data(run: Run) -> None:
    says(run(data={"path": ""}), "data.path")


# Layouts


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"student": {"tp": 3}}, ["student.tp=3", "4 attention heads", "divisor of 4"]),
        ({"student": {"tp": 4}}, ["student.tp=4", "2 key/value heads", "divisor of 2"]),
        ({"student": {"pp": 3}}, ["student.pp=3", "2 layers", "divisor of 2"]),
        ({"teacher": {"tp": 3}}, ["teacher.tp=3", "4 attention heads"]),
        ({"teacher": {"pp": 5}}, ["teacher.pp=5", "2 layers"]),
        ({"sampler": {"tp": 3}}, ["sampler.tp=3", "4 attention heads"]),
        ({"student": {"tp": 2, "pp": 2}, "world_size": 2}, ["world size 2", "tp=2", "pp=2", "multiple of 4"]),
        ({"teacher": {"tp": 2}, "world_size": 3}, ["world size 3", "tp=2", "multiple of 2"]),
        ({"sampler": {"tp": 2}, "world_size": 3}, ["world size 3", "sampler.tp=2", "multiple"]),
        ({"student": {"sequence_parallel": True}}, ["sequence_parallel", "student.tp"]),
    ],
)
def test_a_layout_that_does_not_fit(run: Run, changes: dict[str, Any], parts: list[str]) -> None:
    says(run(**changes), *parts)


def test_feed_forward_that_does_not_divide(run: Run, tmp_path: Path) -> None:
    write_model(tmp_path / "odd", hidden_size=32, num_hidden_layers=1, head_dim=16, intermediate_size=33)
    says(run(model=str(tmp_path / "odd"), student={"tp": 2}), "student.tp=2", "33 feed-forward units")


def test_experts_are_cut_by_tensor_parallelism_with_sequence_parallelism_alone(run: Run, tmp_path: Path) -> None:
    model = str(write_model(tmp_path / "experts", family="qwen3_moe", num_hidden_layers=1))
    says(run(model=model, student={"tp": 2}), "experts", "student.sequence_parallel=true")
    assert check(run(model=model, student={"tp": 2, "sequence_parallel": True})).world_size == 2


def test_a_teacher_s_heads_are_the_teacher_s(run: Run, models: Path) -> None:
    layouts = {"teacher": {"tp": 8, "model": str(models / "larger")}, "student": {"tp": 2}}
    assert check(run(**layouts)).world_size == 8
    says(run(**layouts | {"student": {"tp": 8}}), "student.tp=8")


# Lengths


@pytest.mark.parametrize("section", [{"data": {"max_prompt_tokens": 400}}, {"sampler": {"max_rollout_tokens": 400}}])
def test_a_context_too_short_for_the_prompt(run: Run, section: dict[str, Any]) -> None:
    longest = 64 * 4 + 400 - 64
    says(run(**section), f"{longest} tokens", "512", "data.max_prompt_tokens", "sampler.max_rollout_tokens")


def test_a_sequence_of_just_the_context_passes(run: Run) -> None:
    assert check(run(data={"max_prompt_tokens": 512 - 3 * 64})).max_length == 512
    says(run(data={"max_prompt_tokens": 513 - 3 * 64}), "513 tokens", "student")


def test_the_teacher_s_context_counts_too(run: Run, tmp_path: Path) -> None:
    write_model(tmp_path / "short", hidden_size=32, num_hidden_layers=2, head_dim=16, max_position_embeddings=128)
    says(run(teacher={"model": str(tmp_path / "short")}), "teacher", "128")


# Methods


def test_a_method_without_what_it_needs(run: Run) -> None:
    says(run(data={"reference_field": None}), "trd-opsd", "data.reference_field")
    assert check(run(method="trd-opd", data={"reference_field": None})).problems[0].reference is None
    says(run(corpus="corrected", data={"answer_field": None}), "corpus=corrected", "data.answer_field")
    says(run(corpus="corrected", method="opd-forward-kl"), "corpus=corrected", "refines")
    for kind in ("forward-kl", "forward-kl-clip", "reverse-kl", "reverse-kl-topk"):
        says(run(method=f"opd-{kind}"), f"opd-{kind}", "set teacher.model")
    assert check(run(method="trd-opd")).teacher  # shown the rollout, it can know better


def test_problems_without_a_reference_are_refused_or_dropped(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"

    def write(*solutions: str | None) -> None:
        rows = ({"problem": "1 + 1 = ?", "answer": "2", "solution": solution} for solution in solutions)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("", "2", None, "2")
    says(run(data={"path": str(path)}), "2 of 4 problems", "'solution'", "trd-opsd", "data.missing_reference=drop")
    kept = check(run(data={"path": str(path), "missing_reference": "drop"})).problems
    assert [problem.index for problem in kept] == [1, 3]
    assert len(check(run(method="trd-opd", data={"path": str(path)})).problems) == 4
    write("", None)
    says(run(data={"path": str(path), "missing_reference": "drop"}), "2 of 2 problems", "'solution'")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"staleness": 1, "overlap": "teacher"}, ["staleness=1", "overlap=none"]),
        ({"staleness": 1, "student": {"offload": True}}, ["student.offload=true", "staleness=1"]),
        ({"log": {"max_drift": 0.1, "drift_tokens": 0}}, ["log.max_drift", "log.drift_tokens"]),
        ({"staleness": 1, "teacher": {"offload": True}}, ["teacher.offload=true", "staleness=1"]),
        ({"overlap": "teacher", "teacher": {"offload": True}}, ["teacher.offload=true", "overlap=teacher"]),
        ({"overlap": "teacher", "teacher": {"hidden_in": "host"}}, ["overlap=teacher", "teacher.hidden_in=host"]),
        ({"teacher": {"offload": True, "weights": "live"}}, ["teacher.offload=true", "student.offload"]),
    ],
)
def test_memory_is_lent_to_one_at_a_time(run: Run, changes: dict[str, Any], parts: list[str]) -> None:
    says(run(**changes), *parts)


@pytest.mark.parametrize("beside", [{"staleness": 1}, {"overlap": "teacher"}])
def test_two_threads_communicate_only_where_they_may(
    run: Run, beside: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = beside | {"sampler": {"tp": 2}}
    check(run(**both))
    monkeypatch.setattr(type(platform.current()), "threads_communicate", False)
    says(run(**both), "sampler.tp=2", "NCCL", "sampler.tp=1")
    check(run(**beside))


@pytest.mark.parametrize("weights", ["live", "ema"])
def test_a_separate_teacher_cannot_follow_the_student(run: Run, models: Path, weights: str) -> None:
    says(
        run(teacher={"model": str(models / "larger"), "weights": weights}),
        f"teacher.weights={weights}",
        "teacher.model",
    )


# Teacher and student


def test_a_teacher_of_another_vocabulary_size(run: Run, models: Path) -> None:
    """Rows beyond the student's are no tokens', as long as there are no such tokens."""
    assert check(run(teacher={"model": str(models / "other")})).teacher.arch.vocab_size == VOCAB
    says(
        run(model=str(models / "other"), teacher={"model": str(models / "larger")}),
        "teacher.model",
        str(VOCAB),
        str(VOCAB + 1),
    )


def test_a_teacher_with_tokens_beyond_the_student_s(run: Run, models: Path, tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(models / "other", tmp_path / "teacher"))
    text = json.loads((teacher / "tokenizer.json").read_text())
    text["model"]["vocab"]["more"] = VOCAB
    (teacher / "tokenizer.json").write_text(json.dumps(text))
    says(run(teacher={"model": str(teacher)}), f"token {VOCAB} is 'more'", "beyond the student's", "one tokenizer")


def test_a_teacher_whose_tokens_have_other_numbers(run: Run, models: Path, tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(models / "larger", tmp_path / "teacher"))
    text = json.loads((teacher / "tokenizer.json").read_text())
    vocabulary = text["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (teacher / "tokenizer.json").write_text(json.dumps(text))
    says(run(teacher={"model": str(teacher)}), str(teacher), "'a'", "tokenizer")


def test_a_teacher_whose_tokens_have_other_meanings(run: Run, models: Path, tmp_path: Path) -> None:
    """As many tokens and none of another number: one of them is another."""
    teacher = Path(shutil.copytree(models / "larger", tmp_path / "teacher"))
    text = json.loads((teacher / "tokenizer.json").read_text())
    vocabulary = text["model"]["vocab"]
    number = vocabulary["q"] = vocabulary.pop("a")
    (teacher / "tokenizer.json").write_text(json.dumps(text))
    says(run(teacher={"model": str(teacher)}), str(teacher), f"token {number} is 'q'", "'a'")


# Model folders


def test_no_model(run: Run) -> None:
    says(run(model=""), "model=")


@pytest.mark.parametrize("field", ["model", "teacher"])
def test_a_folder_that_is_not_there(run: Run, tmp_path: Path, field: str) -> None:
    missing = str(tmp_path / "none")
    says(run(**{field: missing if field == "model" else {"model": missing}}), missing, "no such folder")


def test_an_empty_folder(run: Run, tmp_path: Path) -> None:
    says(run(model=str(tmp_path)), str(tmp_path), "no config.json")


def test_a_file_for_a_folder(run: Run, copy: Path) -> None:
    says(run(model=str(copy / "config.json")), "no such folder")


def test_a_folder_without_weights(run: Run, copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    says(run(model=str(copy)), str(copy), "no weights", "expected model.safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.pt"])
def test_a_folder_with_pickles_only(run: Run, copy: Path, name: str) -> None:
    (copy / "model.safetensors").rename(copy / name)
    says(run(model=str(copy)), str(copy), "no weights", name, "convert it to safetensors")


def test_shards_without_their_index(run: Run, copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    says(run(model=str(copy)), str(copy), INDEX)


def test_a_teacher_folder_is_checked_as_the_student_s(run: Run, models: Path, tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(models / "larger", tmp_path / "teacher"))
    (teacher / "model.safetensors").unlink()
    says(run(teacher={"model": str(teacher)}), str(teacher), "no weights")


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_a_tensor_that_is_missing_or_misshapen_is_named(run: Run, copy: Path, name: str) -> None:
    shape = tuple(load_file(copy / "model.safetensors")[name].shape)
    wrong = (*shape[:-1], shape[-1] + 1)
    edit(copy, lambda tensors: tensors.update({name: torch.zeros(wrong)}))
    says(run(model=str(copy)), str(copy), name, str(list(wrong)), str(list(shape)))
    edit(copy, lambda tensors: tensors.pop(name))
    says(run(model=str(copy)), str(copy), name, "missing")


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff" * 64, (8).to_bytes(8, "little") + b"not json", b"version https://git-lfs.github.com/spec/v1\n"],
)
def test_a_corrupt_safetensors_header(run: Run, copy: Path, content: bytes) -> None:
    (copy / "model.safetensors").write_bytes(content)
    says(run(model=str(copy)), str(copy), "model.safetensors cannot be read")


def test_a_safetensors_file_cut_short(run: Run, copy: Path) -> None:
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    says(run(model=str(copy)), str(copy), "model.safetensors cannot be read")


def write_index(folder: Path, file_of: Callable[[str], Any]) -> None:
    names = load_file(folder / "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {name: file_of(name) for name in names}}))


def test_an_index_that_names_a_missing_shard(run: Run, copy: Path) -> None:
    write_index(copy, lambda name: "gone.safetensors" if "layers.1" in name else "model.safetensors")
    says(run(model=str(copy)), str(copy), "gone.safetensors", "is missing")


def test_an_index_whose_shard_lacks_a_tensor(run: Run, copy: Path) -> None:
    write_index(copy, lambda _: "model.safetensors")
    edit(copy, lambda tensors: tensors.pop("model.norm.weight"))
    says(run(model=str(copy)), str(copy), "model.norm.weight", "model.safetensors")


def test_an_index_that_leads_out_of_its_folder(run: Run, copy: Path, models: Path) -> None:
    outside = models / "student" / "model.safetensors"
    for path in (
        str(outside),
        f"../{copy.name}/model.safetensors",
        "sub/../model.safetensors",
        f"../../{outside.name}",
        "..",
    ):
        write_index(copy, lambda _, path=path: path)
        says(run(model=str(copy)), str(copy))
    assert outside.is_file()


def test_shards_may_be_links_as_in_the_hub_s_cache(run: Run, copy: Path, tmp_path: Path) -> None:
    write_index(copy, lambda _: "model.safetensors")
    (copy / "model.safetensors").rename(tmp_path / "blob")
    (copy / "model.safetensors").symlink_to(tmp_path / "blob")
    assert check(run(model=str(copy))).student.path == copy


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"weight_map": 5}', b'{"weight_map": {"a": 3}}', b"\xff"]
)
def test_a_broken_index(run: Run, copy: Path, content: bytes) -> None:
    (copy / INDEX).write_bytes(content)
    says(run(model=str(copy)), str(copy), INDEX)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"5", b"{}", b"\xff", b'{"model_type": "no-such"}'])
def test_a_broken_config_json(run: Run, copy: Path, content: bytes) -> None:
    (copy / "config.json").write_bytes(content)
    says(run(model=str(copy)), str(copy), "config.json")


def configure(folder: Path, **fields: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | fields))


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"hidden_size": "64"}, ["hidden_size"]),
        ({"num_attention_heads": None}, ["num_attention_heads"]),
        ({"num_hidden_layers": 3, "layer_types": None}, ["model.layers.2.", "missing"]),
        ({"hidden_size": 48}, ["model.embed_tokens.weight", f"[{VOCAB}, 32]", f"[{VOCAB}, 48]"]),
        ({"vocab_size": VOCAB - 1}, [str(VOCAB - 1)]),
        (
            {"architectures": ["MistralForCausalLM"]},
            ["MistralForCausalLM", "Qwen3ForCausalLM, Qwen3MoeForCausalLM, Qwen2ForCausalLM, LlamaForCausalLM"],
        ),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "supported"]),
        # a family that is supported, and not the one the tensors are of
        (
            {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
            ["model.layers.0.self_attn.q_proj.bias", "missing"],
        ),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, ["norm.weight", "LlamaForCausalLM"]),
        (
            {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]},
            ["model.layers.0.mlp.gate.weight", "missing"],
        ),
        (
            {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "mlp_only_layers": [1]},
            ["dense layers between its experts"],
        ),
        (
            {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 2},
            ["dense layers between its experts"],
        ),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e6}}, ["rope type dynamic"]),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}},
            ["partial rotary"],
        ),
        ({"attention_bias": True}, ["attention bias"]),
        ({"use_sliding_window": True, "sliding_window": 64}, ["sliding-window"]),
        ({"hidden_act": "gelu"}, ["activation gelu"]),
        # names and shapes of such tensors are those of plain weights: loaded as they are they would be noise
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantized"]),
    ],
)
def test_a_model_that_is_not_supported(run: Run, copy: Path, fields: dict[str, Any], parts: list[str]) -> None:
    configure(copy, **fields)
    says(run(model=str(copy)), str(copy), *parts)


# Tokenizers


def test_a_folder_without_a_tokenizer(run: Run, copy: Path) -> None:
    for file in copy.glob("tokenizer*"):
        file.unlink()
    says(run(model=str(copy)), str(copy), "no tokenizer", "tokenizer.json")


@pytest.mark.parametrize("content", ["", "{", "{}"])
def test_a_broken_tokenizer(run: Run, copy: Path, content: str) -> None:
    (copy / "tokenizer.json").write_text(content)
    says(run(model=str(copy)), str(copy), "tokenizer")


def test_a_tokenizer_may_fill_the_vocabulary_to_the_last_row(run: Run, models: Path, tmp_path: Path) -> None:
    tokens = len(ModelFolder(models / "student").tokenizer.get_vocab())
    full, short = (
        str(write_model(tmp_path / str(size), hidden_size=32, num_hidden_layers=1, head_dim=16, vocab_size=size))
        for size in (tokens, tokens - 1)
    )
    assert check(run(model=full)).student.arch.vocab_size == tokens
    says(run(model=short), short, f"token {tokens - 1}", f"vocabulary is {tokens - 2}")


# Run folders


def test_a_run_folder_is_made_when_it_is_claimed(run: Run, tmp_path: Path) -> None:
    config = run(run_dir=str(tmp_path / "a" / "b"))
    check_run_folder(config, resume=False)
    assert not (tmp_path / "a").exists()
    claim(config, resume=False)
    release_lock(tmp_path / "a" / "b")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["config.yaml"]


def test_a_killed_run_s_hidden_states_do_not_outlast_a_resume_on_fewer_ranks(run: Run, tmp_path: Path) -> None:
    """`teacher.hidden_in=disk`; each rank's part may be gigabytes."""
    config = run(run_dir=str(tmp_path))
    claim(config, resume=False)
    release_lock(tmp_path)
    (tmp_path / "hidden" / "7").mkdir(parents=True)
    claim(config, resume=True)
    release_lock(tmp_path)
    assert not (tmp_path / "hidden").exists()


def test_the_launcher_does_not_hold_the_problems_while_the_ranks_run(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Inputs]] = []
    held: list[Inputs | None] = []

    def noted(config: TrainConfig) -> Inputs:
        inputs = check(config)
        made.append(weakref.ref(inputs))
        return inputs

    monkeypatch.setattr(command, "check", noted)
    monkeypatch.setattr(command, "launch", lambda *_: held.append(made[0]()))
    command.run_training(run(run_dir=str(tmp_path / "run")))
    assert held == [None]


@pytest.mark.parametrize("folder", ["/", "", "."])
def test_a_folder_of_everything_is_no_run_folder(run: Run, folder: str) -> None:
    assert "set another one" in user_error(check_run_folder, run(run_dir=folder), resume=False)


def test_a_run_folder_that_holds_a_run_is_not_overwritten(run: Run, tmp_path: Path) -> None:
    config = run(run_dir=str(tmp_path))
    save(config, tmp_path / "config.yaml")
    begun = (tmp_path / "config.yaml").read_text()
    message = user_error(check_run_folder, config, resume=False)
    assert all(part in message for part in (str(tmp_path), "--resume", "run_dir=")), message
    check_run_folder(config, resume=True)
    check_run_folder(run(run_dir=str(tmp_path), checkpoint={"every": 7}), resume=True)
    message = user_error(check_run_folder, run(run_dir=str(tmp_path), seed=5), resume=True)
    assert "seed=0, not 5" in message
    assert (tmp_path / "config.yaml").read_text() == begun


def test_a_run_may_go_on_in_another_layout(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(run(run_dir=str(tmp_path)), tmp_path / "config.yaml")
    changes: dict[str, Any] = {"world_size": 2, "student": {"tp": 2, "recompute": True}, "loss": {"chunk_tokens": 9}}
    claim(run(run_dir=str(tmp_path), **changes), resume=True)
    release_lock(tmp_path)
    line = capsys.readouterr().out
    for part in ("world_size=2 instead of None", "student.tp=2", "student.recompute=True", "loss.chunk_tokens=9"):
        assert part in line
    assert load(tmp_path / "config.yaml").student.tp == 2


def test_another_number_of_ranks_is_said_also_where_the_recipe_leaves_it_open(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = {resume: run(run_dir=str(tmp_path), world_size=8 if resume else 4) for resume in (False, True)}
    for resume, config in ranks.items():
        check_run_folder(run(run_dir=str(tmp_path)), resume)  # before there are ranks
        claim(config, resume=resume)
        release_lock(tmp_path)
        assert ("world_size=8 instead of 4" in capsys.readouterr().out) == resume


def test_settings_of_a_layout_are_settings() -> None:
    assert set(known_keys()) >= _LAYOUT


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["file", "file/below", "x" * 300, "/proc/nothing"])
def test_a_run_folder_that_cannot_be_written(run: Run, tmp_path: Path, name: str, resume: bool) -> None:
    (tmp_path / "file").write_text("")
    folder = str(tmp_path / name)
    message = user_error(check_run_folder, run(run_dir=folder), resume=resume)
    assert all(part in message for part in (folder, "cannot be written", "set another")), message


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_folder_that_cannot_be_entered(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    # by hand: for root, who may run the tests, every folder is open
    for name in ("exists", "mkdir"):
        monkeypatch.setattr(Path, name, refuse)
    message = user_error(check_run_folder, run(run_dir=str(tmp_path / "closed")), resume=resume)
    assert "Permission denied" in message
    assert str(tmp_path / "closed") in message
