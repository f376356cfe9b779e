"""The viewer in a real Chromium, on runs that agents and the loop have made: every page of each kind of run."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import toy_runs
from browsing import CHROMIUM, check_page, let_in, serving, watched_page
from optional import needs

from agent_lightning.api.viewer.folder import RunFiles
from agent_lightning.run.archive import read_rollouts

pytestmark = [
    needs("playwright", "axe_playwright_python", "agents", "bm25s"),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH; `make browser` installs it"),
]
ROOT = Path(__file__).parents[2]
STEPS = "[...document.querySelectorAll('.facts div')].find(fact => fact.textContent.includes('steps')).innerText"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    asyncio.run(toy_runs.make_all(root))
    return root


@pytest.fixture(scope="module")
def address(runs: Path) -> Iterator[str]:
    with serving(runs) as lines:
        yield next(lines)


def pages_of(run: Path) -> list[str]:
    """A page of each kind of a run: of its best rollout, or of a held-out one if it trained none."""
    rows = read_rollouts(run).to_pylist()
    ranked = RunFiles(run).index.best_and_worst()
    name = ranked[0][0] if ranked else rows[0]["rollout_id"]
    task = quote(next(row["task_id"] for row in rows if row["split"] == "val"), safe="")
    pages = [
        "",
        "/rollouts",
        "/rollouts?split=val&sort=reward",
        f"/group/{name.rpartition('-')[0]}",
        f"/rollout/{name}",
    ]
    pages += [f"/tokens/{name}", *(f"/tokens/{name}?colour={colour}" for colour in ("logprob", "version", "gap"))]
    return [f"/run/{run.name}{page}" for page in (*pages, "/tools", "/tasks", f"/task/{task}")]


def check_run(page: Any, run: Path, pages: Sequence[str], *, every_link: bool = False) -> None:
    """Every page is as it must be, every link of them answers, filters filter, and keys lead from page to page."""
    links = {link for path in pages for link in check_page(page, path)}
    assert len(links) > 10
    if not every_link:  # of links that differ in a number only, one
        links = set({re.sub(r"\d+", "#", link): link for link in links}.values())
    assert {link for link in links if page.request.get(link).status != 200} == set()
    rows = read_rollouts(run).to_pylist()
    held_out = [row for row in rows if row["split"] == "val"]
    page.goto(f"/run/{run.name}/rollouts")
    page.select_option("select[name=split]", "val")
    page.fill("input[name=text]", word := held_out[0]["task_id"])
    page.press("input[name=text]", "Enter")
    page.wait_for_url("**split=val*")
    fit = [row for row in held_out if word in row["task"] + row["output"] + row["error"]]
    assert f"{len(fit):,} of {len(rows):,}" in page.inner_text("h1")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_url("**/rollout/val-*")
    page.keyboard.press("u")
    page.wait_for_url("**/group/val-*")


@pytest.mark.parametrize("kind", toy_runs.KINDS)
def test_every_page_of_a_run(page: Any, runs: Path, kind: str) -> None:
    pages = pages_of(runs / kind)
    check_run(page, runs / kind, pages if kind == "calc_team" else [pages[0], *pages[3:6], *pages[9:10]])
    rows = read_rollouts(runs / kind).to_pylist()
    page.goto(next(path for path in pages if "/rollout/" in path))
    text = page.inner_text("main")
    if kind == "failed":
        assert "KeyError: 'rows'" in text
        assert "reward.py" in text, "the user's file and line"
        page.goto(pages[0])
        assert "all 4 rollouts of the evaluation failed" in page.inner_text(".notice.bad")
    else:
        assert {"musique": "<think>", "calc_team": "writer"}.get(kind, "The answer is") in text
        assert {row["outcome"] for row in rows} == {"finished"}
        page.goto(next(path for path in pages if "/tokens/" in path))
        texts = page.inner_text(".turn >> nth=0")
        assert any(words in texts for words in toy_runs.KINDS[kind].says), "the toy's tokens are its words"
        page.goto(next(path for path in pages if "colour=gap" in path))
        gap = (
            "nats, learner minus engine"
            if page.locator(".tok:not(.untrained)").count() > 3
            else "none of them is trained"
        )
        assert gap in page.inner_text(".legend")


def test_a_sweep(page: Any, runs: Path) -> None:
    check_page(page, "/")
    (link,) = page.eval_on_selector_all("a[href^='/sweep/']", "links => links.map(link => link.getAttribute('href'))")
    links = check_page(page, link)
    assert "no room" in page.inner_text("main")
    trials = [name for name in links if "~trial-" in name]
    assert len(trials) == 2
    for trial in trials:
        check_page(page, trial)


def test_a_running_run_is_followed_without_a_reload(page: Any, runs: Path) -> None:
    with subprocess.Popen([sys.executable, toy_runs.__file__, str(runs)]) as process:
        try:
            while not list(runs.glob("running/rollouts/*.parquet")):
                page.wait_for_timeout(100)
                assert process.poll() is None
            page.goto("/run/running")
            assert "running" in page.inner_text("header")
            page.evaluate("window.mark = 1")
            seen = page.evaluate(STEPS)
            page.wait_for_function(f"seen => {STEPS} !== seen", arg=seen)
            page.wait_for_selector(".charts svg")
            check_page(page, pages_of(runs / "running")[4])
            page.goto("/run/running")
            page.evaluate("window.mark = 1")
            process.terminate()
            page.wait_for_selector("header .state-stopped")
            assert page.evaluate("window.mark") == 1, "it was never loaded again"
        finally:
            process.kill()


def check_best_and_worst(browser: Any, run: Path) -> None:
    """`agl view RUN` prints the addresses of the tokens of the best and the worst rollout of the last step."""
    rows = [row for row in read_rollouts(run).to_pylist() if row["split"] == "train"]
    rewards = [row["reward"] for row in rows if row["step"] == max(row["step"] for row in rows)]
    with serving(run) as lines, watched_page(let_in(browser, next(lines))) as page:
        for name, reward in (("best", max(rewards)), ("worst", min(rewards))):
            line = next(lines)
            assert line.startswith(f"{name} of the last step ({reward:.3f}): ")
            page.goto(line.split("): ")[1])
            rollout = page.inner_text("h1").split()[2]
            assert [row["reward"] for row in rows if row["rollout_id"] == rollout] == [reward]
            assert page.locator(".tokens .tok").count() > 0
            page.keyboard.press("j")
            assert "log-probability" in page.inner_text("#tip")


def test_the_printed_addresses_open_the_best_and_the_worst_rollout(browser: Any, runs: Path) -> None:
    check_best_and_worst(browser, runs / "calc_tiny")


def write_songs(folder: Path) -> None:
    """Files of MuSiQue with hops of our own; training and held-out songs have different names."""

    def rows(prefix: str) -> list[dict[str, Any]]:
        songs = json.loads(
            json.dumps(toy_runs.SONGS).replace("Harbour", f"{prefix} Harbour").replace("Blue", f"{prefix} Blue")
        )
        hops = [{"question": song["question"], "answer": song["answer"], "paragraph_support_idx": 0} for song in songs]
        return [
            song | {"id": f"{prefix}-{song['id']}", "answer_aliases": [], "question_decomposition": [hop]}
            for song, hop in zip(songs, hops, strict=True)
        ]

    train = [row for prefix in ("Old", "New", "East", "West", "Low", "High") for row in rows(prefix)]
    files = {"train": train, "train_unanswerable": [], "dev": rows("Great")}
    for name, content in files.items():
        with gzip.open(folder / f"{name}_with_paragraphs.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in content)


@pytest.mark.stack
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_page_of_runs_of_the_real_stack(tmp_path: Path, browser: Any) -> None:
    """What scripts/pictures.py makes: runs on vLLM and veRL, a sweep of two, and a picture of each page."""
    runs, pictures = tmp_path / "runs", tmp_path / "pictures"
    pictures.mkdir()
    write_songs(tmp_path)
    command = [sys.executable, "scripts/pictures.py", str(runs), "--out", str(pictures), "--musique", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    assert max(picture.stat().st_size for picture in pictures.glob("view-*.png")) < 150_000
    assert len(list(pictures.glob("view-*.png"))) > 12
    with serving(runs) as lines, watched_page(let_in(browser, next(lines))) as page:
        for kind in ("calc_tiny", "calc_team", "musique", "failed"):
            page.emulate_media(color_scheme="dark" if kind == "calc_team" else "light")
            check_run(page, runs / kind, pages_of(runs / kind), every_link=True)
        for path in ("/", *check_page(page, "/")):
            if path == "/" or path.startswith("/sweep/"):
                assert {link for link in check_page(page, path) if page.request.get(link).status != 200} == set()
    check_best_and_worst(browser, runs / "calc_tiny")
