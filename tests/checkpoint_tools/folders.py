"""Model folders of any bits for the conversion tests, and what is in a folder by other means than the product's."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_trd.files import SUMS
from tests.models import write_model
from tests.weights.bits import random_bits, same_bits

# Nothing here is a power of two, no two sizes are equal, and a head is not hidden size / heads wide.
AWKWARD: dict[str, Any] = {
    "vocab_size": 1003,
    "hidden_size": 42,
    "intermediate_size": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 24,
}


def write_bits(folder: Path, *, family: str = "qwen3", dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """A model folder whose tensors are random bits, NaNs and all; returns it."""
    write_model(folder, family=family, dtype=dtype, **(AWKWARD | fields))
    generator = torch.Generator().manual_seed(1)
    rewrite(folder, {name: random_bits(tensor.shape, dtype, generator) for name, tensor in tensors(folder).items()})
    return folder


def rewrite(folder: Path, content: dict[str, Tensor]) -> None:
    """Replace the weights of a folder of one file."""
    save_file(
        {name: tensor.contiguous() for name, tensor in content.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors, whatever its index says."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        content = load_file(file)
        assert not found.keys() & content.keys(), "no tensor is stored twice"
        found |= content
    return found


def companions(folder: Path) -> dict[str, bytes]:
    """Files beside the weights: name -> content."""
    ours = {SUMS, "model.safetensors.index.json"}
    files = [path for path in folder.iterdir() if path.suffix != ".safetensors" and path.name not in ours]
    return {path.name: path.read_bytes() for path in files}


def configure(folder: Path, **fields: Any) -> None:
    """Change fields of a folder's `config.json`."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def assert_same_model(left: Path, right: Path) -> None:
    """Every tensor to the last bit, and every file beside the weights."""
    expected, found = tensors(left), tensors(right)
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    different = [name for name in expected if not same_bits(expected[name], found[name])]
    assert not different, different
    before, after = companions(left), companions(right)
    assert after.keys() == before.keys(), (sorted(before), sorted(after))
    assert after == before, [name for name in before if before[name] != after[name]]


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below a folder, hidden ones too: relative path -> content, None for a folder."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


class Malicious:
    """Leaves a file where a pickle with this in it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def flip(path: Path, place: float = 0.5) -> None:
    """Change one bit of a file, `place` of the way through it."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 4
    path.write_bytes(data)


def cut(path: Path, place: float = 0.5) -> None:
    """Cut a file short."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * place)])
