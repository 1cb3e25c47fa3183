"""One local rank of the network check: `python -m megatron_trd.doctor.worker ROWS.json SECONDS [--quick]`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from megatron_trd.doctor.network import Place, survey
from megatron_trd.doctor.node import gpu_rows
from megatron_trd.launch import run_rank


def main() -> None:
    """Take part in the check; rank 0 writes the rows of all ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    place = Place.from_environment()
    rows = survey(place, arguments.quick, arguments.seconds, lambda: gpu_rows(place.local_rank, place.local_world))
    if place.rank == 0:
        arguments.rows.write_text(json.dumps([dataclasses.asdict(row) for _, row in rows]))


if __name__ == "__main__":
    run_rank(main)
