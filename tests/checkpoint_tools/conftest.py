"""What every test of the commands asks for: copies of its module's `whole` models, and the commands themselves."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.checkpoint_tools.commands import Tool, in_process


@pytest.fixture
def hf(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole / "hf", tmp_path / "hf")


@pytest.fixture
def megatron(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole / "megatron", tmp_path / "megatron")


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tool:
    return in_process(monkeypatch, capsys)
