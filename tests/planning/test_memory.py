"""Memory against what the real engine allocates and what benchmarks measured; which rank is fullest, and what is said
of a layout that does not fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_trd.config import from_dict
from megatron_trd.planning import memory, sizes
from megatron_trd.planning.devices import LOCAL_LAYERS, TRANSFORMER_ENGINE
from megatron_trd.planning.forecast import forecast
from tests.distributed import run_ranks
from tests.models import write_model
from tests.planning.cases import make

GIB = 2**30
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def allocated(rank: int, world: int, model: str, students: list[dict[str, Any]]) -> list[tuple[int, int, int]]:
    """Rank function: bytes of weights, of gradients and of optimizer state after a step, for each layout."""
    import torch
    from megatron.core import parallel_state

    from megatron_trd import platform
    from megatron_trd.engines.student import StudentEngine
    from megatron_trd.models.model import open_model
    from megatron_trd.parallel.grid import student_grid

    platform.current().set_up()
    found = []
    for settings in students:
        config = from_dict({"model": model} | settings, "test")
        grid = student_grid(config.student.tp, config.student.pp, config.student.ep, seed=0)
        student = StudentEngine(config, open_model(model), grid)
        with platform.current().megatron():
            student.optimizer.step()  # which makes its state
        buffers = [*student.model.buffers, *student.model.expert_parallel_buffers]
        states: list[torch.Tensor] = [
            value
            for part in getattr(student.optimizer, "chained_optimizers", [student.optimizer])
            for state in part.optimizer.state.values()
            for name, value in state.items()
            if name != "step"
        ]
        found.append(
            (
                sum(parameter.nbytes for parameter in student.model.parameters()),
                sum(buffer.grad_data.nbytes for buffer in buffers),
                sum(tensor.nbytes for tensor in states),
            )
        )
        parallel_state.destroy_model_parallel()
    return found


@pytest.mark.parametrize(
    ("family", "students"),
    [
        ("qwen3", [{"tp": 2}, {"pp": 2}, {"tp": 1}, {"tp": 2, "distributed_optimizer": False}]),
        ("qwen3_moe", [{"ep": 2}, {"tp": 2, "ep": 2, "sequence_parallel": True}, {"ep": 4, "pp": 1}]),
    ],
)
def test_weights_gradients_and_optimizer_are_what_the_student_engine_allocates(
    tmp_path: Path, family: str, students: list[dict[str, Any]]
) -> None:
    # Every size a multiple of 128 x replicas: megatron-core then pads nothing.
    shape = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 128, "tie_word_embeddings": family == "qwen3"}
    if family == "qwen3_moe":
        shape |= {"moe_intermediate_size": 128}
    model = write_model(tmp_path / "model", family=family, num_hidden_layers=2, max_position_embeddings=40960, **shape)
    world = 4
    runs = [{"student": settings, "lora": {"rank": rank}} for settings in students for rank in (0, 128)]
    ranks = run_ranks(allocated, world, str(model), runs)
    for index, settings in enumerate(runs):
        case = make({"model": str(model)} | settings, gpu="cpu", gpus_per_node=world)
        for rank in range(world):
            _, stage, _ = case.student_layout.coordinates(rank)
            own = sizes.of_rank(case.student, case.student_layout, stage, with_head=True).total
            trained = memory.trained_values(case, stage)
            weights = own + trained.total if settings["lora"]["rank"] else own
            state = memory.optimizer_values(case, trained) * case.stack.optimizer_bytes
            assert ranks[rank][index] == (weights * 4, trained.total * 4, state), (settings, rank)


def benchmark_rows() -> list[tuple[str, int, int, int, float, float]]:
    """(file, tokens, columns of a rank, ranks, MiB, MiB of a chunk) of every measurement of ours."""
    rows = []
    for path in sorted(RESULTS.glob("loss_cpu*.md")):
        text = path.read_text()
        shape = re.search(r"([\d,]+) tokens, hidden [\d,]+, vocabulary ([\d,]+), TP (\d)", text)
        for line in text.splitlines():
            cells = [cell.strip().replace(",", "") for cell in line.strip("|").split("|")]
            if cells[0].startswith("ours ") and shape:
                tokens, vocabulary, tp = (int(number.replace(",", "")) for number in shape.groups())
                memory_used, in_chunks = float(cells[4]), float(cells[5])
            elif len(cells) == 9 and cells[0].isdigit():
                tokens, vocabulary, tp = map(int, cells[:3])
                memory_used, in_chunks = float(cells[7]), float(cells[8])
            else:
                continue
            rows.append((path.name, tokens, vocabulary // tp, tp, memory_used, memory_used / in_chunks))
    return rows


def test_loss_chunks_are_within_a_fifth_of_what_was_measured() -> None:
    rows = benchmark_rows()
    assert len(rows) > 15
    for file, tokens, width, tp, measured, chunk in rows:
        chunk_tokens = round(1.01 * chunk * 2**20 / (4 * width))  # the table's quotient is rounded
        expected = memory.loss_chunks(tokens, width, chunk_tokens, tp, LOCAL_LAYERS) / 2**20
        assert expected == pytest.approx(measured, rel=1 / 5), (file, tokens, width)


def test_parts_are_the_arithmetic_of_the_design() -> None:
    """Qwen3-8B on eight GPUs at TP 2, as DESIGN's page has it: 16 GB of weights, 98 of optimizer, 33 of gradients."""
    settings = {"student": {"tp": 2, "sequence_parallel": True, "recompute": True}}
    train = memory.by_phase(make(settings))["train"]
    assert train["student weights"] == pytest.approx(16.4e9 / 2, rel=0.01)
    assert train["gradients"] == pytest.approx(33e9 / 2, rel=0.01)
    assert train["optimizer"] == pytest.approx(98e9 / 8, rel=0.01)
    assert train["activations"] > 36 * 18432 * 4096 / 2 * 2  # every layer's input, halved by sequence parallelism


