"""agl view: what its pages say, who may read them, and that a rollout's text stays text."""

from __future__ import annotations

import fcntl
import html
import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient
from viewer_runs import HOSTILE, group, trajectory, write_library, write_run, write_sweep

import agent_lightning
from agent_lightning.api.cli.main import main
from agent_lightning.api.viewer.app import Viewer
from agent_lightning.api.viewer.command import find_rules
from agent_lightning.api.viewer.folder import Library, RunFiles, sweep_state
from agent_lightning.api.viewer.pages import rewards_by_step
from agent_lightning.api.viewer.rollout import common_prefix, turns
from agent_lightning.config.learning import CreditConfig
from agent_lightning.credit.assign import CreditRules
from agent_lightning.run.archive import RolloutWriter
from agent_lightning.run.index import Filters, RolloutIndex, error_form
from agent_lightning.run.tracking import take_folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_library(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def client(runs: Path) -> Iterator[TestClient]:
    viewer = Viewer(Library(runs), find_rules, token="secret")
    with TestClient(viewer.app, base_url="http://127.0.0.1", cookies={"agl_view": "secret"}) as client:
        yield client


def text_of(client: TestClient, path: str, status: int = 200) -> str:
    """The text of a page, without its markup."""
    response = client.get(path)
    assert response.status_code == status, response.text
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", response.text)))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/", "finished calc_tiny finished 3 of 3 0 → 1"),
        ("/", "all 16 rollouts of the step failed"),
        ("/", "killed it ended without a summary; go on with: agl train resume="),
        ("/", "sweep-calc_tiny finished 2 of 2 trials ended; 1 failed; best trial-000 0.600"),
        ("/run/finished", "held-out reward 0 → 1"),
        ("/run/finished", "KeyError: 'row …' × 3"),
        ("/run/finished", "Log-probability gap, engine to learner"),
        ("/run/finished", "Trained tokens by their lag"),
        ("/run/finished", "Staleness of trained tokens"),
        ("/run/failed", "failed : all 16 rollouts of the step failed"),
        ("/run/finished/rollouts", "56 of 56"),
        ("/run/finished/rollouts?split=val", "8 of 56"),
        ("/run/finished/rollouts?outcome=engine_error", "3 of 56"),
        ("/run/finished/rollouts?min_reward=0.5&max_reward=0.5", "12 of 56"),
        ("/run/finished/rollouts?step=2&split=train", "16 of 56"),
        ("/run/finished/rollouts?tool=calculator&status=ok&step=1", "16 of 56"),
        ("/run/finished/rollouts?tool=other", "No rollout fits these filters."),
        ("/run/finished/rollouts?agent=solver&text=ROW+8", "1 of 56"),
        ("/run/finished/rollouts?error=KeyError:+'row+…'", "3 of 56"),
        ("/run/finished/rollouts?page=2", "page 2 of 2"),
        ("/run/finished/rollouts?step=nonsense&page=99", "page 2 of 2"),
        ("/run/finished/group/train-4", "reward no reward advantage – masked_engine_error"),
        ("/run/finished/rollout/train-4-0", "tool calculator ok"),
        ("/run/finished/rollout/train-4-0", "ok calculator +0.10"),
        ("/run/finished/rollout/train-4-0", "3 messages that the call before had too"),
        ("/run/finished/rollout/train-4-3", "KeyError: 'row 4'"),
        ("/run/finished/rollout/train-4-0", "agl explain"),
        ("/run/finished/tokens/train-4-0", "12 trained tokens"),
        ("/run/finished/tokens/train-4-3", "not trained: masked_engine_error"),
        ("/run/finished/tokens/val-0-0?colour=logprob", "held out: never trained"),
        ("/run/finished/tools", "calculator 48 ok 48"),
        ("/run/finished/tasks", "task-0 0 1 2"),
        ("/run/finished/task/task-0", "at 2 steps"),
        ("/compare?run=finished&run=failed", "2 runs compared"),
        ("/compare?run=finished&run=failed", "steps 3 2"),
        ("/sweep/sweep-calc_tiny", "trial-001 failed – 0 1e-3 no room"),
        ("/run/sweep-calc_tiny~trial-000", "held-out reward"),
    ],
)
def test_pages_say_what_a_run_holds(client: TestClient, path: str, words: str) -> None:
    assert words in text_of(client, path)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/run/nowhere", "nowhere is no run in"),
        ("/run/finished/rollout/train-99-0", "has no rollout train-99-0"),
        ("/run/finished/group/train-99", "has no rollout train-99-0"),
        ("/run/finished/task/nothing", "has no rollout of the task nothing"),
        ("/sweep/nothing", "nothing is no sweep in"),
        ("/compare?run=finished", "tick two or more runs"),
        ("/run/..~..~etc", "is no run"),
        ("/nonsense", "there is no such page"),
    ],
)
def test_what_is_not_there_is_a_page_that_says_so(client: TestClient, path: str, words: str) -> None:
    assert words in text_of(client, path, 404)


