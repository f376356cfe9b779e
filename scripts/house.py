#!/usr/bin/env python3
"""The project's figures of itself, each with a target. Exit code 1 where one is missed.

Lines are all lines of a file, blank ones and comments too; kloc are thousands of them. A function's length runs from
its `def` to its last line. Paths are from the project's folder: run it from anywhere.
"""

from __future__ import annotations

import ast
import re
import statistics
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

TARGETS: Mapping[str, float] = {
    "lines in all": 20_300,
    "median file": 190,
    "largest file": 400,
    "longest function": 50,
    "untyped returns, %": 2,
    "broad except per kloc": 1.0,
    "hasattr+getattr per kloc": 2.0,
    "print calls": 0,
    "stubs": 0,
    "mock/patch per kloc of tests": 1.0,
}
"""The most that each figure may be."""

STUB = re.compile(r"#\s*(?:TODO|FIXME|XXX)|raise NotImplementedError")
MOCK = re.compile(r"\b(?:Mock|MagicMock|AsyncMock|mocker)\b|\bpatch(?:\.object|\.dict)?\(|monkeypatch\.setattr")


@dataclass(slots=True)
class Count:
    """What there is in a folder of Python files."""

    lines: dict[str, int] = field(default_factory=dict)
    """Of each file."""
    functions: dict[str, int] = field(default_factory=dict)
    """Lines of each, by "file:line name"."""
    untyped: int = 0
    broad_excepts: int = 0
    attribute_tricks: int = 0
    prints: int = 0
    stubs: int = 0


def count(files: Iterable[Path]) -> Count:
    total = Count()
    for path in files:
        text = path.read_text()
        name = str(path.relative_to(ROOT))
        total.lines[name] = text.count("\n") + 1
        total.stubs += len(STUB.findall(text))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                end = node.end_lineno or node.lineno
                total.functions[f"{name}:{node.lineno} {node.name}"] = end - node.lineno + 1
                total.untyped += node.returns is None
            elif isinstance(node, ast.ExceptHandler):
                total.broad_excepts += _is_broad(node)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                total.attribute_tricks += node.func.id in ("hasattr", "getattr")
                total.prints += node.func.id == "print"
    return total


def _is_broad(handler: ast.ExceptHandler) -> bool:
    """`except:`, `except Exception:`, and any tuple with one of the two bases in it."""
    names = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(n is None or (isinstance(n, ast.Name) and n.id in ("Exception", "BaseException")) for n in names)


def figures(package: Count, tests: str) -> dict[str, float]:
    """The figures, by the names of TARGETS; `tests` is the text of all tests."""
    lines = sum(package.lines.values())
    mocks = len(MOCK.findall(tests))
    return {
        "lines in all": lines,
        "median file": statistics.median(package.lines.values()),
        "largest file": max(package.lines.values()),
        "longest function": max(package.functions.values()),
        "untyped returns, %": round(100 * package.untyped / len(package.functions), 1),
        "broad except per kloc": round(1000 * package.broad_excepts / lines, 2),
        "hasattr+getattr per kloc": round(1000 * package.attribute_tricks / lines, 2),
        "print calls": package.prints,
        "stubs": package.stubs,
        "mock/patch per kloc of tests": round(1000 * mocks / max(1, tests.count("\n")), 2),
    }


def main() -> int:
    package = count(sorted((ROOT / "agent_lightning").rglob("*.py")))
    tests = "".join(path.read_text() for path in sorted((ROOT / "tests").rglob("*.py")))
    found = figures(package, tests)
    missed = [name for name, value in found.items() if value > TARGETS[name]]
    for name, value in found.items():
        mark = "  missed" if name in missed else ""
        sys.stdout.write(f"{name:30} {value:>8g}   at most {TARGETS[name]:g}{mark}\n")
    for what, sizes in (("file", package.lines), ("function", package.functions)):
        size, name = max((size, name) for name, size in sizes.items())
        sys.stdout.write(f"longest {what}: {name}, {size} lines\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
