"""Code shared by recipes: lookup, the common part of the paper's runs, and running one as a program."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path

from megatron_trd import config as configuration
from megatron_trd.config import (
    CheckpointConfig,
    DataConfig,
    SamplerConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from megatron_trd.errors import UserError, in_one_line
from megatron_trd.reporting.metrics import METRICS_FILE

_FOLDER = Path(__file__).parent
_NO_RECIPES = ("__init__", "common")

OF_TWO_ENGINES = 0.2  # share of a GPU's memory for each of two vLLM engines, neither of which can sleep


def recipe_names() -> list[str]:
    """Names of all recipes."""
    return sorted(path.stem for path in _FOLDER.glob("*.py") if path.stem not in _NO_RECIPES)


def find_recipe(name: str, overrides: Iterable[str] = ()) -> TrainConfig:
    """Configuration of a recipe, by its name, its file in recipes/, or a YAML file, with `key=value` overrides.

    Raises `UserError`.
    """
    return configuration.apply_overrides(_find(name), overrides)


def _find(name: str) -> TrainConfig:
    path = Path(name)
    if name.endswith((".yaml", ".yml")):
        config = configuration.load(path)
        # A run's own file: what it says of the folder may be old, if it was moved, or relative to another directory.
        of_run = path.name == "config.yaml" and (path.parent / METRICS_FILE).is_file()
        return dataclasses.replace(config, run_dir=str(path.parent)) if of_run else config
    stem = path.stem
    elsewhere = path.parent != Path() and path.parent.resolve() != _FOLDER.resolve()
    if stem not in recipe_names() or elsewhere:
        written = path / "config.yaml"
        hint = f"{written}, " if written.is_file() else ""
        raise UserError(
            f"recipe '{name}' does not exist; give {hint}a YAML file, or one of recipes/: {', '.join(recipe_names())}"
        )
    config = importlib.import_module(f"recipes.{stem}").recipe()
    assert isinstance(config, TrainConfig)
    return config


def paper_run(name: str, model: str, *, tp: int) -> TrainConfig:
    """The paper's self-distillation of a Qwen3 model on DeepScaleR; student, frozen teacher and sampler at TP `tp`.

    Models and data are folders of the working directory, since compute nodes often have no network; docs/recipes.md
    says how to get them. Settings not given here have the defaults of megatron_trd/config.py, which are the paper's:
    2,048 tokens per prompt, 4,096 per reference, 16,384 per response, 16 problems per step, AdamW at 5e-6 after 10 % of
    warm-up. The paper trains LoRA adapters by default (`lora.rank=64`); here all weights are trained, its other option.

    Layouts are ours, for training sequences of up to 38,912 tokens on 80 GB cards (85e9 bytes) that hold all of
    Megatron's memory at once. By arithmetic, for the 8 G parameters of Qwen3-8B at TP 4 on 8 GPUs, 1e9 bytes per GPU:

        weights 2 B and gradients 4 B a parameter, over TP          12.3
        master weights and Adam's moments 12 B, over all GPUs       12.3
        frozen teacher 2 B, over TP; its output head again           4.4
        36 activations of [38912 / TP, 4096], kept to recompute      2.9
        one layer's own, the teacher's hidden states, the loss    about 5
        a vLLM engine, 0.3 of the memory, asleep during training    25.5
        transfer of weights to it                                    2.8

    That is 57 of 85 during sampling and 37 in training. In the engine's 25.5, weights take 4.1, which leaves room for
    keys and values (147 KB per token, over TP) of some 500,000 tokens: more than the 8 longest sequences, and it works
    on 8 of a step's 16 problems. It has the student's weights for rollouts, then the teacher's.
    """
    return TrainConfig(
        model=f"models/{model}",
        run_dir=f"runs/{name}",
        steps=2519,  # one pass (paper) over the 40,315 problems
        # Ours: sequences of this length do not fit without sequence parallelism and recomputation.
        student=StudentConfig(tp=tp, sequence_parallel=tp > 1, recompute=True),
        teacher=TeacherConfig(tp=tp),
        sampler=SamplerConfig(tp=tp),
        # The paper's mathematics data, whose fields have our names. Many problems have no solution to show a teacher.
        data=DataConfig(path="data/DeepScaleR-Preview-Dataset", missing_reference="drop"),
        checkpoint=CheckpointConfig(every=50),  # ours: the most steps lost if a node dies without warning
    )


def run_as_program(file: str) -> None:
    """`python -m recipes.NAME …`: nemo-run's command line for the recipe in `file`."""
    name = Path(file).stem

    def run() -> None:
        if importlib.util.find_spec("nemo_run") is None:
            raise UserError(
                f"needs nemo-run (pip install -e '.[launch]' in this project); without it: megatron-trd train {name}"
            )
        from recipes import nemo

        nemo.main(name)

    in_one_line(run, f"recipes.{name}")
