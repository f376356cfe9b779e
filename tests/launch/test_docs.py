"""Every link and every file that the documentation names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from agent_lightning.cli.main import main

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*/README.md")],
    key=lambda page: page.as_posix(),
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED_FILE = re.compile(
    r"(?<![\w./-])(?:agent_lightning|tests|examples|conf|benchmarks|scripts|deploy|requirements|docs)/"
    r"[\w./-]*\w\.(?:py|md|yaml|sh|lock|in|js|json|jinja|png|svg)\b"
)
NAMED_MODULE = re.compile(r"(?<![\w./-])agent_lightning(?:\.[a-z_]+)+\b(?!\.)")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def is_module(name: str) -> bool:
    """True if `name` is a package, a module, or a name that a module or a package offers: agent_lightning.tool."""
    path = ROOT / name.replace(".", "/")
    offered_by = [path.parent.with_suffix(".py"), path.parent / "__init__.py"]
    is_offered = any(file.is_file() and re.search(rf"\b{path.name}\b", file.read_text()) for file in offered_by)
    return path.is_dir() or path.with_suffix(".py").is_file() or is_offered


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text()
    missing = []
    for link in LINK.findall(text):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    missing += [name for name in NAMED_FILE.findall(text) if not (ROOT / name).exists()]
    missing += [name for name in NAMED_MODULE.findall(text) if not is_module(name)]
    assert not missing, f"{page.relative_to(ROOT)} names what does not exist: {missing}"


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages == {name for name in pages if f"]({name})" in index}


def test_the_pages_list_every_command_experiment_and_algorithm(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"^    ([a-z]+)(?: |$)", capsys.readouterr().out, flags=re.M)
    cli, experiments, credit = (
        (ROOT / "docs" / name).read_text() for name in ("cli.md", "experiments.md", "credit.md")
    )
    assert len(commands) > 10
    assert [command for command in commands if f"`agl {command}" not in cli] == []
    assert [
        path.stem for path in (ROOT / "conf/experiment").glob("*.yaml") if f"`{path.stem}`" not in experiments
    ] == []
    assert [path.stem for path in (ROOT / "conf/algorithm").glob("*.yaml") if f"| `{path.stem}` |" not in credit] == []
