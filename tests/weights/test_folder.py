"""Model folders as they are read and written: names, dtypes and bits, however many files they are in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_trd.models import export
from megatron_trd.models.architecture import read_architecture
from megatron_trd.models.folder import ModelFolder
from megatron_trd.models.loading import check_folder, folder_source, named_tensors
from tests.models import VOCAB, write_model

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 24}


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_architecture_is_config_json_s(tmp_path: Path, family: str, tied: bool) -> None:
    folder = ModelFolder(write_model(tmp_path / "model", family=family, tie_word_embeddings=tied, **SMALL))
    arch = read_architecture(folder)
    assert (arch.layers, arch.hidden_size, arch.ffn_size, arch.vocab_size) == (2, 32, 96, VOCAB)
    assert (arch.heads, arch.kv_heads, arch.head_dim) == (4, 2, 24), "head size is not hidden size / heads"
    assert (arch.rope_theta, arch.norm_eps, arch.max_positions) == (1e6, folder.config.rms_norm_eps, 512)
    assert (arch.tied, arch.qk_norm) == (tied, family == "qwen3")
    check_folder(folder, arch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("limit", [1, 20_000, 10**9])
def test_a_written_folder_has_the_bits_of_the_one_it_was_read_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tied: bool, limit: int
) -> None:
    monkeypatch.setattr(export, "MAX_SHARD_BYTES", limit)
    source = ModelFolder(write_model(tmp_path / "source", dtype=dtype, tie_word_embeddings=tied, **SMALL))
    arch = read_architecture(source)
    export.write_folder(tmp_path / "target", source, named_tensors(arch, folder_source(source)))

    target = ModelFolder(tmp_path / "target")
    check_folder(target, read_architecture(target))
    original = load_file(source.path / "model.safetensors")
    assert target.weight_map.keys() == original.keys()
    for name, tensor in original.items():
        assert target.dtype(name) == dtype
        assert target.shape(name) == tuple(tensor.shape)
        assert target.tensor(name).equal(tensor), name
    files = set(target.weight_map.values())
    sizes = [(target.path / file).stat().st_size for file in files]
    assert len(files) == (len(original) if limit == 1 else 1 if limit == 10**9 else len(files))
    if limit == 20_000:
        assert 1 < len(files) < len(original)
        assert max(sizes) < limit + 4096, "a file's header comes on top"
        total = sum(tensor.nbytes for tensor in original.values())
        assert len(files) <= 2 * total / limit + 1, "files are filled before the next is begun"
    index = json.loads((target.path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in original.values())


def test_a_written_folder_is_a_model_for_transformers_with_its_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = ModelFolder(write_model(tmp_path / "source", **SMALL))
    export.write_folder(tmp_path / "target", source, named_tensors(read_architecture(source), folder_source(source)))
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source.path, tmp_path / "target"))
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        assert before(ids).logits.equal(after(ids).logits)
    tokenizers = [ModelFolder(folder).tokenizer for folder in (source.path, tmp_path / "target")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert tokenizers[0].chat_template == tokenizers[1].chat_template


def test_a_tensor_that_is_not_there_has_no_shape(tmp_path: Path) -> None:
    folder = ModelFolder(write_model(tmp_path / "model", tie_word_embeddings=True, **SMALL))
    assert folder.shape("lm_head.weight") is None
    assert folder.shape("model.norm.weight") == (32,)
