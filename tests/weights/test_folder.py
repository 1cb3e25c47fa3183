"""Model folders as they are read and written: architecture, names, dtypes and bits, however many files they are in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_trd.models import export
from megatron_trd.models.architecture import read_architecture
from megatron_trd.models.folder import ModelFolder, TensorInfo
from megatron_trd.models.loading import check_folder, folder_source, named_tensors
from tests.data.errors import user_error
from tests.models import FAMILIES, VOCAB, classes, write_model

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 24}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_architecture_is_config_json_s(tmp_path: Path, family: str, tied: bool) -> None:
    folder = ModelFolder(write_model(tmp_path / "model", family=family, tie_word_embeddings=tied, **SMALL))
    arch = read_architecture(folder)
    assert (arch.layers, arch.hidden_size, arch.ffn_size, arch.vocab_size) == (2, 32, 96, VOCAB)
    assert (arch.heads, arch.kv_heads, arch.head_dim) == (4, 2, 24), "head size is not hidden size / heads"
    assert (arch.norm_eps, arch.max_positions, arch.tied) == (folder.config.rms_norm_eps, 512, tied)
    assert arch.has("self_attention.q_layernorm.weight") == family.startswith("qwen3")
    assert arch.has("self_attention.linear_qkv.bias") == (family == "qwen2")
    experts = (4, 2, 32) if family == "qwen3_moe" else (0, 0, 0)
    assert (arch.experts, arch.experts_per_token, arch.expert_ffn_size) == experts
    assert arch.normalised_routing == (family == "qwen3_moe")
    check_folder(folder, arch)


def test_routing_is_normalised_as_config_json_says(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", family="qwen3_moe", norm_topk_prob=False, **SMALL)
    assert not read_architecture(ModelFolder(folder)).normalised_routing


def test_an_absent_head_size_is_hidden_size_over_heads(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", family="qwen2", hidden_size=48, num_attention_heads=6, head_dim=8)
    config = json.loads((folder / "config.json").read_text())
    del config["head_dim"]  # as in Qwen2.5's own config.json
    (folder / "config.json").write_text(json.dumps(config))
    arch = read_architecture(ModelFolder(folder))
    assert arch.head_dim == 8
    check_folder(ModelFolder(folder), arch)


# Rotary frequencies

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500_000.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 512}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1e6},
    "base that is no whole number": {"rope_type": "default", "rope_theta": 12_345.6},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0},
    "llama3": LLAMA3
    | {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "llama3 with factors of its own": LLAMA3
    | {
        "factor": 5.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 9.0,
        "original_max_position_embeddings": 100,
    },
    "yarn": YARN,
    "yarn with factors of its own": YARN
    | {"factor": 3.0, "beta_fast": 20.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 0.5, "truncate": False},
    "yarn that says its scale": YARN | {"factor": 2.0, "attention_factor": 1.25},
}


def write_config(folder: Path, family: str, **fields: Any) -> Any:
    """A folder with `config.json` alone; returns the rotary embedding of the model `transformers` makes of it."""
    config_class, model_class = classes(family)
    sizes = {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 24, "vocab_size": 10}
    config = config_class(num_hidden_layers=1, intermediate_size=8, **sizes, **fields)
    config.architectures = [model_class.__name__]
    config.save_pretrained(folder)
    return model_class(config).model.rotary_emb


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rope", ROPES)
def test_rotary_frequencies_are_those_of_transformers(tmp_path: Path, family: str, rope: str) -> None:
    expected = write_config(tmp_path, family, rope_parameters=ROPES[rope])
    arch = read_architecture(ModelFolder(tmp_path))
    found = torch.tensor(arch.rope_frequencies)
    assert found.dtype == expected.inv_freq.dtype == torch.float32
    assert found.equal(expected.inv_freq), "to the last bit"
    assert arch.rope_scale == expected.attention_scaling
    assert (arch.rope_scale == 1.0) == ("yarn" not in rope)


def test_every_kind_of_context_extension_has_frequencies_of_its_own(tmp_path: Path) -> None:
    found = {}
    for number, rope in enumerate(ROPES.values()):
        write_config(tmp_path / str(number), "llama", rope_parameters=rope)
        found[read_architecture(ModelFolder(tmp_path / str(number))).rope_frequencies] = rope
    assert len(found) == len(ROPES)


def test_the_older_spelling_of_rotary_settings_means_the_same(tmp_path: Path) -> None:
    rope = ROPES["llama3"]
    expected = write_config(tmp_path, "llama", rope_parameters=rope)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    # as the hub's Llama 3 has it
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.tensor(read_architecture(ModelFolder(tmp_path)).rope_frequencies).equal(expected.inv_freq)


@pytest.mark.parametrize("own", [512, 2048], ids=["the model's own", "the extended one"])
def test_the_context_of_yarn_is_the_extended_one(tmp_path: Path, own: int) -> None:
    write_config(tmp_path, "qwen3", rope_parameters=YARN, max_position_embeddings=own)
    assert read_architecture(ModelFolder(tmp_path)).max_positions == 4 * 512


def test_the_context_without_yarn_is_what_the_configuration_says(tmp_path: Path) -> None:
    write_config(tmp_path, "qwen3", rope_parameters=ROPES["llama3"], max_position_embeddings=700)
    assert read_architecture(ModelFolder(tmp_path)).max_positions == 700


# What is refused


@pytest.mark.parametrize(
    ("family", "fields", "parts"),
    [
        ("llama", {"model_type": "mistral", "sliding_window": 8}, ["LlamaForCausalLM", "model_type mistral"]),
        ("llama", {"model_type": "granite", "logits_scaling": 8.0}, ["LlamaForCausalLM", "model_type granite"]),
        ("qwen3", {"model_type": "qwen3_moe"}, ["Qwen3ForCausalLM", "model_type qwen3_moe"]),
        ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 8}}, ["dual chunk attention"]),
        ("llama", {"is_causal": False}, ["not causal"]),
        ("qwen3_moe", {"num_experts_per_tok": 1, "norm_topk_prob": True}, ["one expert a token"]),
        ("llama", {"rope_parameters": YARN | {"factor": None}}, ["None for factor", "a number"]),
        ("qwen3", {"rope_parameters": YARN | {"factor": "8"}}, ["'8' for factor"]),
        ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": None}}, ["None for rope_theta"]),
    ],
)
def test_what_would_be_another_model_is_refused(
    tmp_path: Path, family: str, fields: dict[str, Any], parts: list[str]
) -> None:
    write_config(tmp_path, family)
    read_architecture(ModelFolder(tmp_path))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    message = user_error(read_architecture, ModelFolder(tmp_path))
    assert all(part in message for part in [str(tmp_path), *parts]), message


def test_one_expert_a_token_whose_weight_is_the_router_s_is_supported(tmp_path: Path) -> None:
    write_config(tmp_path, "qwen3_moe", num_experts_per_tok=1, norm_topk_prob=False)
    assert read_architecture(ModelFolder(tmp_path)).experts_per_token == 1


# Tensors


@pytest.mark.parametrize(
    ("family", "dtype", "tied"),
    [(family, torch.float32, False) for family in FAMILIES]
    + [("qwen3", torch.bfloat16, True), ("qwen3_moe", torch.bfloat16, False)],
)
@pytest.mark.parametrize("limit", [1, 20_000, 10**9])
def test_a_written_folder_has_the_bits_of_the_one_it_was_read_from(
    tmp_path: Path, family: str, dtype: torch.dtype, tied: bool, limit: int
) -> None:
    path = write_model(tmp_path / "source", family=family, dtype=dtype, tie_word_embeddings=tied, **SMALL)
    source = ModelFolder(path)
    arch = read_architecture(source)
    (tmp_path / "target").mkdir()
    writer = export.FolderWriter(tmp_path / "target", export.exported_tensors(arch, lambda _: dtype), limit)
    for name, tensor in named_tensors(arch, folder_source(source)):
        half = len(tensor) // 2  # in pieces of rows, too
        for piece in (tensor[:half], tensor[half:]) if half else (tensor,):
            writer.write(name, piece)
    writer.close(source, dtype)

    target = ModelFolder(tmp_path / "target")
    check_folder(target, read_architecture(target))
    original = load_file(path / "model.safetensors")
    assert target.weight_map.keys() == original.keys() == target.names()
    for name, tensor in original.items():
        info = target.info(name)
        assert info is not None
        assert (info.dtype, info.shape, info.nbytes) == (dtype, tuple(tensor.shape), tensor.nbytes)
        assert target.tensor(name).equal(tensor), name
        rows = torch.empty_like(tensor[1:3])
        target.read_rows(name, 1, rows)
        assert rows.equal(tensor[1:3]), name
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
    arch = read_architecture(source)
    tensors = named_tensors(arch, folder_source(source))
    export.write_folder(tmp_path / "target", source, arch, tensors, torch.float32)
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source.path, tmp_path / "target"))
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        assert before(ids).logits.equal(after(ids).logits)
    tokenizers = [ModelFolder(folder).tokenizer for folder in (source.path, tmp_path / "target")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert tokenizers[0].chat_template == tokenizers[1].chat_template


def test_a_tensor_that_is_not_there_has_no_shape(tmp_path: Path) -> None:
    folder = ModelFolder(write_model(tmp_path / "model", tie_word_embeddings=True, **SMALL))
    assert folder.info("lm_head.weight") is None
    info = folder.info("model.norm.weight")
    assert info is not None
    assert info.shape == (32,)


def test_tensors_of_unlike_dtypes_are_each_where_readers_look_for_them(tmp_path: Path) -> None:
    source = ModelFolder(write_model(tmp_path / "source", **SMALL))
    dtypes = {"odd": torch.bfloat16, "single": torch.float32, "last": torch.bfloat16}
    tensors = {name: torch.randn(5, 3).to(dtype) for name, dtype in dtypes.items()}
    (tmp_path / "target").mkdir()
    infos = [TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    writer = export.FolderWriter(tmp_path / "target", infos)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close(source, torch.float32)
    target = ModelFolder(tmp_path / "target")
    for name, tensor in tensors.items():
        assert target.tensor(name).equal(tensor), name
    # 30 bytes of bf16 before fp32: some readers map tensors as they lie, and cannot from there
    for file in target.path.glob("*.safetensors"):
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        assert length % 8 == 0
        header = json.loads(data[8 : 8 + length])
        assert header.pop("__metadata__") == {"format": "pt"}
        for name, entry in header.items():
            assert entry["data_offsets"][0] % tensors[name].element_size() == 0, name
