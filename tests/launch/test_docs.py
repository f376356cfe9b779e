"""Every link and every file that the documentation names exists."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

from agent_lightning.api.cli.main import main
from agent_lightning.config.load import load

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
    site = (ROOT / "mkdocs.yml").read_text()
    assert pages == {name for name in pages if f"- {name}" in site}


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


def test_the_map_and_the_picture_have_the_order_of_the_import_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["id"] == "layers"]
    level = {room.strip(): number for number, layer in enumerate(layers) for room in layer.split("|")}
    rooms = re.findall(r"^\| `agent_lightning/([a-z]+)` \|", (ROOT / "AGENTS.md").read_text(), flags=re.M)
    picture = (ROOT / "docs/images/architecture.svg").read_text()
    drawn = [text for text in re.findall(r">([^<>]+)</text>", picture) if text in layers][-len(layers) :]
    assert sorted(rooms) == sorted(level)
    assert [level[room] for room in rooms] == sorted(level.values())
    assert drawn == layers


KEY = re.compile(r"(?<![\w./-])([a-z]+(?:\.[a-z_]+)+)(?=[=\s'\"\]]|$)")
NO_KEYS = {"agent.name", "agent.py", "agent.js", "credit.assign", "data.py"}
"""Words that look like a key of the config: an attribute of a span, files, a function."""


def test_every_key_that_a_page_names_is_in_the_config() -> None:
    config = load(["experiment=toy"])
    unknown = []
    for page in PAGES:
        if page.name == "CHANGELOG.md":  # it names the keys of earlier versions
            continue
        for code in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)):
            for key in KEY.findall(code):
                section, *names = key.split(".")
                value = getattr(config, section, None)
                for name in names if key not in NO_KEYS and value is not None else ():
                    if isinstance(value, Mapping):  # of the user's own names
                        break
                    if not hasattr(value, name):
                        unknown.append(f"{page.name}: {key}")
                        break
                    value = getattr(value, name)
    assert not unknown
