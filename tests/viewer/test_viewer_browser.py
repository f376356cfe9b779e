"""The viewer in a real Chromium, on runs that are written by hand: hostile texts, keys, filters, copies."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import CHROMIUM, check_page, serving
from optional import needs
from viewer_runs import group, write_library, write_run

from agent_lightning.run.archive import RolloutWriter

pytestmark = [
    needs("playwright", "axe_playwright_python"),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH; `make browser` installs it"),
]
# test_viewer_runs.py has the pages of real runs.
PAGES = [
    *("/compare?run=finished&run=failed", "/run/killed", "/run/hostile", "/run/hostile/rollouts"),
    *("/run/hostile/group/train-4", "/run/hostile/rollout/train-4-0", "/run/hostile/tokens/train-4-0"),
    *("/run/hostile/tools", "/run/hostile/task/task-0", "/run/nowhere"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_library(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def address(runs: Path) -> Iterator[str]:
    with serving(runs) as lines:
        yield next(lines)


@pytest.mark.parametrize("path", PAGES)
def test_pages_are_readable_at_any_width_and_accessible(page: Any, path: str) -> None:
    check_page(page, path)


def test_links_filters_and_keys(page: Any) -> None:
    page.goto("/")
    page.click("a.open[href='/run/finished']")
    page.click("a:has-text('Rollouts')")
    page.select_option("select[name=outcome]", "engine_error")
    page.click("button:has-text('Filter')")
    assert page.locator("tbody tr").count() == 3
    assert "outcome=engine_error" in page.url
    page.keyboard.press("j")
    page.keyboard.press("j")
    assert page.locator("tr.at").count() == 1
    page.keyboard.press("Enter")
    page.wait_for_url("**/rollout/**")
    here = page.inner_text("[data-previous]").strip("[ ")
    page.keyboard.press("[")
    page.wait_for_url(f"**/rollout/{here}")
    page.keyboard.press("u")
    page.wait_for_url("**/group/**")
    page.goto("/run/finished")
    page.locator("svg a").first.click(force=True)
    page.wait_for_url("**/rollouts?split=*step=*")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"


def test_ticked_runs_are_compared(page: Any) -> None:
    page.goto("/")
    page.check("input[value=finished]")
    page.check("input[value=failed]")
    page.click("button:has-text('Compare')")
    assert "2 runs compared" in page.inner_text("h1")


def test_copies_and_tips(page: Any) -> None:
    page.goto("/run/finished/rollout/train-4-0")
    page.click("button:has-text('Copy as agl explain')")
    assert page.evaluate("navigator.clipboard.readText()").endswith("train-4-0 --tokens")
    page.goto("/run/finished/tokens/train-4-0")
    page.hover(".tokens .tok >> nth=0")
    assert "log-probability" in page.inner_text("#tip")
    assert "weight 1/12" in page.inner_text("#tip")


def test_a_running_run_shows_what_it_writes(page: Any, runs: Path) -> None:
    path = write_run(runs, "running", steps=1)
    (path / "summary.json").unlink()
    (path / "journal").mkdir()
    with (path / "journal" / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        page.goto("/run/running/rollouts")
        assert "running" in page.inner_text("header")
        assert "24 of 24" in page.inner_text("h1")
        RolloutWriter(path / "rollouts").write(2, 1, [group("train", 50, [1.0, 0.0])])
        page.locator("h1:has-text('26 of 26')").wait_for()


def test_the_file_for_colleagues_opens_without_a_server(page: Any, runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.html"
    command = [sys.executable, "-m", "agent_lightning", "view", str(runs / "hostile"), "--out", str(out)]
    subprocess.run(command, check=True)
    page.goto(out.as_uri())
    assert page.locator("section.page:visible").count() == 1
    page.click("nav.tabs a >> nth=0")
    page.click("section:visible a:has-text('tokens') >> nth=0")
    assert "Tokens of" in page.inner_text("section:visible h1")
