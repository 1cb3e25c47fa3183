"""Hugging Face -> Megatron -> Hugging Face: every tensor to the last bit, and every file beside them."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from checkpoint_tools import hf_to_megatron, megatron_to_hf
from megatron_trd.files import SUMS
from megatron_trd.models import dist_checkpoint, loading
from megatron_trd.models.folder import ModelFolder
from tests.checkpoint_tools.folders import (
    assert_same_model,
    companions,
    configure,
    rewrite,
    tensors,
    write_bits,
)
from tests.models import FAMILIES
from tests.weights.bits import same_bits

DTYPES = (torch.float32, torch.bfloat16)
HEADER = 8192  # of a safetensors file: its bytes are on top of a shard's size


def there_and_back(hf: Path, **options: Any) -> Path:
    """The folder that a folder becomes by way of a Megatron checkpoint beside it."""
    hf_to_megatron.convert(hf, hf.parent / "megatron")
    megatron_to_hf.convert(hf.parent / "megatron", hf.parent / "back", **options)
    return hf.parent / "back"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_comes_back_bit_for_bit(tmp_path: Path, family: str, tied: bool, dtype: torch.dtype) -> None:
    hf = write_bits(tmp_path / "hf", family=family, dtype=dtype, tie_word_embeddings=tied)
    back = there_and_back(hf)
    assert_same_model(hf, back)
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= companions(
        back
    ).keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "hf", "megatron"], "nothing is left over"


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """A family with sizes that nothing has to do with each other, but for what `transformers` asks for."""
    family = draw(st.sampled_from(FAMILIES))
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    # Experts of one row or column are stored by transformers 5.19 without that axis.
    experts = {"num_experts": draw(st.integers(2, 5)), "moe_intermediate_size": draw(st.integers(2, 9))}
    return {
        "family": family,
        "dtype": draw(st.sampled_from(DTYPES)),
        "tie_word_embeddings": draw(st.booleans()),
        "vocab_size": draw(st.one_of(st.integers(99, 300), st.sampled_from([127, 128, 129, 256, 257, 1003]))),
        # LlamaConfig wants a multiple of the heads
        "hidden_size": heads * draw(st.integers(1, 5)) if family == "llama" else draw(st.integers(2, 30)),
        "intermediate_size": draw(st.integers(1, 20)),
        "num_hidden_layers": draw(st.integers(1, 12)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 2 * draw(st.integers(1, 5)),
        **(experts if family == "qwen3_moe" else {}),
    }


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(shapes(), st.integers(1, 50_000))
def test_models_of_any_shape_come_back_bit_for_bit(fields: dict[str, Any], limit: int) -> None:
    with tempfile.TemporaryDirectory(prefix="shapes-") as folder:
        hf = write_bits(Path(folder, "hf"), **fields)
        assert_same_model(hf, there_and_back(hf, max_shard_bytes=limit))


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_a_model_in_many_pieces_and_files_is_the_same(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = write_bits(tmp_path / "hf", family=family)
    for module in (dist_checkpoint, loading):
        monkeypatch.setattr(module, "PIECE_BYTES", 1000)  # some rows, and no whole number of them
    monkeypatch.setattr(dist_checkpoint, "_FILE_BYTES", 100_000)
    assert_same_model(hf, there_and_back(hf))
    assert len(list((tmp_path / "megatron").glob("*.distcp"))) > 3


# Shards


@pytest.mark.parametrize("limit", [1, 30_000, 100_000])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_shards_are_as_large_as_asked_and_the_index_says_what_is_in_them(
    tmp_path: Path, family: str, limit: int
) -> None:
    hf = write_bits(tmp_path / "hf", family=family, dtype=torch.bfloat16)
    back = there_and_back(hf, max_shard_bytes=limit)
    assert_same_model(hf, back)
    files = sorted(path.name for path in back.glob("*.safetensors"))
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    assert len(files) > 1
    held = {name: load_file(back / name) for name in files}
    for name, content in held.items():
        assert (back / name).stat().st_size <= limit + HEADER or len(content) == 1, "one tensor alone may be larger"
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {tensor: name for name, content in held.items() for tensor in content}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(hf).values())


def test_a_model_of_several_shards_is_read_as_one_of_one_file(tmp_path: Path) -> None:
    hf = write_bits(tmp_path / "one" / "hf")
    sharded = there_and_back(hf, max_shard_bytes=50_000).rename(tmp_path / "hf")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert_same_model(hf, there_and_back(sharded))


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5kb", 1500), ("2 MiB", 2**21), ("1GiB", 2**30), ("77", 77)],
)
def test_a_shard_size_is_in_the_units_of_the_hub(text: str, size: int) -> None:
    assert megatron_to_hf.parse_size(text) == size


# Dtypes


@pytest.mark.parametrize("tool", ["hf_to_megatron", "megatron_to_hf"])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_cast_is_that_of_torch_and_config_json_says_so(tmp_path: Path, tool: str, key: str) -> None:
    hf = write_bits(tmp_path / "hf", family="qwen2")
    # a NaN's payload is not a value: what becomes of it is up to the processor's instruction
    content = {name: tensor.where(~tensor.isnan(), 1.0) for name, tensor in tensors(hf).items()}
    rewrite(hf, content)
    config = json.loads((hf / "config.json").read_text())
    del config["dtype"]
    (hf / "config.json").write_text(json.dumps(config | {key: "float32"}))  # before transformers 5: torch_dtype

    casts = {"dtype": torch.bfloat16}
    hf_to_megatron.convert(hf, tmp_path / "megatron", **(casts if tool == "hf_to_megatron" else {}))
    megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "back", **(casts if tool == "megatron_to_hf" else {}))
    said = json.loads((tmp_path / "megatron" / "hf" / "config.json").read_text())[key]
    assert said == ("bfloat16" if tool == "hf_to_megatron" else "float32")
    back = tensors(tmp_path / "back")
    assert back.keys() == content.keys()
    assert all(same_bits(back[name], tensor.to(torch.bfloat16)) for name, tensor in content.items())
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config | {key: "bfloat16"}
    assert companions(tmp_path / "back") | {"config.json": b""} == companions(hf) | {"config.json": b""}


def test_bf16_is_exact_in_fp32(tmp_path: Path) -> None:
    hf = write_bits(tmp_path / "hf", dtype=torch.bfloat16)
    rewrite(hf, {name: tensor.where(~tensor.isnan(), 1.0) for name, tensor in tensors(hf).items()})
    hf_to_megatron.convert(hf, tmp_path / "megatron", dtype=torch.float32)
    megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "wide")
    assert all(tensor.dtype == torch.float32 for tensor in tensors(tmp_path / "wide").values())
    megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "back", dtype=torch.bfloat16)
    assert_same_model(hf, tmp_path / "back")


def test_kinds_of_tensors_keep_their_own_dtype(tmp_path: Path) -> None:
    hf = write_bits(tmp_path / "hf", family="qwen3_moe", dtype=torch.bfloat16)
    own = re.compile(r"norm|mlp\.gate\.weight")  # a router in fp32 is what some fine-tuning leaves
    rewrite(hf, {name: tensor.float() if own.search(name) else tensor for name, tensor in tensors(hf).items()})
    back = there_and_back(hf)
    assert_same_model(hf, back)
    assert {tensor.dtype for tensor in tensors(back).values()} == set(DTYPES)


# What a folder may have more than the model


def test_the_head_of_a_tied_model_may_be_stored_too(tmp_path: Path) -> None:
    hf = write_bits(tmp_path / "hf", tie_word_embeddings=True)
    plain = tensors(hf)
    # its bits are any, NaNs among them: a value that is not equal to itself is the same tensor all the same
    rewrite(hf, plain | {"lm_head.weight": plain["model.embed_tokens.weight"].clone()})
    back = tensors(there_and_back(hf))
    assert back.keys() == plain.keys(), "and is written once"
    assert all(same_bits(back[name], tensor) for name, tensor in plain.items())


def test_rotary_buffers_of_old_folders_are_left_out(tmp_path: Path) -> None:
    hf = write_bits(tmp_path / "hf", family="llama")
    plain = tensors(hf)
    rewrite(hf, plain | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(12)})
    back = tensors(there_and_back(hf))
    assert back.keys() == plain.keys()


def test_a_folder_of_weights_alone_is_a_model_too(tmp_path: Path) -> None:
    hf = write_bits(tmp_path / "hf")
    for file in hf.glob("*token*"):
        file.unlink()
    assert_same_model(hf, there_and_back(hf))


def test_a_folder_is_written_into_a_folder_that_is_made_for_it(tmp_path: Path) -> None:
    hf = write_bits(tmp_path / "hf")
    hf_to_megatron.convert(hf, tmp_path / "a" / "b" / "megatron")
    megatron_to_hf.convert(tmp_path / "a" / "b" / "megatron", tmp_path / "c" / "back")
    assert_same_model(hf, tmp_path / "c" / "back")


def test_configuration_of_another_version_comes_back_as_it_was(tmp_path: Path) -> None:
    hf = write_bits(tmp_path / "hf", family="llama")
    configure(hf, a_field_of_tomorrow={"kept": [1, 2.5, None]}, transformers_version="4.40.0")
    assert_same_model(hf, there_and_back(hf))


def test_a_folder_of_the_hub_s_cache_is_links(tmp_path: Path) -> None:
    hf = write_bits(tmp_path / "hf")
    blobs = (tmp_path / "blobs").resolve()
    blobs.mkdir()
    for number, path in enumerate(sorted(hf.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    back = there_and_back(hf)
    assert_same_model(hf, back)
    assert not [path for path in tmp_path.joinpath("megatron").rglob("*") if path.is_symlink()], "copies, not links"


def test_an_averaged_teacher_is_a_choice(tmp_path: Path) -> None:
    student = write_bits(tmp_path / "hf")
    teacher = write_bits(tmp_path / "teacher", seed=5, num_hidden_layers=2)
    hf_to_megatron.convert(student, tmp_path / "step_7")
    shutil.copytree(teacher, tmp_path / "step_7" / "ema")
    megatron_to_hf.convert(tmp_path / "step_7", tmp_path / "model")
    assert_same_model(student, tmp_path / "model")
    megatron_to_hf.convert(tmp_path / "step_7", tmp_path / "ema", weights="ema", max_shard_bytes=50_000)
    assert_same_model(teacher, tmp_path / "ema")


def test_an_optimizer_beside_the_model_is_left_alone(tmp_path: Path) -> None:
    hf = write_bits(tmp_path / "hf")
    hf_to_megatron.convert(hf, tmp_path / "megatron")
    path = tmp_path / "megatron" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    key = "decoder.final_layernorm.weight"
    metadata.state_dict_metadata[f"optimizer.state.exp_avg.{key}"] = metadata.state_dict_metadata[key]
    path.write_bytes(pickle.dumps(metadata))
    (tmp_path / "megatron" / SUMS).unlink()
    megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "back")
    assert_same_model(hf, tmp_path / "back")


@pytest.mark.parametrize(
    "said", [{}, {"dtype": "float32"}, {"torch_dtype": "float16"}, {"dtype": None, "torch_dtype": "float32"}]
)
def test_config_json_says_the_dtype_of_the_weights_whatever_it_said(tmp_path: Path, said: dict[str, Any]) -> None:
    hf = write_bits(tmp_path / "hf", dtype=torch.bfloat16)
    content = tensors(hf)
    rewrite(hf, content | {"model.norm.weight": content["model.norm.weight"].float()})  # of most of them, that is
    config = json.loads((hf / "config.json").read_text())
    del config["dtype"]
    (hf / "config.json").write_text(json.dumps(config | said))
    back = there_and_back(hf)
    expected = config | dict.fromkeys(said or ["dtype"], "bfloat16")
    for folder in (tmp_path / "megatron" / "hf", back):
        assert json.loads((folder / "config.json").read_text()) == expected


def test_further_chat_templates_come_along(tmp_path: Path) -> None:
    hf = write_bits(tmp_path / "hf")
    tokenizer = ModelFolder(hf).tokenizer
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(hf)
    assert [path.name for path in (hf / "additional_chat_templates").iterdir()] == ["tool_use.jinja"]
    back = there_and_back(hf)
    for folder in (tmp_path / "megatron" / "hf", back):
        assert ModelFolder(folder).tokenizer.chat_template == tokenizer.chat_template
    assert "additional_chat_templates/tool_use.jinja" in (back / SUMS).read_text()