def test_the_readme_s_own_run_fits_a_node() -> None:
    readme = (RESULTS.parents[1] / "README.md").read_text()
    [text] = re.findall(r"```yaml\n(model:.*?)```", readme, flags=re.DOTALL)
    found = forecast(make(yaml.safe_load(text) | {"model": "models/Qwen3-8B"}))
    assert found.fits, found.worst


def test_each_phase_shows_its_fullest_rank() -> None:
    """Of four stages, the first has the most micro-batches in flight, the last has the loss."""
    settings: dict[str, Any] = {"student": {"pp": 4, "recompute": True}, "teacher": {"weights": "live"}}
    case = make(settings)
    assert len(case.places) == 4
    assert memory.by_phase(case)["train"]["loss"] == 0
    large = memory.by_phase(make(settings | {"loss": {"chunk_tokens": 16384}}))["train"]
    assert large["loss"] > 2 * 16384 * 151936 * 4


def test_one_engine_leaves_its_memory_to_training_and_two_do_not() -> None:
    live: dict[str, Any] = {"teacher": {"weights": "live"}}
    two: dict[str, Any] = {"one_engine": False}
    for alone in (make(live), make({})):
        asleep = memory.by_phase(alone)
        assert "KV cache" not in asleep["train"]
        assert asleep["sample"]["KV cache"] > 0
    for awake in (make({"sampler": two}), make(live | {"sampler": {"sleep": False}})):
        found = memory.by_phase(awake)
        assert found["train"]["KV cache"] == found["sample"]["KV cache"] > 0
    on_cpu = memory.by_phase(make({"sampler": two | {"host_kv_cache_gib": 2}}, gpu="cpu", gpus_per_node=1))
    assert on_cpu["train"]["KV cache"] == 2 * 2 * GIB  # two engines, awake


