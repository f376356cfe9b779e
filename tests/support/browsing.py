"""The viewer in a real Chromium: its server, a browser that is let in, and what every page must fulfil."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def serving(place: Path) -> Iterator[Iterator[str]]:
    """Run `agl view PLACE`; yields the lines that it prints, the first of which is its address."""
    command = [sys.executable, "-m", "agent_lightning", "view", str(place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield (line.strip() for line in process.stdout)
        finally:
            process.terminate()


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser. There can be one at a time in a process."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def let_in(browser: Any, address: str) -> Any:
    """A context of the browser that has opened the address which the command printed."""
    context = browser.new_context(base_url=address.partition("/?")[0])
    context.set_default_timeout(120_000)  # a busy machine is no failure
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    context.new_page().goto(address)
    return context


@contextmanager
def watched_page(context: Any) -> Iterator[Any]:
    """A new page. Fails if its console has shown an error, or if its content ran as a script."""
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    yield page
    assert page.title() != "owned"
    page.close()
    assert [problem for problem in problems if "404" not in problem] == []


def check_page(page: Any, path: str) -> set[str]:
    """Open a page: it fits into 400 and into 1600 pixels, and axe has no serious findings. Returns its links."""
    from axe_playwright_python.sync_playwright import Axe

    page.goto(path)
    for width in (1600, 400):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{path} is wider than {width} pixels"
    violations = Axe().run(page).response["violations"]
    serious = [
        (item["id"], item["nodes"][0]["html"]) for item in violations if item["impact"] in ("serious", "critical")
    ]
    assert serious == [], path
    return set(page.eval_on_selector_all("a[href^='/']", "links => links.map(link => link.getAttribute('href'))"))
