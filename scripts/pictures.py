#!/usr/bin/env python3
"""Take the pictures of `agl view` in docs/images from a run: python scripts/pictures.py runs/calc_tiny-s0

It needs Playwright (`make venv-examples`) and a Chromium (`make browser`).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

OUT = Path(__file__).resolve().parent.parent / "docs" / "images"


def main(run: Path) -> int:
    command = [sys.executable, "-m", "agent_lightning.cli", "view", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as playwright:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 640}, base_url=address.partition("/?")[0])
        page.goto(address)
        take(page, f"/run/{run.name}", "view-run", height=900)
        take(page, f"/run/{run.name}/rollouts?split=train", "view-rollouts")
        group = page.get_attribute("td a[href*='/group/']", "href") or ""
        take(page, group, "view-group")
        # The worst rollout of the group that calls a tool: the tool's credit is what the picture is about.
        worst = page.locator(".card:has-text('1 tools') a.open").last.get_attribute("href") or ""
        take(page, worst, "view-rollout", height=900)
        take(page, worst.replace("/rollout/", "/tokens/"), "view-tokens")
        take(page, f"/run/{run.name}/tools", "view-tools")
        take(page, f"/run/{run.name}/tasks", "")
        take(page, page.get_attribute("a.open", "href") or "", "view-task")
        browser.close()
        server.terminate()
    return 0


def take(page: Page, path: str, name: str, height: int = 640) -> None:
    """Open a page and write its picture, at most `height` pixels high; without a name it is only opened."""
    page.goto(path)
    if name:
        page.set_viewport_size({"width": 1200, "height": height})
        full = page.evaluate("document.documentElement.scrollHeight")
        page.set_viewport_size({"width": 1200, "height": min(height, int(full))})
        page.screenshot(path=OUT / f"{re.sub('[^a-z-]', '', name)}.png")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
