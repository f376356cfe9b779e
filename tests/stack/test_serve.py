"""`agl serve` and `agl eval` on the real stack, as a user types them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from openai import OpenAI

pytestmark = [pytest.mark.stack, pytest.mark.timeout(400)]
ROOT = Path(__file__).parents[2]
TOOL = {"type": "function", "function": {"name": "calculator", "parameters": {"properties": {"expression": {}}}}}


def agl(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "agent_lightning.cli", *arguments]


@pytest.mark.slow
def test_serve_prints_a_url_that_answers_and_ctrl_c_leaves_nothing() -> None:
    process = subprocess.Popen(
        agl("serve", "experiment=calc_tiny"), cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    watchdog = threading.Timer(300, os.killpg, (process.pid, signal.SIGKILL))
    watchdog.start()
    try:
        assert process.stdout is not None
        text = ""
        while "OPENAI_API_KEY" not in text:  # ends with the process, which the watchdog ends
            line = process.stdout.readline()
            assert line, f"agl serve ended: {text}"
            text += line
        started = psutil.Process(process.pid).children(recursive=True)
        base_url = re.search(r"OPENAI_BASE_URL=(\S+)", text)[1]  # type: ignore[index]
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
    finally:
        watchdog.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_eval_prints_and_writes_json(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = agl("eval", "experiment=calc_tiny", "data.val.num=24", "--out", str(out))
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    result = json.loads(out.read_text())
    assert json.loads(said) == result
    assert (result["rows"], result["outcomes"]) == (24, {"finished": 24})
    assert 0.1 < result["reward"] < 0.9
    assert 1 <= result["calls_per_rollout"] <= 4
