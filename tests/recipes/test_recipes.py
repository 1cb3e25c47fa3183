"""Every recipe, with every method it can be run with: valid but for the files that are not here; light to import."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from megatron_trd import config as configuration
from megatron_trd.config import TrainConfig, apply_overrides
from megatron_trd.errors import UserError
from megatron_trd.methods import METHODS
from megatron_trd.planning.shapes import PUBLISHED
from megatron_trd.training.checks import check
from recipes import common
from recipes.common import find_recipe, recipe_names
from tests.models import write_tokenizer
from tests.recipes.environments import python, without
from tests.slurm.cluster import PROJECT

QWEN3 = [name for name in recipe_names() if "qwen3" in name]
NODES = {name: 2 if name == "opsd_qwen3_30b_a3b" else 1 for name in QWEN3}
TEACHERS = {
    "opd_qwen3_1_7b": "models/Qwen3-8B",
    "opd_qwen3_4b": "models/Qwen3-8B",
    "opd_qwen3_8b": "models/Qwen3-32B",
}
HEAVY = ("torch", "transformers", "vllm", "megatron", "datasets", "numpy", "pyarrow")


def methods(recipe: str) -> list[str]:
    """A recipe's own method and its dense-KL baselines."""
    family, _, _ = recipe.partition("_")
    return [name for name in METHODS if name.removeprefix("trd-").startswith(family)]


def test_the_recipes_are_those_that_the_page_lists() -> None:
    page = (PROJECT / "docs" / "recipes.md").read_text()
    assert [name for name in recipe_names() if f"| `{name}` |" not in page] == []
    assert len(recipe_names()) == 10


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with all that the recipes read, but for the weights."""
    folder = tmp_path_factory.mktemp("files")
    for name, arch in PUBLISHED.items():
        write_tokenizer(folder / "models" / name)
        fields: dict[str, Any] = {
            "num_hidden_layers": arch.layers,
            "hidden_size": arch.hidden_size,
            "intermediate_size": arch.ffn_size,
            "num_attention_heads": arch.heads,
            "num_key_value_heads": arch.kv_heads,
            "head_dim": arch.head_dim,
            "vocab_size": arch.vocab_size,
            "max_position_embeddings": arch.max_positions,
            "tie_word_embeddings": arch.tied,
            "architectures": [arch.family],
        }
        if arch.experts:
            fields |= {"num_experts": arch.experts, "moe_intermediate_size": arch.expert_ffn_size}
            fields |= {"norm_topk_prob": arch.normalised_routing}
        made = transformers.Qwen3MoeConfig(**fields) if arch.experts else transformers.Qwen3Config(**fields)
        made.save_pretrained(folder / "models" / name)
    data = folder / "data" / "DeepScaleR-Preview-Dataset"
    data.mkdir(parents=True)
    rows = [{"problem": f"What is {index} + 2?", "answer": "x", "solution": "y"} for index in range(4)]
    (data / "deepscaler.json").write_text(json.dumps(rows))  # an array, as the published file
    return folder


@pytest.mark.parametrize("name", QWEN3)
def test_only_weights_are_missing(name: str, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    for method in methods(name):
        config = apply_overrides(find_recipe(name), [f"method={method}", f"world_size={8 * NODES[name]}"])
        with pytest.raises(UserError, match="no weights"):
            check(config)


@pytest.mark.parametrize("name", QWEN3)
def test_a_job_script_asks_for_the_nodes_that_the_recipe_needs(name: str) -> None:
    script = (PROJECT / "slurm" / f"{name}.sh").read_text()
    assert f"#SBATCH --nodes={NODES[name]}\n#SBATCH --gpus-per-node=8\n" in script
    assert 8 * NODES[name] % find_recipe(name).fewest_ranks == 0


@pytest.mark.parametrize("name", QWEN3)
def test_settings_are_the_papers(name: str) -> None:
    config = find_recipe(name)
    assert (config.batch_size, config.data.max_prompt_tokens, config.data.max_reference_tokens) == (16, 2048, 4096)
    assert config.sampler.max_rollout_tokens == config.sampler.max_refinement_tokens == 16384
    assert (config.optimizer.lr, config.optimizer.warmup_fraction, config.optimizer.weight_decay) == (5e-6, 0.1, 0.005)
    assert config.loss.temperature == config.sampler.temperature == 1.0
    assert config.steps == 40315 // config.batch_size
    assert (config.method, config.run_dir) == (f"trd-{name.partition('_')[0]}", f"runs/{name}")
    assert config.teacher.model == TEACHERS.get(name)


@pytest.mark.parametrize("name", sorted(set(recipe_names()) - set(QWEN3) - {"opsd_smollm2_gsm8k"}))
def test_the_embedded_recipes_are_complete(name: str) -> None:
    for method in methods(name):
        check(apply_overrides(find_recipe(name), [f"method={method}"]))


def settings(path: Path) -> Iterator[tuple[type, str, Any]]:
    """Class, key and constant of each setting that a recipe's file states."""
    for node in ast.walk(ast.parse(path.read_text())):
        name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
        for keyword in node.keywords if isinstance(node, ast.Call) and name.endswith("Config") else ():
            if keyword.arg and isinstance(keyword.value, ast.Constant):
                yield getattr(configuration, name), keyword.arg, keyword.value.value


def test_no_recipe_repeats_a_default() -> None:
    found = []
    for path in Path(inspect.getfile(common)).parent.glob("*.py"):
        for cls, key, value in settings(path):
            default = next(field.default for field in dataclasses.fields(cls) if field.name == key)
            found += [f"{path.name}: {key}={value}"] if value == default else []
    assert found == []


def test_a_run_s_own_file_means_the_folder_that_it_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run folder was moved, or its `run_dir` is relative to another directory than this one."""
    run = tmp_path / "moved"
    run.mkdir()
    configuration.save(find_recipe("opsd_demo", ["run_dir=runs/before"]), run / "config.yaml")
    assert find_recipe(str(run / "config.yaml")).run_dir == "runs/before", "a file of the user's, not of a run"
    (run / "metrics.jsonl").touch()
    assert find_recipe(str(run / "config.yaml")).run_dir == str(run)
    assert find_recipe(str(run / "config.yaml"), ["run_dir=next"]).run_dir == "next"
    monkeypatch.chdir(tmp_path)
    assert find_recipe("moved/config.yaml").run_dir == "moved"


def test_recipes_need_neither_torch_nor_nemo_run(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom recipes.common import find_recipe, recipe_names\n"
        "configs = [find_recipe(name) for name in recipe_names()]\n"
        f"print(len(configs), [name for name in {(*HEAVY, 'nemo_run')} if name in sys.modules])"
    )
    done = python(without(tmp_path, *HEAVY, "nemo_run"), tmp_path, "-c", script)
    assert done.stdout == f"{len(recipe_names())} []\n", done.stderr


def test_as_a_program_a_recipe_says_that_it_needs_nemo_run(tmp_path: Path) -> None:
    done = python(without(tmp_path, "nemo_run"), tmp_path, "-m", "recipes.opsd_demo", "steps=2")
    assert done.returncode == 2
    assert done.stderr.startswith("recipes.opsd_demo: needs nemo-run")
    assert len(done.stderr.splitlines()) == 1


def test_a_recipe_is_a_configuration() -> None:
    assert all(isinstance(find_recipe(name), TrainConfig) for name in recipe_names())
