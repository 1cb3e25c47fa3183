"""Configuration: overrides, files, and the one line a mistake gets."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_trd.config import TrainConfig, apply_overrides, from_dict, known_keys, load, save, to_dict
from tests.data.errors import user_error

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def get(config: TrainConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value, a mapping of free form being one value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and key != "chat_template_kwargs"
        found |= flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return found


def strategy(cls: type) -> st.SearchStrategy[Any]:
    """Valid configurations of a dataclass, every field drawn, by its annotations."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return st.builds(cls, **{field.name: _values(hints[field.name]) for field in dataclasses.fields(cls)})


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_PLAIN = st.one_of(st.none(), st.booleans(), st.integers(), _TEXT)


def _values(hint: Any) -> st.SearchStrategy[Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return strategy(hint)  # type: ignore[arg-type]
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is typing.Annotated:
        limits = {
            name: getattr(limit, name)
            for limit in arguments[1].metadata
            for name in ("gt", "ge", "lt", "le")
            if hasattr(limit, name)
        }
        if arguments[0] is int:
            return st.integers(limits.get("ge", limits.get("gt", -1) + 1), 10**6)
        low, high = limits.get("ge", limits.get("gt")), limits.get("le", limits.get("lt", 1e9))
        return st.floats(low, high, exclude_min="gt" in limits, exclude_max="lt" in limits)
    if origin is dict:
        return st.dictionaries(_TEXT, _PLAIN, max_size=2)
    if type(None) in arguments:
        return st.none() | _values(next(argument for argument in arguments if argument is not type(None)))
    return {bool: st.booleans(), str: _TEXT}[hint]


# Overrides


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("steps=7", "steps", 7),
        ("optimizer.lr=1e-5", "optimizer.lr", 1e-5),
        ("optimizer.lr=5e-6", "optimizer.lr", 5e-6),  # YAML 1.1 has no float without a dot
        ("optimizer.lr=.5", "optimizer.lr", 0.5),
        ("optimizer.lr=1", "optimizer.lr", 1.0),
        ("data.shuffle=false", "data.shuffle", False),
        ("student.sequence_parallel=true", "student.sequence_parallel", True),
        ("method=opsd-jsd", "method", "opsd-jsd"),
        ("teacher.weights=ema", "teacher.weights", "ema"),
        ("world_size=8", "world_size", 8),
        ("world_size=null", "world_size", None),
        ("data.answer_field=null", "data.answer_field", None),
        ("data.reference_field=~", "data.reference_field", None),
        ("data.path=a=b.jsonl", "data.path", "a=b.jsonl"),
        ("data.split=train[:10]", "data.split", "train[:10]"),
        ("data.chat_template_kwargs.enable_thinking=false", "data.chat_template_kwargs", {"enable_thinking": False}),
        ("data.chat_template_kwargs.budget=1e-3", "data.chat_template_kwargs", {"budget": 1e-3}),
        ("teacher.chat_template_kwargs.thinking=true", "teacher.chat_template_kwargs", {"thinking": True}),
        ("data.chat_template_kwargs={a: 1, b: x}", "data.chat_template_kwargs", {"a": 1, "b": "x"}),
    ],
)
def test_override_sets_one_key_with_its_type(override: str, key: str, value: object) -> None:
    before = TrainConfig(world_size=4)
    after = apply_overrides(before, [override])
    assert get(after, key) == value
    assert type(get(after, key)) is type(value)
    changed = {name for name, old in flat(to_dict(before)).items() if flat(to_dict(after))[name] != old}
    assert changed <= {key}


@pytest.mark.parametrize(
    "text", ["123", "007", "1e5", "2026-01-31", "no", "on", "a: b", "a #b", "%x", "[x", "{x", "- a", "12:30"]
)
def test_text_stays_as_typed_where_yaml_would_read_something_else(text: str) -> None:
    assert apply_overrides(TrainConfig(), [f"run_dir={text}", f"data.name={text}"]).run_dir == text
    assert apply_overrides(TrainConfig(), [f"data.name={text}"]).data.name == text


@pytest.mark.parametrize("quote", ["'", '"'])
def test_quoted_text_is_text(quote: str) -> None:
    config = apply_overrides(TrainConfig(), [f"data.name={quote}null{quote}", f"model={quote}007{quote}"])
    assert (config.data.name, config.model) == ("null", "007")
    kwargs = apply_overrides(
        TrainConfig(), [f"data.chat_template_kwargs.level={quote}1{quote}"]
    ).data.chat_template_kwargs
    assert kwargs == {"level": "1"}


def test_later_override_wins_and_the_given_configuration_is_left_alone() -> None:
    before = TrainConfig()
    after = apply_overrides(before, ["steps=5", "data.chat_template_kwargs.a=1", "steps=6"])
    assert after.steps == 6
    assert before == TrainConfig()


def test_no_overrides_change_nothing() -> None:
    assert apply_overrides(TrainConfig(), []) == TrainConfig()


@QUICK
@given(strategy(TrainConfig))
def test_every_key_can_be_set_by_an_override(config: TrainConfig) -> None:
    wanted = flat(to_dict(config))
    assert wanted.keys() == set(known_keys())
    assert apply_overrides(TrainConfig(), [f"{key}={_as_yaml(value)}" for key, value in wanted.items()]) == config