def test_every_metric_that_the_page_of_a_run_draws_is_written_by_a_run() -> None:
    library = Path(agent_lightning.__file__).parent
    template = (library / "api/viewer/templates/run.html").read_text()
    keys = [key for part in re.findall(r"curves\([^{]*({[^}]*})", template) for key in re.findall(r"'([\w/]+)':", part)]
    rooms = ("core", "credit", "learners", "run")
    written = "".join(path.read_text() for room in rooms for path in (library / room).glob("*.py"))
    assert len(keys) > 15
    assert [key for key in keys if f'"{re.sub("[0-9]+$", "{q}", key)}"' not in written] == []


def test_every_link_of_every_page_leads_to_a_page(client: TestClient) -> None:
    seen: set[str] = set()
    waiting = ["/"]
    while waiting:
        path = waiting.pop()
        response = client.get(path)
        assert response.status_code == 200, path
        for href in re.findall(r'href="(/[^"]*)"', response.text):
            target = html.unescape(href).partition("#")[0]
            # One run stands for all, and the list's filters for each other.
            if target not in seen and ("/run/" not in target or "/run/failed" in target) and target.count("=") < 3:
                seen.add(target)
                waiting.append(target)
    assert len(seen) > 60


def test_text_of_rollouts_is_shown_as_text(client: TestClient) -> None:
    for page in (
        "",
        "/rollouts",
        "/group/train-4",
        "/rollout/train-4-0",
        "/tokens/train-4-0",
        "/tools",
        "/task/task-0",
    ):
        response = client.get(f"/run/hostile{page}")
        assert response.status_code == 200
        assert "<script>document" not in response.text
        assert "<img" not in response.text
        assert "49" not in re.findall(r"amp;(\S{1,6})", response.text)
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self'" in policy
        assert "unsafe" not in policy
        assert not re.search(r"<[^>]+\s(?:on\w+|style)=", response.text), "an inline script or style"
    assert HOSTILE.split("<img")[0] in html.unescape(client.get("/run/hostile/rollout/train-4-0").text)


def test_only_who_knows_the_token_reads_and_nobody_writes(runs: Path) -> None:
    viewer = Viewer(Library(runs), find_rules, token="secret")
    with TestClient(viewer.app, base_url="http://127.0.0.1", follow_redirects=False) as stranger:
        assert stranger.get("/").status_code == 403
        assert stranger.get("/?token=guess").status_code == 403
        assert stranger.get("/static/view.css").status_code == 403
        first = stranger.get("/run/finished?token=secret&step=1")
        assert (first.status_code, first.headers["location"]) == (307, "/run/finished?step=1")
        assert "httponly" in first.headers["set-cookie"].lower()
        assert "samesite=strict" in first.headers["set-cookie"].lower()
        assert stranger.get("/run/finished").status_code == 200, "the cookie opens the other pages"
        assert stranger.post("/run/finished").status_code == 405
        # A name that resolves to 127.0.0.1 (DNS rebinding) opens nothing.
        assert stranger.get("/", headers={"host": "evil.example"}).status_code == 400


def test_the_viewer_changes_nothing_in_a_run(runs: Path, client: TestClient) -> None:
    def files() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in runs.rglob("*")}

    before = files()
    for path in ("/", "/run/finished", "/run/finished/rollouts", "/run/finished/tokens/train-4-0"):
        client.get(path)
    assert files() == before


