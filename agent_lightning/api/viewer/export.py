"""`agl view RUN --out FILE.html`: the pages of a run's curves and of its most telling groups in one file."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Final

from markupsafe import Markup

from agent_lightning.api.viewer import pages, rollout, tokens
from agent_lightning.api.viewer.app import HERE, FindRules, templates
from agent_lightning.api.viewer.folder import RunFiles
from agent_lightning.api.viewer.pages import Context, Links
from agent_lightning.core import files
from agent_lightning.run.index import Filters

GROUPS: Final = 12
"""Groups in the file: those with the widest spread of rewards, the newest of them first."""


class _Anchors(Links):
    """Addresses within the file; "" for a page that is not in it."""

    def __init__(self) -> None:
        self.included: set[str] = {""}

    def home(self) -> str:
        return "#page-"

    def run(self, run: str, page: str = "", /, **query: object) -> str:
        return f"#page-{page.replace('/', '-')}" if page in self.included else ""


def write_file(run: RunFiles, find_rules: FindRules, out: Path) -> None:
    """Write the file: it needs no server and no network. Raises OSError."""
    links = _Anchors()
    environment = templates(links)
    table = run.index.select(Filters(split="train"))
    order, _ = pages.sorted_rows(table, "spread")
    ids = table.column("group_id").to_pylist()
    groups = [run.group(f"{name}-0") for name in list(dict.fromkeys(ids[row] for row in order))[:GROUPS]]
    for group in groups:
        keys = [trajectory.key.rollout_id for trajectory in group.trajectories]
        links.included |= {f"group/{group.group_id}", *(f"rollout/{key}" for key in keys)}
        links.included |= {f"tokens/{key}" for key in keys}
    rules, decode, problem = find_rules(run.directory.config)
    state, reason = run.state()
    shared: Context = {"run": run.name, "path": run.directory.path, "state": state, "reason": reason}

    def section(page: str, template: str, values: Context) -> Markup:
        name = page.replace("/", "-")
        context = shared | values | {"anchor": f"{name}-", "name": name, "layout": "section.html"}
        return Markup(environment.get_template(template).render(context))

    sections = [section("", "run.html", pages.run_page(run.name, run, links))]
    for group in groups:
        credits = run.credits(group, rules)
        sections.append(section(f"group/{group.group_id}", "group.html", rollout.group_page(group, credits)))
        for trajectory in group.trajectories:
            key = trajectory.key.rollout_id
            sections.append(section(f"rollout/{key}", "rollout.html", rollout.rollout_page(group, key, credits)))
            values = tokens.tokens_page(group, key, credits, decode, "advantage", problem)
            sections.append(section(f"tokens/{key}", "tokens.html", values))
    style, script = ((HERE / "static" / name).read_text(encoding="utf-8") for name in ("view.css", "view.js"))
    values = {"style": Markup(style), "script": Markup(script), "sections": sections, "groups": groups}
    values |= {"policy": f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'"}
    files.write_text(out, environment.get_template("file.html").render(shared | values))


def _digest(text: str) -> str:
    """The name by which a content security policy allows this text, and no other, as a script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