def test_weights_that_are_changed_amid_the_sampling_take_room_there() -> None:
    settings: dict[str, Any] = {"student": {"tp": 4}, "teacher": {"tp": 4, "offload": True}}
    apart, swapped = (
        memory.by_phase(make(settings | {"sampler": {"one_engine": one}}))["sample"] for one in (False, True)
    )
    assert "refit buckets" not in apart
    assert swapped["refit buckets"] > 0
    assert apart["teacher weights"] == 0 < swapped["teacher weights"]


def test_a_live_teacher_takes_no_memory_of_its_own() -> None:
    case = make({"teacher": {"weights": "live"}, "student": {"tp": 4}, "sampler": {"tp": 4}})
    assert memory.by_phase(case)["teacher"]["teacher weights"] == 0
    assert len(case.engines) == 1


ADAPTERS = {"lora": {"rank": 64}}
CUT: dict[str, Any] = {"student": {"tp": 4, "sequence_parallel": True, "recompute": True}, "teacher": {"tp": 4}}


@pytest.mark.parametrize("pp", [1, 2])
def test_adapters_alone_have_gradients_and_optimizer_state(pp: int) -> None:
    """Qwen3-8B at TP 4 on eight GPUs: two replicas, or one of two stages. Its embedding and head are equally large."""
    student, settings = CUT["student"] | {"pp": pp}, {"teacher": {"tp": 4}}
    plain, adapted = (memory.by_phase(make(settings | {"student": student} | lora)) for lora in ({}, ADAPTERS))
    adapters = 36 * 2_588_672 / pp
    for phase in memory.PHASES:
        assert adapted[phase]["student weights"] - plain[phase]["student weights"] == 2 * adapters
        assert adapted[phase]["gradients"] == 4 * adapters
        assert adapted[phase]["optimizer"] == 12 * adapters / (2 / pp)
    whole = memory.by_phase(make(CUT | ADAPTERS | {"student": CUT["student"] | {"distributed_optimizer": False}}))
    assert whole["train"]["optimizer"] == 12 * 36 * 2_588_672


def test_adapters_add_their_activations_to_every_layer_s() -> None:
    plain, adapted = (memory.by_phase(make({"student": {"tp": 4}} | lora))["train"] for lora in ({}, ADAPTERS))
    assert plain["loss"] == adapted["loss"] > plain["activations"] / 36 * 2  # which has room for backward's own tensors
    assert adapted["activations"] - plain["activations"] == pytest.approx(36 * 7 * 64 * 2 * (2048 + 16384))


def test_experts_have_no_gradients_beside_adapters() -> None:
    settings = {"model": "models/Qwen3-30B-A3B", "student": {"ep": 8}, "sampler": {"tp": 4}}
    train = memory.by_phase(make(settings | ADAPTERS))["train"]
    adapters = 48 * 64 * ((4096 + 2048) + 2 * (512 + 2048) + (2048 + 4096))
    assert (train["gradients"], train["optimizer"]) == (4 * adapters, 12 * adapters / 8)


def test_a_frozen_teacher_without_adapters_is_the_student() -> None:
    """Its own grid is ignored, it has the student's sequence parallelism, but it refines with weights of its own."""
    settings = CUT | {"teacher": {"tp": 3, "pp": 2}} | ADAPTERS
    case = make(settings)
    live = make(settings | {"teacher": {"weights": "live"}})
    assert case.teacher_layout == case.student_layout
    assert memory.by_phase(case)["teacher"] == memory.by_phase(live)["teacher"]
    assert memory.by_phase(case)["teacher"]["teacher weights"] == 0
    assert memory.by_phase(case)["sample"]["refit buckets"] > 0
    assert "refit buckets" not in memory.by_phase(live)["sample"]
    for other in ({"weights": "ema"}, {"model": "models/Qwen3-8B"}):
        with_own, without = (
            memory.by_phase(make(CUT | {"teacher": {"tp": 4} | other} | lora)) for lora in (ADAPTERS, {})
        )
        assert with_own["teacher"]["teacher weights"] == without["teacher"]["teacher weights"] > 0


