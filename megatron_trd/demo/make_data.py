"""Writes the demo's problems: `python -m megatron_trd.demo.make_data`. The files it wrote are in `data/`."""

from __future__ import annotations

from megatron_trd.demo import TEST_PROBLEMS, TRAIN_PROBLEMS
from megatron_trd.demo.task import generate, write_jsonl

TRAIN_COUNT, TEST_COUNT = 2048, 128
# Not a seed of the models' own training problems; the test split never meets the train split whatever the seed.
SEED = 1_000


def main() -> None:
    """Write both files."""
    TRAIN_PROBLEMS.parent.mkdir(exist_ok=True)
    write_jsonl(TRAIN_PROBLEMS, generate(TRAIN_COUNT, SEED, "train"))
    write_jsonl(TEST_PROBLEMS, generate(TEST_COUNT, SEED, "test"))


if __name__ == "__main__":
    main()
