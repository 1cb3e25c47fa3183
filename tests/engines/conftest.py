"""Models that several of these tests take."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import write_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "untied": write_model(folder / "untied", seed=0),
        "tied": write_model(folder / "tied", seed=1, tie_word_embeddings=True),
        "large": write_model(folder / "large", seed=2, hidden_size=128),
        "llama": write_model(folder / "llama", family="llama", seed=3),
        "qwen2": write_model(folder / "qwen2", family="qwen2", seed=4),
        "experts": write_model(folder / "experts", family="qwen3_moe", seed=5),
    }
