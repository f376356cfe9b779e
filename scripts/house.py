#!/usr/bin/env python3
"""The project's figures of itself, each with a target. Exit code 1 where one is missed.

Lines are all lines of a file, blank ones and comments too; kloc are thousands of them. A function's length runs from
its `def` to its last line. Headers are module docstrings and imports at the top level. Paths are from the project's
folder: run it from anywhere.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

TARGETS: Mapping[str, float] = {
    "lines in all": 27_370,
    "entries of the package": 14,
    "most files in a folder": 14,
    "headers, % of lines": 9.0,
    "largest file": 400,
    "longest function": 60,
    "files that name a config key": 3,
    "docstrings that begin with Of": 0,
    "vague variables": 0,
    "untyped returns, %": 2,
    "broad except per kloc": 1.0,
    "hasattr+getattr per kloc": 2.0,
    "print calls": 0,
    "stubs": 0,
    "mock/patch per kloc of tests": 1.0,
}
"""The most that each figure may be."""

VAGUE = {"one", "found", "asked", "said", "whole", "there", "theirs"}
"""Names of variables and arguments that do not name the thing."""

GENERIC_KEYS = re.compile(
    r"address|agent|agents|algorithm|baseline|bound|breaker|buffer|cancelled|cap|concurrency|credit|critic|data"
    r"|device|discount|dtype|enabled|epochs|experiment|failures|form|group|hardware|host|instrument|journal|kind"
    r"|learner|loop|lora|lr|match|max_len|max_tokens|method|mode|model|name|names|nodes|num|on|path|placement|port"
    r"|processes|project|replicas|restarts|retry|reward|rollout|root|rules|sampling|scale|seed|seeded|serving"
    r"|share|signals|split|steps|tags|target|temperature|threads|timeout|timeout_s|tool|top_p|tracking|train"
    r"|trained|val|value|verl|vllm|window|words|workers"
    r"|gae_lambda|max_spans|search|rank|alpha|targets"
)
"""Keys of the config that are left out of "files that name a config key": sections, and words that name other things
too (a path, a seed, a learning rate), so that their number says nothing of the config. The last six: gae_lambda is a
symbol of the formula in credit/, max_spans the limit of one OTLP body in spans/, search a method of `re`, rank the
number of a process of torch, alpha the opacity of a line in a plot, and targets those of a Serve proxy."""

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
    headers: int = 0
    of_docstrings: int = 0
    vague: int = 0
    keys: set[str] = field(default_factory=set)
    """Keys of the config: the fields of its sections."""
    named_in: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """By name, the files in which it is an attribute, a keyword, a parameter or a field."""


def count(files: Iterable[Path]) -> Count:
    total = Count()
    for path in files:
        text = path.read_text()
        name = str(path.relative_to(ROOT))
        total.lines[name] = text.count("\n") + 1
        total.stubs += len(STUB.findall(text))
        tree = ast.parse(text)
        total.headers += _header_lines(tree)
        total.keys |= set(_config_keys(tree))
        for node in ast.walk(tree):
            total.of_docstrings += _begins_with_of(node)
            total.vague += _is_vague(node)
            total.named_in[_name(node)].add(name)
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


def _header_lines(tree: ast.Module) -> int:
    head: list[ast.stmt] = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    if ast.get_docstring(tree) is not None:
        head.append(tree.body[0])
    return sum((node.end_lineno or node.lineno) - node.lineno + 1 for node in head)


def _config_keys(tree: ast.Module) -> Iterator[str]:
    """The fields of the module's sections: classes that derive from `Section`."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and any(isinstance(b, ast.Name) and b.id == "Section" for b in node.bases):
            yield from (_name(line) for line in node.body if isinstance(line, ast.AnnAssign))


def _name(node: ast.AST) -> str:
    """The name of an attribute, a keyword, a parameter or a field; "" for anything else."""
    match node:
        case ast.Attribute(attr=name) | ast.keyword(arg=str(name)) | ast.arg(arg=name):
            return name
        case ast.AnnAssign(target=ast.Name(id=name)):
            return name
    return ""


def _begins_with_of(node: ast.AST) -> bool:
    """Whether the node is a docstring, also of an attribute, that begins with a fragment."""
    text = node.value.value if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) else None
    return isinstance(text, str) and text.lstrip().startswith("Of ")


def _is_vague(node: ast.AST) -> bool:
    is_stored = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    return (is_stored and node.id in VAGUE) or (isinstance(node, ast.arg) and node.arg in VAGUE)


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
        "entries of the package": sum(
            p.name not in ("__pycache__", "py.typed") for p in (ROOT / "agent_lightning").iterdir()
        ),
        "most files in a folder": max(Counter(Path(name).parent for name in package.lines).values()),
        "headers, % of lines": round(100 * package.headers / lines, 1),
        "largest file": max(package.lines.values()),
        "longest function": max(package.functions.values()),
        "files that name a config key": len(package.named_in[most_named(package)]),
        "docstrings that begin with Of": package.of_docstrings,
        "vague variables": package.vague,
        "untyped returns, %": round(100 * package.untyped / len(package.functions), 1),
        "broad except per kloc": round(1000 * package.broad_excepts / lines, 2),
        "hasattr+getattr per kloc": round(1000 * package.attribute_tricks / lines, 2),
        "print calls": package.prints,
        "stubs": package.stubs,
        "mock/patch per kloc of tests": round(1000 * mocks / max(1, tests.count("\n")), 2),
    }


def most_named(package: Count) -> str:
    """The key of the config that most files name."""
    return max(
        sorted(key for key in package.keys if not GENERIC_KEYS.fullmatch(key)),
        key=lambda key: len(package.named_in[key]),
    )


def main() -> int:
    package = count(sorted((ROOT / "agent_lightning").rglob("*.py")))
    tests = "".join(path.read_text() for path in sorted((ROOT / "tests").rglob("*.py")))
    measured = figures(package, tests)
    missed = [name for name, value in measured.items() if value > TARGETS[name]]
    for name, value in measured.items():
        mark = "  missed" if name in missed else ""
        sys.stdout.write(f"{name:30} {value:>8g}   at most {TARGETS[name]:g}{mark}\n")
    for what, sizes in (("file", package.lines), ("function", package.functions)):
        size, name = max((size, name) for name, size in sizes.items())
        sys.stdout.write(f"longest {what}: {name}, {size} lines\n")
    key = most_named(package)
    sys.stdout.write(f"most named key: {key}, in {', '.join(sorted(package.named_in[key]))}\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