def _as_yaml(value: object) -> str:
    """A value as a careful person types it: text in quotes."""
    style = '"' if isinstance(value, str) else None
    return (
        yaml.safe_dump(value, default_style=style, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
    )


# Mistakes


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("student.tpp=2", ["unknown key 'student.tpp'", "did you mean 'student.tp'?"]),
        ("optimizer.learning=1", ["unknown key 'optimizer.learning'"]),
        ("optimiser.lr=1", ["unknown key 'optimiser.lr'", "'optimizer.lr'"]),
        ("lr=1", ["unknown key 'lr'", "did you mean 'optimizer.lr'?"]),  # right name, no section
        ("tp=2", ["unknown key 'tp'", "'student.tp'", "'teacher.tp'", "'sampler.tp'"]),
        ("qqqqqqq=1", ["unknown key 'qqqqqqq'", "config.py"]),
        ("student.tp.x=1", ["unknown key 'student.tp.x'"]),
        ("student=4", ["'student' is a section"]),
        ("student=null", ["'student' is a section"]),
        ("steps", ["'steps'", "key=value"]),
        ("=5", ["'=5'", "key=value"]),
        ("", ["key=value"]),
        ("steps=ten", ["steps='ten'", "integer"]),
        ("steps=", ["steps=''", "integer"]),
        ("steps=1.5", ["steps=1.5", "integer"]),
        ("steps=[1]", ["steps=[1]", "integer"]),
        ("steps=null", ["steps=None", "integer"]),
        ("steps={a", ["'steps={a'", "YAML"]),
        ("steps=0", ["steps=0", "greater than 0"]),
        ("steps=true", ["steps=True", "number"]),
        ("optimizer.lr=yes", ["optimizer.lr=True", "number"]),
        ("seed=-1", ["seed=-1", "greater than or equal to 0"]),
        ("loss.beta=1.5", ["loss.beta=1.5", "less than or equal to 0.999"]),
        ("optimizer.lr=nan", ["optimizer.lr=nan", "finite"]),
        ("optimizer.lr=inf", ["optimizer.lr=inf", "finite"]),
        ("optimizer.lr=0", ["optimizer.lr=0", "greater than 0"]),
        ("data.shuffle=maybe", ["data.shuffle='maybe'", "boolean"]),
        ("method=trd", ["method='trd'", "'trd-opsd'", "'opsd-jsd'"]),
        ("teacher.weights=warm", ["teacher.weights='warm'", "'frozen'", "'live'", "'ema'"]),
        ("run_dir=null", ["run_dir=None", "string"]),
        ("data.chat_template_kwargs=5", ["data.chat_template_kwargs=5", "dictionary"]),
    ],
)
def test_a_wrong_override_is_named_with_its_cure(override: str, says: list[str]) -> None:
    message = user_error(apply_overrides, TrainConfig(), [override])
    assert all(part in message for part in [*says, "override"]), message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"studnet: {tp: 2}", ["unknown key 'studnet'"]),
        (b"student: {tpp: 2}", ["unknown key 'student.tpp'", "'student.tp'"]),
        (b"student: 5", ["student=5"]),
        (b"data: null", ["data=None"]),
        (b"steps: soon", ["steps='soon'", "integer"]),
        (b"steps: 1\nstudent: {tp: [}", ["line 2", "not YAML"]),
        (b"a: b: c", ["line 1", "not YAML"]),
        (b"steps: 1\nstudent:\n  tp: 1\n  pp: 1\n  tp: 2", ["line 5", "'tp' is there twice"]),
        (b"\xff\xfe", ["UTF-8"]),
        (b"", ["mapping"]),
        (b"- steps", ["mapping"]),
        (b"1: 2", ["Keys should be strings"]),
    ],
)
def test_a_wrong_file_is_named_with_its_cure(tmp_path: Path, content: bytes, says: list[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    message = user_error(load, path)
    assert all(part in message for part in [*says, str(path)]), message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "none.yaml") in user_error(load, tmp_path / "none.yaml")


# Files


def test_scientific_notation_of_a_hand_written_file_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("optimizer: {lr: 5e-6}\n")
    assert load(path).optimizer.lr == 5e-6


def test_a_file_sets_what_it_names_and_leaves_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("steps: 3\nstudent: {tp: 2}\n")
    assert load(path) == from_dict({"steps": 3, "student": {"tp": 2}}, "test")
    assert load(path).student.pp == TrainConfig().student.pp


@QUICK
@given(strategy(TrainConfig))
def test_save_then_load_is_the_same_configuration(tmp_path: Path, config: TrainConfig) -> None:
    save(config, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == config


def test_a_saved_file_holds_every_key(tmp_path: Path) -> None:
    save(TrainConfig(), tmp_path / "config.yaml")
    assert set(flat(yaml.safe_load((tmp_path / "config.yaml").read_text()))) == set(known_keys())


def test_defaults_are_those_of_the_paper() -> None:
    config = TrainConfig()
    assert (config.batch_size, config.optimizer.lr, config.optimizer.warmup_fraction) == (16, 5e-6, 0.1)
    assert (config.optimizer.weight_decay, config.loss.temperature, config.sampler.temperature) == (0.005, 1.0, 1.0)
    assert (config.loss.clip, config.loss.top_k, config.loss.normalize) == (0.1, 32, "sequence")
    assert (config.data.max_prompt_tokens, config.data.max_reference_tokens) == (2048, 4096)
    assert (config.sampler.max_rollout_tokens, config.sampler.max_refinement_tokens) == (16384, 16384)
