"""A policy on the real stack in a process of its own, which several test modules share: see tests/stack/conftest.py."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[2]
CONTEXT = 5600
"""Tokens. Some frameworks' prompts are longer than the tiny policy's 1,024, beyond which it says nothing sensible."""
QWEN = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1}
"""Sampling defaults of Qwen2.5-Instruct's generation_config.json, which must change nothing."""
CONFIG = ("experiment=calc_tiny", f"model.max_len={CONTEXT}", "sampling.val.max_tokens=160", "agent.max_calls=100000")


@dataclass(kw_only=True)
class Rollout:
    """An open rollout of the policy's server."""

    root: str
    """Base URL for Anthropic's clients; OpenAI's want it with /v1 at its end."""
    calls: list[dict[str, Any]] = field(default_factory=list)
    """What was recorded, after its end: call_id, request and reply (JSON texts), finish_reason, tokens, logprobs,
    prompt."""
    tools: list[dict[str, Any]] = field(default_factory=list)
    """Also after its end: name, arguments, result, status and call_id of each tool call."""


class PolicyServer:
    """The server's process. `split` is "val" (greedy, the agent's sampling parameters hold) or "train"."""

    def __init__(self, *overrides: str) -> None:
        self._folder = TemporaryDirectory()
        model = Path(shutil.copytree(ROOT / "examples" / "calc_x" / "tiny_policy", f"{self._folder.name}/policy"))
        config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": CONTEXT}
        (model / "config.json").write_text(json.dumps(config))
        ends = json.loads((model / "generation_config.json").read_text())
        (model / "generation_config.json").write_text(json.dumps(ends | QWEN))
        self.model = model
        program = str(Path(__file__).with_name("serve_policy.py"))
        command = [sys.executable, program, *CONFIG, f"model.path={model}", *overrides]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self._lock = threading.Lock()
        self.url: str = self._read()["url"]

    @property
    def pid(self) -> int:
        """Of the process from which all others of the stack descend."""
        return self._process.pid

    @contextmanager
    def rollout(self, split: str = "val") -> Iterator[Rollout]:
        """A rollout of its own, open in the block."""
        opened = self._ask({"open": split})
        rollout = Rollout(root=opened["root"])
        try:
            yield rollout
        finally:
            recorded = self._ask({"close": opened["key"]})
            rollout.calls.extend(recorded["calls"])
            rollout.tools.extend(recorded["tools"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._folder.cleanup()

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        with self._lock:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("@"):
                answer: dict[str, Any] = json.loads(line[1:])
                return answer
        raise AssertionError("the policy's server has ended; its errors are above")
