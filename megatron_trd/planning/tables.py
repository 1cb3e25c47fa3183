"""Presents a forecast in tables and sentences."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path

from rich.table import Table

from megatron_trd import config as configuration
from megatron_trd.config import TrainConfig
from megatron_trd.parallel.grid import Layout
from megatron_trd.planning import memory, sizes
from megatron_trd.planning.case import Case
from megatron_trd.planning.devices import CPU
from megatron_trd.planning.forecast import Forecast
from megatron_trd.planning.search import Found
from megatron_trd.reporting.progress import PHASES

GIB = memory.GIB
_SHOWN, _SHOWN_TOO_LARGE = 5, 4
_NOTABLE = 0.95  # of the recipe's time; a forecast cannot resolve smaller differences


def headline(name: str, case: Case) -> Iterator[str]:
    """The subject of the forecast, the hardware, and how reliable the forecast is."""
    cluster, config, work = case.cluster, case.config, case.work
    device = cluster.device
    yield (
        f"{name}: {config.method}, {cluster.nodes} x {cluster.gpus_per_node} {device.name} of "
        f"{device.memory / GIB:.1f} GiB, {config.steps} steps of {work.samples} samples"
    )
    student = f"student {_model(config.model)} of {sizes.whole(case.student).total / 1e9:.4g} G parameters"
    if config.lora.rank:
        adapters = sizes.adapters_of_layer(case.student, config.lora.rank, tp=1) * case.student.layers
        student += f" with adapters of rank {config.lora.rank} ({adapters / 1e6:.4g} M)"
    if config.teacher.model:
        teacher = f"{_model(config.teacher.model)} of {sizes.whole(case.teacher).total / 1e9:.4g} G"
    elif config.shared_teacher and not config.live_teacher:
        teacher = "the student without them"
    else:
        teacher = f"the student, {config.teacher.weights}"
    yield (
        f"{student}, teacher {teacher}; sequences of up to {work.context:,} tokens, responses of "
        f"{work.mean.response:,.0f} tokens on average of at most {work.longest.response:,.0f}"
    )
    if device.name == CPU:
        yield f"measured now, a rank: {device.flops / 1e9:.0f} GFLOP/s and {device.bandwidth / 1e9:.1f} GB/s"
    else:
        yield "a forecast by arithmetic, hardly anything of it measured on a GPU: docs/scaling.md says what is assumed"


def memory_table(forecast: Forecast) -> Table:
    """Parts by phase, for the rank that is fullest in it."""
    table = _table(f"memory a {_unit(forecast.case)}, GiB", *PHASES)
    parts = list(dict.fromkeys(part for phase in PHASES for part in forecast.memory[phase]))
    for part in parts:
        table.add_row(part, *(_gib(forecast.memory[phase].get(part, 0.0)) for phase in PHASES))
    table.add_row("all", *(_gib(sum(forecast.memory[phase].values())) for phase in PHASES))
    return table


def verdict(forecast: Forecast) -> str:
    """Whether the recipe fits, and if not, what is too large."""
    phase, peak = forecast.peak
    device = forecast.case.device
    if forecast.fits:
        return f"It fits: {peak / GIB:.1f} of {device.memory / GIB:.1f} GiB in the fullest phase, {phase}."
    return f"It does not fit. {_reasons(forecast)}."


def time_table(forecast: Forecast) -> Table:
    """Seconds of a step by phase and part."""
    table = _table("time a step, s", "phase", "part", "share", left=2)
    for phase, parts in forecast.seconds.items():
        table.add_row(phase, "", _seconds(sum(parts.values())), f"{sum(parts.values()) / forecast.step:.0%}")
        for part, value in parts.items():
            if value >= forecast.step / 1000:
                table.add_row("", part, _seconds(value), f"{value / forecast.step:.0%}")
    table.add_row("all", "", _seconds(forecast.step), "")
    return table


def throughput(forecast: Forecast) -> str:
    """Tokens per second, and the time of the whole recipe."""
    step = forecast.step
    return (
        f"{forecast.sampled_tokens / step:,.0f} tokens/s sampled and {forecast.trained_tokens / step:,.0f} trained on, "
        f"over a whole step; {forecast.case.config.steps:,} steps take {_large(forecast.hours)} hours, "
        f"{_large(forecast.gpu_hours)} {_unit(forecast.case)}-hours, start and checkpoints not counted."
    )


def layouts_table(recipe: Forecast, found: Found) -> Table:
    """The recipe and the fastest layouts that fit."""
    table = _table(
        "layouts that fit", "student", "teacher", "sampler", "peak, GiB", "s a step", "tokens/s trained",
        f"{_unit(recipe.case)}-hours",
        left=4,
    )  # fmt: skip
    others = [each for each in found.fitting if each.case.config != recipe.case.config]
    best = _distinct(others, lambda each: (_student(each.case), _sampler(each.case)), _SHOWN)
    rows = [("the recipe" if recipe.fits else "the recipe (does not fit)", recipe)]
    rows += [(str(place), each) for place, each in enumerate(best, 1)]
    for name, each in rows:
        table.add_row(
            name,
            *layout_cells(each.case),
            _gib(each.peak[1]),
            _seconds(each.step),
            f"{each.trained_tokens / each.step:,.0f}",
            _large(each.gpu_hours),
        )
    return table


def advice(config: TrainConfig, recipe: Forecast, found: Found) -> str:
    """Settings to run the recipe with: the best layout if it is notably faster than the recipe's own, `config`."""
    if not found.fitting:
        return (
            "No layout fits: take more nodes or GPUs with more memory, or lower data.max_prompt_tokens, "
            "data.max_reference_tokens, sampler.max_rollout_tokens or sampler.max_refinement_tokens."
        )
    if config.world_size is None:  # the launcher determines the number
        config = recipe.case.config
    best = found.fitting[0]
    if not recipe.fits or best.step < _NOTABLE * recipe.step:
        return f"Layout 1 as overrides: {' '.join(overrides(config, best.case.config))}"
    typed = "".join(f" {override}" for override in overrides(config, recipe.case.config))
    return (
        "No layout that fits is forecast to be quicker than the recipe's own by more than 5 %."
        f"{' Overrides for these GPUs:' + typed if typed else ''}"
    )


