"""docs/traces.md says what the tables in code say; where it does not, a failing test prints the table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from agent_lightning.spans import conventions, otlp
from agent_lightning.spans.attributes import FIELDS, KINDS, PRESENT, Kind
from agent_lightning.spans.traces import formats as trace_files
from agent_lightning.spans.traces import imports

PAGE = (Path(__file__).parents[2] / "docs" / "traces.md").read_text(encoding="utf-8")


def kinds() -> str:
    rows = ["| attribute | model call | tool call | agent | not ours |", "|---|---|---|---|---|"]
    for name, values in KINDS:
        cells = [
            [f"`{value}`" for value, kind in values.items() if kind is wanted]
            for wanted in Kind
            if wanted is not Kind.REWARD
        ]
        rows.append(f"| `{name}` | " + " | ".join(", ".join(cell) for cell in cells) + " |")
    return "\n".join(rows)


def present() -> str:
    rows = ["| attribute that is present | the span is a |", "|---|---|"]
    return "\n".join([*rows, *(f"| `{name}` | {kind.value} |" for name, kind in PRESENT)])


def fields() -> str:
    rows = ["| what is read | attributes, the best first |", "|---|---|"]
    return "\n".join([*rows, *(f"| {what} | {', '.join(f'`{n}`' for n in names)} |" for what, names in FIELDS.items())])


def reasons(table: Mapping[str, str]) -> str:
    return "\n".join(["| reason | meaning |", "|---|---|", *(f"| {name} | {why} |" for name, why in table.items())])


TABLES = {
    "what a span is": kinds(),
    "what says so by being there": present(),
    "attributes": fields(),
    "OTLP bodies": reasons(otlp.REASONS),
    "spans": reasons(conventions.REASONS),
    "files": reasons(trace_files.REASONS | imports.REASONS),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_page_has_the_table_that_the_code_has(name: str) -> None:
    assert TABLES[name] in PAGE, f"docs/traces.md should have:\n\n{TABLES[name]}\n"


@pytest.mark.parametrize("name", [name for name, _, _ in trace_files.FORMATS])
def test_the_page_names_every_format_of_a_file(name: str) -> None:
    assert f"| {name} |" in PAGE
