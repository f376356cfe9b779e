#!/usr/bin/env python3
"""Take the pictures of `agl view` in docs/images: python scripts/pictures.py build/pictures --musique data/musique

The folder gets a run of each kind, on vLLM and veRL; those that it has already are not made again. All take about ten
minutes on two cores. MuSiQue's questions are not in the repository; without `--musique` its pictures are left out.
It needs Playwright (`make venv-examples`) and a Chromium (`make browser`).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
AGL = (sys.executable, "-m", "agent_lightning")
SMALL = ("algorithm.tasks_per_step=12", "data.val.num=60", "eval_every=1")
MUSIQUE = "experiment=musique_tiny_relations"
RUNS = {
    "calc_tiny": ("experiment=calc_tiny", "steps=8", "eval_every=4"),
    "calc_team": ("experiment=calc_team", "credit=air", "steps=3", *SMALL),
    "musique": (MUSIQUE, "steps=2", *SMALL),
    # The reward of rows of another kind: every rollout fails.
    "failed": ("experiment=calc_tiny", "agent.reward=examples/calc_x/reward.py:score_sheet", "steps=3", *SMALL),
}
SWEEP = ("experiment=calc_tiny", "algorithm.lr=choice(1e-4,4e-4)", "sweep=grid", "steps=4", *SMALL)
WIDTH = 1200
SHORTEN = """root => {
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode())
    texts.currentNode.data = texts.currentNode.data.replaceAll(root + "/", "");
}"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="the folder of the runs")
    parser.add_argument("--musique", type=Path, help="the folder of MuSiQue's questions")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", help="the folder of the pictures")
    options = parser.parse_args()
    runs = options.runs.absolute()
    make_runs(runs, options.musique)
    command = [*AGL, "view", str(runs)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as playwright:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().strip()
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": WIDTH, "height": 640}, base_url=address.partition("/?")[0])
            page.goto(address)
            take_all(page, runs, options.out)
            take_running(page, runs, options.out)
            browser.close()
        finally:
            server.terminate()
    return 0


def make_runs(runs: Path, musique: Path | None) -> None:
    """Make the runs that the folder lacks, one after the other."""
    runs.mkdir(parents=True, exist_ok=True)
    for name, words in RUNS.items():
        if MUSIQUE in words:
            if musique is None:
                continue
            words = (*words, f"data.root={musique.absolute()}")
        if not (runs / name / "summary.json").exists():
            shutil.rmtree(runs / name, ignore_errors=True)
            command = [*AGL, "train", *words, f"runs_dir={runs}", f"name={name}"]
            subprocess.run(command, cwd=ROOT, check=name != "failed")
    if not list(runs.glob("sweep-*/experiment/best.yaml")):
        subprocess.run([*AGL, "sweep", *SWEEP, f"runs_dir={runs}"], cwd=ROOT, check=True)


def take_all(page: Page, runs: Path, out: Path) -> None:
    """A picture of every page, and of what each kind of run shows on its own."""
    sweep = max(runs.glob("sweep-*/experiment/best.yaml")).parents[1].name
    run = "/run/calc_tiny"
    take(page, "/", out / "view-runs.png")
    take(page, f"/sweep/{sweep}", out / "view-sweep.png")
    take(page, f"/compare?run={sweep}/trial-000&run={sweep}/trial-001", out / "view-compare.png", height=1000)
    take(page, run, out / "view-run.png", height=900)
    take(page, f"{run}/rollouts?split=train&step=2", out / "view-rollouts.png")
    take(page, first(page, "td a[href*='/group/']"), out / "view-group.png", height=900)
    # The worst rollout of the group that calls a tool: the tool's credit is what the picture is about.
    worst = page.locator(".card:has-text('1 tool ') a.open").last.get_attribute("href") or ""
    take(page, worst, out / "view-rollout.png", height=900)
    take(page, worst.replace("/rollout/", "/tokens/"), out / "view-narrow.png", width=400, height=800)
    take(page, f"{run}/tools", out / "view-tools.png")
    take(page, f"{run}/tasks", out / "view-tasks.png")
    take(page, first(page, "a.open"), out / "view-task.png")
    take(page, "/run/failed", out / "view-failed.png")
    take_rollout(page, "failed", "", out / "view-failed-rollout.png")
    take_rollout(page, "calc_team", "split=train&sort=calls", out / "view-team.png", height=900)
    tokens = page.url.replace("/rollout/", "/tokens/")
    take(page, tokens, out / "view-tokens.png", height=900)
    take(page, f"{tokens}?colour=gap", out / "view-gap.png", height=900)
    if (runs / "musique").is_dir():
        take_rollout(page, "musique", "split=train&sort=-reward&tool=search", out / "view-musique.png", height=900)


def take_running(page: Page, runs: Path, out: Path) -> None:
    """The picture of a run while it trains; the run is then stopped and removed."""
    running = runs / "running"
    command = [*AGL, "train", *RUNS["calc_tiny"], "steps=100", f"runs_dir={runs}", f"name={running.name}"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        try:
            while process.poll() is None and len(list(running.glob("rollouts/*.parquet"))) < 4:
                time.sleep(0.5)
            take(page, f"/run/{running.name}", out / "view-running.png")
        finally:
            process.terminate()
    shutil.rmtree(running)


def take_rollout(page: Page, run: str, query: str, picture: Path, height: int = 640) -> None:
    """The picture of the first rollout that the list of a run shows for a query."""
    page.goto(f"/run/{run}/rollouts?{query}")
    take(page, first(page, "a.open"), picture, height=height)


def first(page: Page, selector: str) -> str:
    """The address of the first such link on the page."""
    return page.locator(selector).first.get_attribute("href") or ""


def take(page: Page, path: str, picture: Path, *, width: int = WIDTH, height: int = 640) -> None:
    """Open a page and write its picture, at most `height` pixels high, in few colours so that it is a small file. Paths
    of this machine are shortened to those below the project's folder."""
    page.set_viewport_size({"width": width, "height": height})
    page.goto(path)
    page.evaluate(SHORTEN, str(ROOT))
    full = page.evaluate("Math.ceil(document.body.getBoundingClientRect().height)")
    page.set_viewport_size({"width": width, "height": min(height, int(full))})
    page.screenshot(path=picture)
    Image.open(picture).convert("RGB").quantize(128).save(picture, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
