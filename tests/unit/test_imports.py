"""Imports run one way, the rules stay pure, and nothing prints."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter

import pytest

from tests.support.modules import ROOT, calls_of, imports_of, modules

#: From the ground up. A module imports what is in its own package or in a layer below, and nothing else of the project.
LAYERS = (
    (
        "crm.errors",
        "crm.sqlstates",
        "crm.outcome",
        "crm.version",
        "crm.fields",
        "crm.try_execute",
        "crm.interruption",
        "crm.output",
        "crm.legacy_schema",
    ),
    ("crm.models",),
    ("crm.rules",),
    ("crm.postgres",),
    ("crm.runs",),
    ("crm.backfill",),
    ("crm.repair",),
    ("crm.rollback", "crm.verification", "crm.conflicts", "crm.tracing"),
    ("crm.attribution", "crm.checks", "crm.file_checks", "crm.sample_data"),
    ("crm.admin", "crm.management", "crm.apps"),
)
#: What any layer may ask of the settings: how the address of the database is read.
OF_THE_SETTINGS = {"config.database"}
#: Nothing that writes is a rule, and nothing that reads: what rules may import besides each other.
ALLOWED_IN_RULES = {"django.core.validators", "django.core.exceptions", "crm.errors", "crm.outcome", "crm.version"}
#: The rules, wherever they are.
RULES = ("crm.rules", "crm.repair.rules")
MAX_FILES_OF_A_FOLDER = 13
#: The folders of the tests themselves; what they share is in tests/support.
KINDS = ("unit", "integration", "property", "process")


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def room_of(module: str) -> tuple[int, str] | None:
    """The layer of a module, and the package or module of LAYERS that it is in."""
    for number, layer in enumerate(LAYERS):
        for package in layer:
            if within(module, package):
                return number, package
    return None


def is_allowed(module: str, imported: str) -> bool:
    if not within(imported, "crm"):
        return not within(imported, "config") or imported in OF_THE_SETTINGS
    importer, target = room_of(module), room_of(imported)
    assert importer, f"{module} has no layer"
    assert target, f"{imported} has no layer"
    # The modules of the ground layer are no package: they may know each other, and the test for circles looks at them.
    return target[0] < importer[0] or target[1] == importer[1] or target[0] == importer[0] == 0


def of_the_project() -> Iterator[str]:
    return (module for module in modules() if module != "crm" and not within(module, "crm.migrations"))


def test_imports_run_downwards_only() -> None:
    upwards = [
        f"{module} imports {imported}"
        for module in of_the_project()
        if within(module, "crm")
        for imported in sorted(imports_of(module))
        if not is_allowed(module, imported)
    ]
    assert upwards == []


def test_the_settings_know_nothing_of_the_application() -> None:
    assert [
        module for module in modules() if within(module, "config") for used in imports_of(module) if within(used, "crm")
    ] == []


@pytest.mark.parametrize("rule", [module for module in modules() if any(within(module, rules) for rules in RULES)])
def test_a_rule_imports_the_standard_library_the_validators_and_other_rules(rule: str) -> None:
    others = {module for module in imports_of(rule) - ALLOWED_IN_RULES if not within(module, "crm.rules")}
    assert {module for module in others if module.split(".")[0] not in sys.stdlib_module_names} == set()


def test_every_name_in_the_layers_is_there() -> None:
    assert [package for layer in LAYERS for package in layer if package not in modules()] == []
    assert modules().keys() >= OF_THE_SETTINGS


def test_no_folder_has_more_files_than_one_can_take_in() -> None:
    folders = {path.parent for path in (ROOT / "crm").rglob("*.py")} - {ROOT / "crm" / "migrations"}
    counts = {str(folder.relative_to(ROOT)): len(list(folder.glob("*.py"))) for folder in folders}
    assert {folder: count for folder, count in counts.items() if count > MAX_FILES_OF_A_FOLDER} == {}


def test_there_is_no_circle() -> None:
    graph = {module: imports_of(module) & modules().keys() for module in modules()}
    # A package that only gathers what is in it is no step of its own.
    TopologicalSorter({module: imported - {module} for module, imported in graph.items()}).prepare()


def test_what_tests_share_is_in_support_and_no_test_module_is_imported() -> None:
    imported = re.compile(
        rf"^\s*(?:from tests import |from tests\.|import tests\.)({'|'.join(KINDS)})\b.*", re.MULTILINE
    )
    found = {
        str(path.relative_to(ROOT)): [line[0] for line in imported.finditer(path.read_text(encoding="utf-8"))]
        for path in (ROOT / "tests").rglob("*.py")
    }
    assert len(found) > 100
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_nothing_prints() -> None:
    calls = [
        f"{module}:{node.lineno}"
        for module in modules()
        for node in calls_of(module)
        if isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert calls == []


def test_whoever_waits_can_be_interrupted() -> None:
    waiting = {
        module
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if within(module, "crm") and isinstance(node, ast.Call) and ast.unparse(node.func) in ("time.sleep", "sleep")
    }
    assert waiting == {"crm.interruption"}


def test_the_walk_sees_what_there_is() -> None:
    assert "crm.rules.matching" in imports_of("crm.backfill.write.upsert")
    assert "crm.runs.lease" in imports_of("crm.backfill.runner"), "from crm.runs import lease"
