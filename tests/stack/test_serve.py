"""`agl serve` and `agl eval` on the real stack, as a user types them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from openai import OpenAI

pytestmark = [pytest.mark.stack, pytest.mark.timeout(400)]
ROOT = Path(__file__).parents[2]
TOOL = {"type": "function", "function": {"name": "calculator", "parameters": {"properties": {"expression": {}}}}}


def agl(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "agent_lightning", *arguments]


@contextmanager
def serving(*words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`agl serve` and the base URL that it prints."""
    process = subprocess.Popen(
        agl("serve", *words), cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    watchdog = threading.Timer(300, os.killpg, (process.pid, signal.SIGKILL))
    watchdog.start()
    try:
        assert process.stdout is not None
        text = ""
        while "GEMINI_API_KEY" not in text:  # ends with the process, which the watchdog ends
            line = process.stdout.readline()
            assert line, f"agl serve ended: {text}"
            text += line
        yield process, re.search(r"OPENAI_BASE_URL=(\S+)", text)[1]  # type: ignore[index]
    finally:
        watchdog.cancel()
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise


@pytest.mark.slow
def test_serve_prints_a_url_that_answers_and_ctrl_c_leaves_nothing() -> None:
    with serving("experiment=calc_tiny") as (process, base_url):
        started = psutil.Process(process.pid).children(recursive=True)
        with OpenAI(base_url=base_url, api_key="any", timeout=60) as client:
            assert [model.id for model in client.models.list()] == ["policy"]
            reply = client.chat.completions.create(
                model="policy",
                messages=[
                    {"role": "system", "content": "Solve the problem. Use the calculator."},
                    {"role": "user", "content": "Gita takes 76 figs out of a tray that held 85 figs. How many stay?"},
                ],
                tools=[TOOL],  # type: ignore[list-item]
            )
        assert reply.choices[0].finish_reason in ("tool_calls", "stop")
        assert not hasattr(reply, "prompt_token_ids")
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 0
        _, alive = psutil.wait_procs(started, timeout=20)
        assert [p.name() for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


@pytest.mark.slow
def test_serve_has_no_limit_of_calls_and_writes_each(tmp_path: Path) -> None:
    with serving("experiment=toy", "agent.max_calls=2", f"runs_dir={tmp_path}") as (_, base_url):
        ids = []
        with OpenAI(base_url=base_url, api_key="any", timeout=60) as client:
            for number in range(5):
                again = {"previous_response_id": ids[-1]} if ids else {}
                reply = client.responses.create(model="policy", input=f"Heads or tails {number}?", **again)  # type: ignore[call-overload]
                ids.append(reply.id)
        (written,) = tmp_path.glob("serve-toy-*/calls.jsonl")
        rollouts = [json.loads(line) for line in written.read_text().split("\n") if line]
    assert [rollout["calls"][0]["call_id"] for rollout in rollouts] == ids
    assert len(json.loads(rollouts[-1]["calls"][0]["request"])) == 9
    assert "/attempt/0/" not in written.read_text()


@pytest.mark.slow
def test_of_several_gateways_a_retry_reaches_the_one_that_has_the_first_answer() -> None:
    with serving("experiment=toy", "serving.gateways=2") as (process, base_url):
        (proxy,) = [p for p in psutil.Process(process.pid).children(recursive=True) if p.name() == "haproxy"]
        config = Path(proxy.cmdline()[proxy.cmdline().index("-f") + 1])
        # It would log the URL of each call, and the secret in it, to whatever listens on UDP port 514.
        assert re.findall(r"^ +log (.*)$", config.read_text(), re.MULTILINE)[0] == "/dev/null local0 info"
        assert config.parent.parent.stat().st_mode & 0o777 == 0o700  # so that its admin socket is the owner's only
        assert (config.parent / "admin.sock").is_socket()
        url = f"{base_url}/chat/completions"
        body = {"model": "policy", "messages": [{"role": "user", "content": "Heads or tails?"}]}

        def ask(retries: int) -> str:
            reply = httpx.post(url, json=body, headers={"x-stainless-retry-count": str(retries)}, timeout=60)
            return str(reply.raise_for_status().json()["id"])

        first = ask(0)
        assert {ask(retries) for retries in range(1, 21)} == {first}
        assert ask(0) != first


@pytest.mark.slow
def test_eval_prints_and_writes_json(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = agl("eval", "experiment=calc_tiny", "data.val.num=24", "--out", str(out))
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    result = json.loads(out.read_text())
    assert json.loads(printed) == result
    assert (result["rows"], result["outcomes"]) == (24, {"finished": 24})
    assert 0.1 < result["reward"] < 0.9
    assert 1 <= result["calls_per_rollout"] <= 4
