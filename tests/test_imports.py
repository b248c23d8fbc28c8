"""Imports run one way, the pure modules stay pure, and nothing prints."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PURE = ("outcome", "addresses", "mapping", "plan", "fold", "pace", "options")
ALLOWED_OF_DJANGO = {"django.core.validators", "django.core.exceptions"}

#: Whoever is on the left may import nothing that begins with what is on the right.
FORBIDDEN = {
    "crm.models": ("crm.management", "crm.admin", "crm.dashboard", "crm.attribution", "crm.own_schema"),
    "crm.backfill": ("crm.management", "crm.admin", "crm.dashboard", "crm.sample_data", "crm.migrations", "tests"),
    "crm.backfill.source": ("crm.backfill.writer", "crm.backfill.runner"),
    "crm.backfill.writer": ("crm.backfill.pipeline", "crm.backfill.runner"),
    "crm.backfill.rehearsal": ("crm.backfill.writer", "crm.backfill.pipeline", "crm.backfill.runner"),
    "crm.backfill.runner": ("crm.backfill.report", "crm.backfill.verify", "crm.backfill.rollback"),
    "crm.management": ("crm.admin", "crm.dashboard", "crm.backfill.writer", "crm.backfill.source"),
    "config": ("crm.backfill", "crm.models", "crm.management"),
}
#: All that models may know of the backfill: the words that the ledger is written in.
MODELS_MAY_KNOW = {"crm.backfill.outcome"}


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the project by its dotted name."""
    return {
        name(path): ast.parse(path.read_text(encoding="utf-8"))
        for folder in ("crm", "config")
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


def name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(module: str) -> set[str]:
    """The modules that a module imports, wherever in it; of `from package import module` the module."""
    return set(_imports(modules()[module]))


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in modules() else str(node.module)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


@pytest.mark.parametrize("pure", PURE)
def test_a_pure_module_imports_the_standard_library_the_validators_and_its_like(pure: str) -> None:
    allowed = ALLOWED_OF_DJANGO | {f"crm.backfill.{other}" for other in PURE}
    others = imports_of(f"crm.backfill.{pure}") - allowed
    assert {module for module in others if module.split(".")[0] not in sys.stdlib_module_names} == set()


@pytest.mark.parametrize("importer", FORBIDDEN)
def test_imports_run_one_way(importer: str) -> None:
    against = [
        f"{module} imports {imported}"
        for module in modules()
        if within(module, importer)
        for imported in imports_of(module)
        if any(within(imported, forbidden) for forbidden in FORBIDDEN[importer])
    ]
    assert against == []


def test_models_know_nothing_of_the_backfill_but_its_words() -> None:
    known = {imported for module in modules() if within(module, "crm.models") for imported in imports_of(module)}
    assert {imported for imported in known if within(imported, "crm.backfill")} <= MODELS_MAY_KNOW


def test_there_is_no_circle() -> None:
    graph = {module: imports_of(module) & modules().keys() for module in modules()}
    # A package that only gathers what is in it is no step of its own.
    TopologicalSorter({module: imported - {module} for module, imported in graph.items()}).prepare()


def test_nothing_prints() -> None:
    calls = [
        f"{module}:{node.lineno}"
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert calls == []


def test_the_walk_sees_what_there_is() -> None:
    assert "crm.backfill.plan" in imports_of("crm.backfill.settle")
    assert "crm.backfill.fence" in imports_of("crm.backfill.runner"), "from crm.backfill import fence"
    assert {f"crm.backfill.{pure}" for pure in PURE} <= modules().keys()
