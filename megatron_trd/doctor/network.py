"""The network between the ranks of a job: which ranks are present, and how fast an all-reduce is.

Ranks meet at a store that rank 0 (or torchrun) serves. It records which ranks have arrived, and at the end carries each
rank's rows to rank 0, so that ranks that cannot do a collective still report that. Every wait has a timeout.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_trd import platform
from megatron_trd.doctor.rows import Row
from megatron_trd.doctor.waiting import first_line, within
from megatron_trd.errors import UserError

CHECK = "all-reduce"
_NEEDED = "every rank"
_BYTES = (
    64 * 2**20
)  # of the message that bandwidth is measured with: latency matters little, and slow networks manage it
_REPEATS, _SMALL_REPEATS = 3, 20
_CHECKS = 4  # all checks of a node may take this many times the limit for one file system or data set
_CURE = "see docs/troubleshooting.md, 'The network between ranks'"


@dataclass(frozen=True)
class Place:
    """Position of this process among the ranks of the job."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    node: str

    @classmethod
    def from_environment(cls) -> Place:
        """The place that torchrun, or a script around srun, has set. Raises `UserError`."""
        place = cls(
            rank=_number("RANK"),
            world=_number("WORLD_SIZE"),
            local_rank=_number("LOCAL_RANK", "0"),
            local_world=max(1, _number("LOCAL_WORLD_SIZE", "1")),
            node=node_name(),
        )
        if place.rank >= place.world:
            raise UserError(f"RANK={place.rank} is not one of WORLD_SIZE={place.world} ranks")
        return place

    @property
    def nodes(self) -> int:
        return max(1, self.world // self.local_world)


def node_name() -> str:
    """This node's name according to SLURM, or else the machine itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _variable(name: str, default: str = "") -> str:
    value = os.environ.get(name, default)
    if not value:
        raise UserError(f"{name} is not set: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT go together, as of torchrun")
    return value


def _number(name: str, default: str = "") -> int:
    text = _variable(name, default)
    if not text.isdecimal():
        raise UserError(f"{name}={text} in the environment is not a number")
    return int(text)


class Meeting:
    """This rank's connection to the others. Its methods raise `DistError` when the store is gone."""

    def __init__(self, place: Place, seconds: float) -> None:
        """`seconds`: how long another rank may take to answer. Raises `UserError` if rank 0's address is unknown."""
        self.place, self.seconds = place, seconds
        store = dist.TCPStore(  # type: ignore[attr-defined]
            _variable("MASTER_ADDR"),
            _number("MASTER_PORT"),
            is_master=place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            wait_for_workers=False,
            timeout=timedelta(seconds=seconds),
        )
        self._store = dist.PrefixStore("doctor", store)  # type: ignore[attr-defined]

    def missing(self) -> list[int]:
        """Ranks that have not arrived in time; the same list on all ranks that have."""
        self._store.set(f"node/{self.place.rank}", self.place.node)
        if self.place.rank == 0:
            self._store.set("missing", json.dumps(self._without("node", range(self.place.world), self.seconds)))
        self._store.wait(["missing"], timedelta(seconds=2 * self.seconds))
        missing: list[int] = json.loads(self._store.get("missing"))
        return missing

    def measure(self, quick: bool) -> dict[str, Any]:
        """`_all_reduce`, or {"problem": …} if the network fails or hangs with a backend that runs need."""
        measured = self._tried(lambda: self._all_reduce(quick))
        if "problem" in measured or platform.current().backend == "gloo":
            return measured
        return measured | self._tried(self._sum_on_host, " by gloo")

    def _tried(self, work: Callable[[], dict[str, float]], by: str = "") -> dict[str, Any]:
        try:
            return within(self.seconds, work)
        except TimeoutError:
            return {"problem": f"did not finish{by} within {self.seconds:g} s"}
        except Exception as error:
            return {"problem": f"failed{by}: {first_line(error)}"}

    def report(self, what: str, content: object) -> None:
        """Store this rank's "measured" (from `measure`) or its "rows" for rank 0."""
        self._store.set(f"{what}/{self.place.rank}", json.dumps(content))

    def collect(self, missing: Sequence[int]) -> list[tuple[str, Row]]:
        """(node, row) of all reports, on rank 0."""
        present = [rank for rank in range(self.place.world) if rank not in missing]
        nodes = {rank: self._store.get(f"node/{rank}").decode() for rank in present}
        dead = self._without("measured", present, self.seconds)
        alive = [rank for rank in present if rank not in dead]
        late = self._without("rows", alive, _CHECKS * self.seconds)
        problems = {f"did not come within {self.seconds:g} s": [*missing], "gave no answer": sorted(dead + late)}
        for rank, measured in self._reports("measured", alive):
            if "problem" in measured:
                problems.setdefault(measured["problem"], []).append(rank)
        ready = [rank for rank in alive if rank not in late]
        rows = [(nodes[rank], Row(**row)) for rank, report in self._reports("rows", ready) for row in report]
        network = self._row(problems, nodes)
        return [*rows, *((node, network) for node in sorted(set(nodes.values())))]

    def _reports(self, what: str, ranks: Iterable[int]) -> Iterator[tuple[int, Any]]:
        for rank in ranks:
            yield rank, json.loads(self._store.get(f"{what}/{rank}"))

    def _without(self, what: str, ranks: Iterable[int], seconds: float) -> list[int]:
        """Those of `ranks` that have not put `what` into the store in time."""
        keys = {f"{what}/{rank}": rank for rank in ranks}
        try:
            self._store.wait(list(keys), timedelta(seconds=seconds))
        except dist.DistStoreError:
            return [rank for key, rank in keys.items() if not self._store.check([key])]
        return []

    def _all_reduce(self, quick: bool) -> dict[str, float]:
        """Latency in ms and, unless `quick`, bandwidth in GB/s (nccl-tests' bus bandwidth) over all ranks."""
        world, current = self.place.world, platform.current()
        dist.init_process_group(
            current.backend,
            store=dist.PrefixStore("group", self._store),  # type: ignore[attr-defined]
            rank=self.place.rank,
            world_size=world,
            timeout=timedelta(seconds=2 * self.seconds),  # this rank stops waiting before torch ends it
        )
        self._sum(current.device)
        measured = {"ms": 1e3 * _seconds(torch.zeros(1, device=current.device), _SMALL_REPEATS)}
        if not quick:
            large = torch.zeros(_BYTES, dtype=torch.uint8, device=current.device).view(torch.float32)
            measured["gb_s"] = 2 * (world - 1) / world * _BYTES / _seconds(large, _REPEATS) / 1e9
        return measured

    def _sum_on_host(self) -> dict[str, float]:
        """Samplers of a GPU job communicate by gloo, over a network interface of its own choice."""
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=2 * self.seconds))
        self._sum(torch.device("cpu"), group)
        return {}

    def _sum(self, device: torch.device, group: Any = None) -> None:
        """One all-reduce with a known result. Raises `RuntimeError` if the result differs."""
        world = self.place.world
        value = torch.tensor([self.place.rank + 1.0], device=device)
        dist.all_reduce(value, group=group)
        if value.item() != world * (world + 1) / 2:
            raise RuntimeError(f"the all-reduced sum of 1 to {world} is {value.item():g}")

    def _row(self, problems: dict[str, list[int]], nodes: dict[int, str]) -> Row:
        """The row for the network. problems: problem -> affected ranks."""
        world = self.place.world
        wrong = [f"{_named(ranks, nodes)} {problem}" for problem, ranks in problems.items() if ranks]
        if wrong:
            count = len({rank for ranks in problems.values() for rank in ranks})
            return Row(CHECK, f"fails for {count} of {world} ranks", _NEEDED, "fails", f"{'; '.join(wrong)}; {_CURE}")
        if world == 1:
            return Row(CHECK, "one rank", "not needed")
        ((_, measured),) = self._reports("measured", [0])
        found, needed = f"{world} ranks, {measured['ms']:.2f} ms", _NEEDED
        if "gb_s" not in measured:
            return Row(CHECK, found, needed)
        speed, least = measured["gb_s"], platform.current().least_bandwidth
        found, needed = f"{found}, {speed:.2f} GB/s", f"{least:g} GB/s"
        if speed < least:
            says = f"an all-reduce over {world} ranks runs at {speed:.2f} GB/s, {least:g} are needed for quick steps"
            return Row(CHECK, found, needed, "warning", f"{says}; {_CURE}")
        return Row(CHECK, found, needed)


def _seconds(tensor: torch.Tensor, repeats: int) -> float:
    """Mean time of an all-reduce of `tensor`, zeros."""
    dist.all_reduce(tensor)  # the first one opens connections
    tensor[0].item()  # waits for it, on the tensor's own device
    begin = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(tensor)
    tensor[0].item()
    return (time.perf_counter() - begin) / repeats


def _named(ranks: Sequence[int], nodes: dict[int, str]) -> str:
    names = [f"{rank} ({nodes[rank]})" if rank in nodes else str(rank) for rank in ranks]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(names)}"


def survey(place: Place, quick: bool, seconds: float, own: Callable[[], list[Row]]) -> list[tuple[str, Row]]:
    """Check the network with all other ranks. On rank 0, returns (node, row) for it and for every rank's `own` rows.

    Raises `DistError` if rank 0 is not there, and `UserError` if its address is unknown.
    """
    meeting = Meeting(place, seconds)
    missing = meeting.missing()
    measured = {} if missing or place.world == 1 else meeting.measure(quick)
    meeting.report("measured", measured)
    meeting.report("rows", [dataclasses.asdict(row) for row in own()])
    return meeting.collect(missing) if place.rank == 0 else []
