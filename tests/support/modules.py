"""The modules of the project, as they are written, and what they import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the project by its dotted name, but for those of the tests."""
    return {
        _name(path): ast.parse(path.read_text(encoding="utf-8"))
        for folder in ("crm", "config")
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


@cache
def imports_of(module: str) -> frozenset[str]:
    """The modules that a module imports, wherever in it; of `from package import module` the module."""
    return frozenset(_imports(module))


def calls_of(module: str) -> list[ast.Call]:
    """The calls in a module, wherever in it."""
    return [node for node in _nodes(module) if isinstance(node, ast.Call)]


@cache
def _nodes(module: str) -> list[ast.AST]:
    """What is looked at in a module. To walk through all modules takes a second."""
    return [node for node in ast.walk(modules()[module]) if isinstance(node, ast.Import | ast.ImportFrom | ast.Call)]


def _imports(module: str) -> Iterator[str]:
    for node in _nodes(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in modules() else str(node.module)


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
