"""Hooks of mkdocs: links to files of the repository that are no pages, and pages that a page of the site repeats."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)#\s]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Show a link to a file outside of docs/ as that file's path, since the site has no page for it; with `repo_url` in
    mkdocs.yml it leads there. Raises PluginError if there is no such file."""

    def replace(match: re.Match[str]) -> str:
        text, target = match[1], match[2]
        path = (Path(page.file.abs_src_path).parent / target).resolve()
        if not path.exists() or not path.is_relative_to(ROOT):
            raise PluginError(f"{page.file.src_uri}: {target} does not exist")
        name = path.relative_to(ROOT).as_posix()
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{name})"
        return text if text.strip("`") == name or name.endswith(text.strip("`")) else f"{text} (`{name}`)"

    return LINK.sub(replace, markdown)