def overrides(before: TrainConfig, after: TrainConfig) -> list[str]:
    """`key=value` of every setting in which two configurations differ."""
    old, new = configuration.flatten(before), configuration.flatten(after)
    return [f"{key}={_value(value)}" for key, value in new.items() if value != old[key]]


def too_large_table(found: Found) -> Table:
    """Layouts that would be faster than all that fit, smallest shortfall first, with the reasons."""
    table = _table("layouts that do not fit", "student", "teacher", "sampler", "s a step", "why", left=4)
    table.columns[-1].justify = "left"
    limit = found.fitting[0].step if found.fitting else math.inf
    quicker = [each for each in found.too_large if each.step < limit] or found.too_large
    nearest = sorted(quicker, key=lambda each: each.worst.over)
    for each in _distinct(nearest, lambda each: _student(each.case), _SHOWN_TOO_LARGE):
        table.add_row("", *layout_cells(each.case), _seconds(each.step), _reasons(each))
    return table


def _reasons(forecast: Forecast) -> str:
    """The largest shortfall, and the other phases that have one."""
    worst = forecast.worst
    others = [each.phase for each in forecast.shortfalls if each.phase != worst.phase]
    also = f"; too much also in {', '.join(dict.fromkeys(others))}" if others else ""
    return f"{worst.phase}: {worst.over / GIB:.1f} GiB too much ({worst.why}){also}"


def layout_cells(case: Case) -> tuple[str, str, str]:
    """Layouts of student, teacher and sampler, abbreviated to a few letters each."""
    return _student(case), "the student" if case.config.shared_teacher else _grid(case.teacher_layout), _sampler(case)


def _student(case: Case) -> str:
    settings = case.config.student
    extras = [name for name, on in (("SP", settings.sequence_parallel), ("recompute", settings.recompute)) if on]
    return " ".join([_grid(case.student_layout), *extras])


def _sampler(case: Case) -> str:
    settings = case.config.sampler
    share = f" of {settings.memory_fraction:.0%}" if case.stack.engine_shares else ""
    return f"{len(case.engines)} x TP{settings.tp}{share}"


def _grid(layout: Layout) -> str:
    experts = f" EP{layout.ep}" if layout.ep > 1 else ""
    return f"TP{layout.tp} PP{layout.pp} DP{layout.dp}{experts}"


def _distinct(forecasts: Iterable[Forecast], key: Callable[[Forecast], Hashable], count: int) -> list[Forecast]:
    """The first of each kind, at most `count` of them."""
    first: dict[Hashable, Forecast] = {}
    for each in forecasts:
        first.setdefault(key(each), each)
    return list(first.values())[:count]


def _table(title: str, *columns: str, left: int = 1) -> Table:
    """A table whose first `left` columns are text and whose others are numbers."""
    table = Table(title)
    for place, column in enumerate(columns, 1):
        table.add_column(column, justify="left" if place < left else "right")
    return table


def _model(path: str) -> str:
    return Path(path).name


def _gib(value: float) -> str:
    return f"{value / GIB:.1f}" if value >= 0.05 * GIB or value == 0 else f"{value / GIB:.2g}"


def _seconds(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2g}"


def _large(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _unit(case: Case) -> str:
    """The device of a rank: a GPU, or a share of this machine."""
    return "rank" if case.device.name == CPU else "GPU"


def _value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:.2f}" if isinstance(value, float) else str(value)