def test_a_running_run_is_followed(tmp_path: Path) -> None:
    path = write_run(tmp_path, "running", steps=1)
    (path / "summary.json").unlink()
    (path / "journal").mkdir()
    files = RunFiles(path)
    with (path / "journal" / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert files.state() == ("running", "")
        before, rows = files.versions(), len(files.index.table())
        RolloutWriter(path / "rollouts").write(2, 1, [group("train", 50, [1.0, 0.0])])
        assert files.versions() != before
        assert len(files.index.table()) == rows + 2
        with (path / "metrics.jsonl").open("a") as metrics:
            metrics.write('{"step": 2, "train/reward": 0.7}\n{"step": 3, "train/rew')
        assert files.series("train/reward")[-1] == (2, 0.7), "half a line is not read"
    assert files.state()[0] == "killed"


def test_a_damaged_part_costs_itself(tmp_path: Path) -> None:
    path = write_run(tmp_path, "damaged", steps=2)
    part = sorted((path / "rollouts").glob("*.parquet"))[1]
    part.write_bytes(part.read_bytes()[:200])
    viewer = Viewer(Library(tmp_path), find_rules, token="t")
    with TestClient(viewer.app, base_url="http://127.0.0.1", cookies={"agl_view": "t"}) as client:
        page = text_of(client, "/run/damaged")
        assert f"{part.name} cannot be read" in page
        assert "24" in page
        assert "24 of 24" in text_of(client, "/run/damaged/rollouts")


def test_tokens_have_the_colour_of_their_own_version(tmp_path: Path) -> None:
    path, written = write_run(tmp_path, "run", steps=1), group("train", 50, [1.0, 0.5])
    rollouts = [
        replace(t, calls=tuple(replace(call, new_versions=((4, 3),), last_version=3) for call in t.calls))
        for t in written.trajectories
    ]
    RolloutWriter(path / "rollouts").write(2, 1, [replace(written, trajectories=tuple(rollouts))])
    viewer = Viewer(Library(tmp_path), find_rules, token="t")
    with TestClient(viewer.app, base_url="http://127.0.0.1", cookies={"agl_view": "t"}) as client:
        page = client.get("/run/run/tokens/train-50-0?colour=version").text
    legend, *calls = page.split("<h2>Call")
    assert re.findall(r"tok c(\d)", legend) == ["2", "3"]
    assert [re.findall(r"tok c(\d)", shown) for shown in calls] == [["2"] * 4 + ["3"] * 2] * 2


def test_tokens_show_the_gap_between_engine_and_learner(tmp_path: Path) -> None:
    path, written = write_run(tmp_path, "run", steps=1), group("train", 50, [1.0, 0.5])
    call = written.trajectories[0].calls[0]
    logprobs = {("train-50-0", call.call_id): call.logprob_T + np.array([0, 2e-7, 0, -1e-6, 0, 0], np.float32)}
    rules, _, _ = find_rules(path / "config.yaml")
    RolloutWriter(path / "rollouts").write(2, 1, [written], rules, logprobs)
    viewer = Viewer(Library(tmp_path), find_rules, token="t")
    with TestClient(viewer.app, base_url="http://127.0.0.1", cookies={"agl_view": "t"}) as client:
        page = client.get("/run/run/tokens/train-50-0?colour=gap").text
        assert "were not computed" in client.get("/run/run/tokens/train-50-1?colour=gap").text
        assert "the rollout is held out" in client.get("/run/run/tokens/val-0-0?colour=gap").text
    legend, first, second = page.split("<h2>Call")
    assert "+9.5e-07" in legend, "the largest gap, in float32"
    assert re.findall(r'"tok ([a-z]*\d?)', first) == ["", "up1", "", "down5", "", ""]
    assert "gap -9.5e-07" in first
    assert "gap" not in second, "the second call was not in the first batch"


def test_without_a_config_the_credit_is_that_which_was_written(tmp_path: Path) -> None:
    path = write_run(tmp_path, "run", steps=1)
    RolloutWriter(path / "rollouts").write(
        2, 1, [group("train", 50, [1.0, 0.5, None])], find_rules(path / "config.yaml")[0]
    )

    def texts(*pages: str) -> list[str]:
        viewer = Viewer(Library(tmp_path), find_rules, token="t")
        with TestClient(viewer.app, base_url="http://127.0.0.1", cookies={"agl_view": "t"}) as client:
            return [text_of(client, f"/run/run/{page}") for page in pages]

    before = texts("group/train-50", "tokens/train-50-0")
    advantages = re.findall(r"[+-]\d\.\d{3}", before[1])
    assert len(advantages) == 2
    assert "masked_engine_error" in before[0]
    (path / "config.yaml").write_text("no: [config")
    after = texts("group/train-50", "group/train-4", "tokens/train-50-0", "tokens/train-4-0")
    assert after[0] == before[0]
    assert after[1].count("advantage –") == 4, "an old run wrote none"
    assert "12 trained tokens" in after[2]
    assert re.findall(r"[+-]\d\.\d{3}", after[2]) == advantages
    assert "⟨40⟩⟨41⟩" in after[2].replace(" ", ""), "without a model's name, tokens are ids"
    assert "their credit is not known" in after[3]


def test_a_run_that_was_resumed_with_other_rules_shows_the_credit_that_it_trained_with(tmp_path: Path) -> None:
    path = write_run(tmp_path, "run", steps=1)
    written = group("train", 50, [1.0, 0.5])
    RolloutWriter(path / "rollouts").write(2, 1, [written], CreditRules(credit=CreditConfig(scale="none")))
    rules, _, _ = find_rules(path / "config.yaml")
    assert rules is not None
    assert rules.credit.scale == "std"
    shown = RunFiles(path).credits(written, rules)
    assert [{call.advantage for call in calls or ()} for calls in shown] == [{0.25}, {-0.25}]
    assert any(call.events for calls in shown for call in calls or ()), "what the calls caused"


def test_a_group_that_was_written_again_counts_once(tmp_path: Path) -> None:
    writer = RolloutWriter(tmp_path)
    writer.write(1, 0, [group("train", 1, [0.0, 0.0])])
    last = writer.write(1, 0, [group("train", 1, [1.0, 0.5])])
    index = RolloutIndex(tmp_path)
    assert index.table().column("reward").to_pylist() == [1.0, 0.5]
    assert index.part_of("train-1") == last
    assert index.part_of("train-2") is None
    assert len(index.select(Filters(min_reward=0.9))) == 1


def test_the_best_and_the_worst_are_of_the_newest_step(tmp_path: Path) -> None:
    index, writer = RolloutIndex(tmp_path), RolloutWriter(tmp_path)
    assert index.best_and_worst() == []
    writer.write(1, 0, [group("train", 1, [0.0, 1.0])])
    writer.write(2, 1, [group("train", 2, [0.25, 0.75, 0.5]), group("val", 2, [1.0])])
    assert index.best_and_worst() == [("train-2-1", 0.75), ("train-2-0", 0.25)]


def test_a_folder_may_be_a_run_a_sweep_or_empty(runs: Path, tmp_path: Path) -> None:
    assert Library(runs / "finished").names() == ["finished"]
    assert Library(runs / "sweep-calc_tiny").names() == ["trial-000"]
    assert Library(runs / "sweep-calc_tiny").sweeps() == ["."]
    assert Library(tmp_path).names() == []
    viewer = Viewer(Library(tmp_path), find_rules, token="t")
    with TestClient(viewer.app, base_url="http://127.0.0.1", cookies={"agl_view": "t"}) as client:
        assert "There is no run in this folder yet" in text_of(client, "/")


def test_a_sweep_says_how_it_stands(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path)
    assert sweep_state(sweep) == ("finished", "2 of 2 trials ended; 1 failed; best trial-000 0.600")
    with take_folder(sweep, "sweep"):
        assert sweep_state(sweep)[0] == "running"
    (sweep / "sweep.yaml").write_text("command: [experiment=calc_tiny]\ntrials: 4\n")
    assert sweep_state(sweep)[0] == "stopped"
    assert (
        f"2 of 4 trials ended; 1 failed; best trial-000 0.600; go on with: agl sweep resume={sweep}"
        in (sweep_state(sweep)[1])
    )
    trials = sweep / "trials.jsonl"
    trials.write_text(trials.read_text().replace('"done"', '"failed"') * 2)
    assert sweep_state(sweep)[0] == "failed"
    for broken in ("{", "[]", '{"words": 1}'):
        trials.write_text(broken)
        state, why = sweep_state(sweep)
        assert (state, bool(why), "\n" in why) == ("damaged", True, False)
    trials.unlink()
    assert sweep_state(sweep)[0] == "stopped"


def test_rewards_of_a_group_are_one_number_of_an_interval(tmp_path: Path) -> None:
    RolloutWriter(tmp_path).write(1, 0, [group("train", 1, [0.0, 1.0]), group("train", 2, [1.0, 1.0])])
    assert rewards_by_step(RolloutIndex(tmp_path).table(), "train") == {1: [0.5, 1.0]}


def test_a_conversation_repeats_no_message() -> None:
    first, second = turns(trajectory("train", 1, 0, 1.0), None)
    assert [message.role for message in first.new] == ["system", "user"]
    assert not first.known
    assert [message.role for message in second.known] == ["system", "user", "assistant"]
    assert [message.role for message in second.new] == ["tool"]
    assert not first.tools, "its result is in the next request"


def test_a_copied_request_has_the_tools_on_offer() -> None:
    calls = trajectory("train", 1, 0, 1.0).calls
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    offers = [(), (json.dumps(tool),), ("add", "{")]  # the last as runs wrote them that kept only names
    rows = [
        turns(replace(trajectory("train", 1, 0, 1.0), calls=(replace(calls[0], offered=offered),)), None)[0]
        for offered in offers
    ]
    assert [row.offered for row in rows] == [(), ("add",), ("add", "{")]
    assert [json.loads(row.body).get("tools") for row in rows[:2]] == [None, [tool]]


@pytest.mark.parametrize(
    ("error", "form"),
    [
        ("KeyError: 'row 12'", "KeyError: 'row …'"),
        ("timeout after 3.5 s at 0x7f3a21", "timeout after … s at …"),
        ("no number", "no number"),
    ],
)
def test_equal_errors_have_one_form(error: str, form: str) -> None:
    assert error_form(error) == form


def test_common_prefixes() -> None:
    assert common_prefix("12+3", "12-3") == 2
    assert common_prefix("ab", "abc") == 2


def test_a_file_for_colleagues_holds_its_pages_and_no_address(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.html"
    assert main(["view", str(runs / "hostile"), "--out", str(out)]) == 0
    page = out.read_text()
    assert 'id="page-tokens-train-4-0"' in page
    assert "default-src 'none'" in html.unescape(page)
    assert "<script>document" not in page
    assert 'src="' not in page
    assert "http://127" not in page
    targets = set(re.findall(r'href="#([^"]+)"', page))
    assert targets <= set(re.findall(r'id="([^"]+)"', page)), "every link leads to a place in the file"


def test_bad_input_is_one_line(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["view", str(tmp_path / "nowhere")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert main(["view", str(runs), "--out", str(tmp_path / "a.html")]) == 2
    assert "is no run" in capsys.readouterr().err
    assert main(["view", str(runs / "finished"), "--out", str(tmp_path / "no" / "a.html")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_command_prints_an_address_that_opens(runs: Path) -> None:
    command = [sys.executable, "-m", "agent_lightning", "view", str(runs / "finished")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with opener.open(address, timeout=30) as response:
            assert b"finished" in response.read()
        for name in ("best", "worst"):
            line = process.stdout.readline()
            assert line.startswith(f"{name} of the last step (")
            with opener.open(line.split("): ")[1].strip(), timeout=30) as response:
                assert "/run/finished/tokens/train-" in response.url
        port = re.search(r":(\d+)/", address)
        assert port is not None
        assert main(["view", str(runs), "--port", port[1]]) == 2, "the port is in use"
        process.send_signal(2)
        assert process.wait(20) in (0, 130)
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
