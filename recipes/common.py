"""What recipes share: how one is found."""

from __future__ import annotations

import importlib
from pathlib import Path

from megatron_trd import config as configuration
from megatron_trd.config import TrainConfig
from megatron_trd.errors import UserError

_FOLDER = Path(__file__).parent


def recipe_names() -> list[str]:
    """Names of all recipes."""
    return sorted(path.stem for path in _FOLDER.glob("*.py") if path.stem not in ("__init__", "common"))


def find_recipe(name: str) -> TrainConfig:
    """Configuration of a recipe: its name, its file in recipes/, or a YAML file. Raises `UserError`."""
    if name.endswith((".yaml", ".yml")):
        return configuration.load(Path(name))
    path = Path(name)
    stem = path.stem
    elsewhere = path.parent != Path() and path.parent.resolve() != _FOLDER.resolve()
    if stem not in recipe_names() or elsewhere:
        raise UserError(
            f"recipe '{name}' does not exist; give a YAML file, or one of recipes/: {', '.join(recipe_names())}"
        )
    config = importlib.import_module(f"recipes.{stem}").recipe()
    assert isinstance(config, TrainConfig)
    return config
