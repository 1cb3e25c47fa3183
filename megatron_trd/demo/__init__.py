"""The embedded world: a task, two small models trained on it, and the script that made them."""

from pathlib import Path

_FOLDER = Path(__file__).parent

STUDENT = _FOLDER / "models" / "student"
TEACHER = _FOLDER / "models" / "teacher"  # for TRD-OPD: wider, deeper, same vocabulary
TRAIN_PROBLEMS = _FOLDER / "data" / "train.jsonl"
TEST_PROBLEMS = _FOLDER / "data" / "test.jsonl"