@pytest.mark.parametrize(("model", "largest"), [("8B", 2 * 12288 * 4096), ("30B-A3B", (4096 + 2 * 512) * 2048)])
def test_a_refit_merges_one_parameter_at_a_time(model: str, largest: int) -> None:
    settings: dict[str, Any] = {"model": f"models/Qwen3-{model}", "sampler": {"tp": 4}}
    adapted = memory.by_phase(make(settings | ADAPTERS))
    assert adapted["refit"]["merged parameter"] == 2 * 4 * largest
    assert not any("merged parameter" in adapted[phase] for phase in ("sample", "teacher", "train"))
    assert "merged parameter" not in memory.by_phase(make(settings))["refit"]


def test_the_loss_has_no_gradient_of_a_frozen_head() -> None:
    settings = {"loss": {"chunk_tokens": 128}}  # so few that the gradient is larger than the logits
    hidden = 16384 * (2 * 4096 + (4 + 2 + 2) * 4096)  # the teacher's; the student's and its gradient twice
    trained, frozen = (memory.by_phase(make(settings | lora))["train"]["loss"] for lora in ({}, ADAPTERS))
    assert trained == 151_936 * 4096 * 2 + hidden
    assert frozen == memory.loss_chunks(16384, 151_936, 128, 1, TRANSFORMER_ENGINE) + hidden < trained


def test_an_average_is_kept_in_float32_beside_the_weights() -> None:
    frozen, averaged = (memory.by_phase(make({"teacher": {"weights": weights}})) for weights in ("frozen", "ema"))
    for phase in memory.PHASES:
        assert averaged[phase]["teacher weights"] == 3 * frozen[phase]["teacher weights"]


def test_a_teacher_beside_the_sampler_takes_its_memory_there() -> None:
    alone, beside = (memory.by_phase(make({"overlap": overlap})) for overlap in ("none", "teacher"))
    assert "activations" not in alone["sample"]
    assert beside["sample"]["activations"] == alone["teacher"]["activations"]
    assert beside["sample"]["teacher's hidden states"] > 0


def test_what_does_not_fit_is_named_with_its_phase_and_size() -> None:
    found = forecast(make({"student": {"tp": 1}, "sampler": {"tp": 4, "memory_fraction": 0.2}}))
    assert not found.fits
    assert found.worst.phase == "train"
    assert found.worst.why.startswith("activations 9")
    train = sum(found.memory["train"].values())
    assert found.worst.over == pytest.approx(train - 79.1 * GIB)


def test_an_engine_without_room_for_the_longest_sequence_does_not_fit() -> None:
    """16.4 GB of weights at TP 1 leave no 5.7 GB of a quarter of a GPU."""
    settings: dict[str, Any] = {
        "student": {"tp": 4, "sequence_parallel": True, "recompute": True},
        "teacher": {"tp": 4},
    }
    small = forecast(make(settings | {"sampler": {"tp": 1, "memory_fraction": 0.25}}))
    assert [(each.phase, "keys and values" in each.why) for each in small.shortfalls] == [("sample", True)]
    assert forecast(make(settings | {"sampler": {"tp": 2, "memory_fraction": 0.25}})).fits


@pytest.mark.parametrize("teacher", [{"tp": 4}, {"weights": "live"}])
def test_the_largest_fraction_fits_and_the_next_does_not(teacher: dict[str, Any]) -> None:
    student = {"tp": 4, "sequence_parallel": True, "recompute": True}
    fraction = memory.largest_fraction(make({"student": student, "teacher": teacher, "sampler": {"tp": 4}}))
    for step, fits in ((0.0, True), (0.05, False)):
        sampler = {"tp": 4, "memory_fraction": fraction + step}
        assert forecast(make({"student": student, "teacher": teacher, "sampler": sampler})).fits is fits
