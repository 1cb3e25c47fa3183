"""The teacher: hidden states of response positions, computed on its own grid and sent to the student's last stage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_trd import platform
from megatron_trd.config import TrainConfig
from megatron_trd.data.batching import MicroBatch, Sample, deal
from megatron_trd.engines.hidden_store import WAVE, HiddenStates, HiddenStore, name_of
from megatron_trd.engines.offload import Offload
from megatron_trd.engines.schedule import batches_of, run_schedule
from megatron_trd.engines.student import StudentEngine
from megatron_trd.errors import UserError
from megatron_trd.methods import swaps_weights
from megatron_trd.models import loading, lora, weights
from megatron_trd.models.architecture import Architecture, build_model, transformer_config
from megatron_trd.models.gathering import GatheredSource, SpreadWeights
from megatron_trd.models.model import Model
from megatron_trd.parallel.exchange import Route, exchange_hidden
from megatron_trd.parallel.grid import Grid, teacher_grid


class TeacherEngine:
    """A teacher without gradients: a separate checkpoint, or the student's own weights (frozen, live or averaged).

    `shared`: it is computed by the student's engine; a frozen one without the student's adapters.
    """

    def __init__(self, config: TrainConfig, student: StudentEngine, model: Model) -> None:
        self.config, self.student = config, student
        self.shared, self.averaged = config.shared_teacher, config.averaged_teacher
        self.grid: Grid = student.grid
        self.arch, self.folder = model.arch, model.folder
        self.model: torch.nn.Module = student.model
        self._head: Tensor | None = None
        self._head_average: Tensor | None = None
        self._updates = 0  # of the weights
        self.store = HiddenStore(config.teacher.hidden_in, Path(config.run_dir, "hidden", str(dist.get_rank())))
        # Hidden states not yet sent to the student: the replica that has each, and those that this rank has.
        self._makers: dict[str, int] = {}
        self._made: dict[str, Tensor] = {}
        self._memory = Offload(self._own_tensors)
        if not self.shared:
            self._build()
            self.load(model.source)

    def _build(self) -> None:
        settings = self.config.teacher
        self.grid = teacher_grid(settings.tp, settings.pp, settings.ep)
        with platform.current().megatron():
            mcore_config = transformer_config(self.arch, self.grid)
            self.model = build_model(self.arch, self.grid, mcore_config, with_head=False)
        self.model.requires_grad_(False).eval()
        named = loading.local_parameters(self.model, self.arch, self.grid)
        self._named: Mapping[str, Tensor] = named
        self._average: Mapping[str, Tensor] = named
        if not (self.averaged or swaps_weights(self.config)):
            return
        size = self.config.sampler.refit_bucket_bytes
        self._weights = self._averages = SpreadWeights(named, self.arch, self.grid, size)
        if self.averaged and platform.current().dtype != torch.float32:
            # An update changes an average by a small fraction of its value, which 16 bits would lose.
            self._average = {name: parameter.float() for name, parameter in named.items()}
            self._averages = SpreadWeights(self._average, self.arch, self.grid, size, dtype=torch.float32)

    def load(self, source: loading.Source) -> None:
        """Load the weights of a model of this teacher's architecture."""
        loading.load(self._average, self.arch, self.grid, source)
        self._head_average = self._head_shard(source)
        self._head = None if self._head_average is None else self._head_average.to(platform.current().dtype)
        self._round()

    def _head_shard(self, source: loading.Source) -> Tensor | None:
        """The teacher's output head, sharded like the student's; None off the student's last stage."""
        grid = self.student.grid
        if not grid.is_last_stage:
            return None
        slot = weights.slots(self.arch)[-1]
        part = weights.shard(slot, source(slot), self.arch, grid.tp_rank, grid.layout.tp)
        dtype = torch.float32 if self.averaged else platform.current().dtype
        return part.to(platform.current().device, dtype, copy=True)

    @torch.no_grad()
    def _round(self) -> None:
        """Copy the averages into the weights, where they are kept separately."""
        if self._average is not self._named:
            for name, parameter in self._named.items():
                parameter.copy_(self._average[name])
        if self._head is not None and self._head_average is not None and self._head is not self._head_average:
            self._head.copy_(self._head_average)

    def offload(self) -> None:
        """Move the weights to host memory until they are needed, if so configured."""
        if self.config.teacher.offload:
            self._memory.away()

    def _own_tensors(self) -> Iterator[Tensor]:
        if not self.shared:
            yield from self._named.values()
            yield from self._average.values()  # if they are the weights themselves, storages are not moved twice
            yield from (head for head in (self._head, self._head_average) if head is not None)

    @property
    def head(self) -> Tensor | None:
        """`[padded vocab / student tp, hidden_T]` on the student's last stage, None elsewhere."""
        if self.shared:
            return None if self.student.head is None else self.student.head.detach()
        return self._head

    def update(self) -> None:
        """After an optimizer step: move an averaged teacher towards the student. Collective."""
        self._updates += not self.config.frozen_teacher
        if not self.averaged:
            return
        decay = self.config.teacher.ema_decay
        self._weights.settle()
        student = self.student.source(dtype=torch.float32)  # merged adapters of few steps would be lost in 16 bits
        loading.load(self._average, self.arch, self.grid, student, decay=decay, all_slots=True)
        if self._head_average is not None and self.student.head is not None:
            self._head_average.lerp_(self.student.head.detach().to(self._head_average), 1.0 - decay)
        self._round()

    def source(self) -> loading.Source:
        """Full Hugging Face tensors of the current weights, like `StudentEngine.source`, for a teacher whose weights
        are loaded into an engine repeatedly; the head is the loss's own."""
        self._memory.back()
        if self.shared:
            return self.student.source(adapted=self.config.live_teacher)
        return self._source(self._weights, self._head)

    def averages(self) -> loading.Source:
        """The same for the averages, float32."""
        self._memory.back()
        return self._source(self._averages, self._head_average)

    def _source(self, body_weights: SpreadWeights, head: Tensor | None) -> loading.Source:
        *table, slot = weights.slots(self.arch)
        body = body_weights.source(table)
        if self.arch.tied:
            return body
        shard = {} if head is None else {slot.megatron[0]: head}
        grid, size, dtype = self.student.grid, body_weights.bucket_bytes, body_weights.dtype
        last = SpreadWeights(shard, self.arch, grid, size, dtype=dtype, shown=False).source([slot])
        return _WithHead(body, last, slot)

    def forget(self) -> None:
        """Drop all hidden states: their step is over."""
        self.store.keep(())
        self._made.clear()
        self._makers.clear()

    def hidden(self, samples: Sequence[Sample], student_shares: Sequence[Sequence[int]]) -> HiddenStates:
        """Hidden states after the final norm at response positions, `[tokens, hidden_T]` by sample index.

        Each student replica's last stage gets the samples of its share; other ranks get an empty one. Hidden states
        left from an earlier call with the same weights, or computed ahead, are not recomputed. Collective.
        """
        self._memory.back()
        student_of = {index: dp for dp, share in enumerate(student_shares) for index in share}
        names = [self._name(sample) for sample in samples]
        places = [f"{name}-{student_of[index]}" for index, name in enumerate(names)]
        self.store.keep(places)
        for wave in self._waves(samples, [index for index, place in enumerate(places) if place not in self.store]):
            self.compute([samples[index] for index in wave])
            routes = [
                Route(index, len(samples[index].response), self._makers[names[index]], student_of[index])
                for index in wave
            ]
            received = self._exchange(routes, names)
            self.store.add((places[index] for index in wave), {places[index]: received[index] for index in received})
            for index in wave:
                self._makers.pop(names[index], None)
                self._made.pop(names[index], None)
        self._made.clear()  # computed ahead but not needed
        self._makers.clear()
        grid = self.student.grid
        return HiddenStates(self.store, places, student_shares[grid.dp_rank] if grid.is_last_stage else [])

    def _name(self, sample: Sample) -> str:
        return name_of(sample, self._updates)

    def _waves(self, samples: Sequence[Sample], indices: Sequence[int]) -> list[Sequence[int]]:
        """Groups of samples whose hidden states are on the device at once, longest first; all, if they stay there."""
        if not indices or self.store.place == "device":
            return [indices] if indices else []
        size = WAVE * self.grid.layout.dp * self.config.teacher.micro_batch_size
        order = sorted(indices, key=lambda index: (-len(samples[index].tokens("teacher")), index))
        return [order[start : start + size] for start in range(0, len(order), size)]

    def compute(self, samples: Sequence[Sample]) -> None:
        """Compute hidden states for those samples that have none, for the next call of `hidden`. Collective."""
        named = {self._name(sample): sample for sample in samples}
        names = [name for name in named if name not in self._makers]
        if not names:
            return
        samples = [named[name] for name in names]
        settings, layout = self.config.teacher, self.grid.layout
        shares = deal(samples, layout.dp, cost=lambda sample: len(sample.tokens("teacher")))
        mine = shares[self.grid.dp_rank]
        split = self.shared and self.config.student.sequence_parallel
        batches = batches_of(samples, mine, "teacher", size=settings.micro_batch_size, grid=self.grid, split=split)

        def of_responses(batch: MicroBatch, hidden: Tensor) -> Tensor:
            return batch.select(self.student.whole_sequence(hidden) if self.shared else hidden)

        with contextlib.nullcontext() if self.config.live_teacher else lora.without_adapters():
            outputs = run_schedule(self.model, self.grid, batches, keep=of_responses)
        for batch, hidden in zip(batches, outputs, strict=bool(outputs)):
            parts = hidden.split(batch.lengths)
            if batch.samples:
                self._made |= {names[index]: part for index, part in zip(batch.samples, parts, strict=True)}
        self._makers |= {names[index]: dp for dp, share in enumerate(shares) for index in share}

    def _exchange(self, routes: Sequence[Route], names: Sequence[str]) -> dict[int, Tensor]:
        """Hidden states of the routes' samples that this rank's student needs, by sample index."""
        current = platform.current()
        local = {route.sample: self._made[names[route.sample]] for route in routes if names[route.sample] in self._made}
        layouts = self.grid.layout, self.student.grid.layout
        return exchange_hidden(routes, local, *layouts, self.arch.hidden_size, current.dtype, current.device)


class _WithHead:
    """Body and output head of a model, each from its own source; a `PiecewiseSource`."""

    def __init__(self, body: GatheredSource, head: GatheredSource, slot: weights.Slot) -> None:
        self._body, self._head, self._slot = body, head, slot

    def _of(self, slot: weights.Slot) -> GatheredSource:
        return self._head if slot == self._slot else self._body

    def __call__(self, slot: weights.Slot) -> list[Tensor]:
        return self._of(slot)(slot)

    def pieces(self, slot: weights.Slot) -> list[weights.Piece]:
        return self._of(slot).pieces(slot)


def check_teacher(student: Architecture, teacher: Architecture) -> None:
    """Raise `UserError` if the teacher has no logit for a token of the student's."""
    if student.vocab_size > teacher.vocab_size:
        raise UserError(
            f"teacher.model has embeddings of {teacher.vocab_size} tokens, the student of {student.vocab_size}: "
            "full-vocabulary distillation needs a teacher with at least as many"
        )
