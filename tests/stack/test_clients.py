"""The clients themselves, with their defaults, on the real engine. Each case of tests/clients has a rollout of its own;
its verdict says whether the client got its answer, and whether the Buffer holds each call once, with its tools.

docs/frameworks.md has the table of what ran here: AGL_WRITE_MATRIX=1 writes it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from policy_server import PolicyServer, Rollout

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / "tests" / "clients"
NODE = CLIENTS / "node"
PAGE = ROOT / "docs" / "frameworks.md"
BEGIN, END = "<!-- printed by tests/stack/test_clients.py -->\n", "<!-- end -->\n"
PYTHON = {
    "clients": (
        "openai_sdk openai_agents langgraph_agents autogen_agents pydantic_agents litellm_calls smolagents_agents "
        "dspy_programs google_genai"
    ),
    "crewai": "crewai_crews instructor_models",
}
"""The programs that run in each environment, .venv-NAME."""
COMMANDS = (
    *(([str(ROOT / f".venv-{name}/bin/python"), "harness.py", *PYTHON[name].split()], CLIENTS) for name in PYTHON),
    (["node", "clients.js"], NODE),
)
"""Each environment's command and folder."""
IS_INSTALLED = all(shutil.which(command[0]) for command, _ in COMMANDS) and (NODE / "node_modules").is_dir()
pytestmark = [
    pytest.mark.stack,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not IS_INSTALLED, reason="`make venv-clients` was not run, or there is no Node"),
]
NO_REPORTS = {
    "CREWAI_DISABLE_TELEMETRY": "true",
    "CREWAI_TRACING_ENABLED": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OTEL_SDK_DISABLED": "true",
}
"""What keeps clients from services of their makers."""
COLUMNS = {
    "plain": "no tools",
    "tool": "a tool",
    "forced tool": "a forced tool",
    "structured": "a JSON schema",
    "structured by a tool": "an object by a tool",
    "second turn": "a second turn by id",
}
"""Features, in the words of the table."""
NOTES = {"tool in text": "tool", "forced tool answered in text": "forced tool"}
"""Features that are noted in the column of another one."""


@dataclass(frozen=True)
class Result:
    """What one case came to."""

    client: str
    version: str
    feature: str
    streamed: bool
    fault: str
    """Empty if all is well."""


def run(server: PolicyServer, command: Sequence[str], folder: Path) -> list[Result]:
    """The results of all cases of a command."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OPENAI_BASE_URL")}
    environment |= NO_REPORTS
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=folder, env=environment, **pipes)
    assert process.stdin is not None
    assert process.stdout is not None
    with ExitStack() as stack:
        stack.callback(process.kill)
        first = process.stdout.readline()
        assert first, f"{command}: {process.stderr.read()[-3000:]}"
        opened = [stack.enter_context(server.rollout()) for _ in range(json.loads(first)["cases"])]
        output, errors = process.communicate("".join(f"{rollout.root}\n" for rollout in opened), timeout=400)
    lines = {line["root"]: line for line in map(json.loads, output.splitlines())}
    assert len(lines) == len(opened), f"{command}: {errors[-3000:]}"
    return [result(lines[rollout.root], rollout) for rollout in opened]


def result(line: dict[str, Any], rollout: Rollout) -> Result:
    faults = [line["error"]] if line["error"] else list(faults_of_record(line, rollout))
    named = {name: line[name] for name in ("client", "version", "feature", "streamed")}
    return Result(**named, fault="; ".join(faults))


def faults_of_record(line: dict[str, Any], rollout: Rollout) -> list[str]:
    """What is wrong with what the Buffer holds of a case, given what its client saw."""
    faults = []
    calls = rollout.calls
    if len(calls) != line["calls"] or len({call["call_id"] for call in calls}) != len(calls):
        faults.append(f"{line['calls']} calls were made, {len(calls)} are recorded")
    for call in calls:
        if not call["prompt"] or not call["tokens"] or len(call["tokens"]) != len(call["logprobs"]):
            faults.append(f"{call['call_id']} has {len(call['tokens'])} tokens, {len(call['logprobs'])} logprobs")
        if not all(math.isfinite(value) and value < 1e-3 for value in call["logprobs"]):
            faults.append(f"{call['call_id']} has log-probabilities that are none")
    said = texts(calls[-1]["reply"]) if calls else []
    if not line["text"] or not any(line["text"] in text or value(text) == value(line["text"]) for text in said):
        faults.append(f"the client read {line['text']!r}, and {said} is recorded")
    if line["feature"] == "second turn" and texts(calls[0]["reply"])[0] not in calls[-1]["request"]:
        faults.append("the policy did not see its first answer in the second turn")
    recorded = [(tool["name"], tool["status"]) for tool in rollout.tools]
    if recorded != (expected := tools_expected(line, rollout)):
        faults.append(f"the tools {recorded} are recorded, not {expected}")
    for tool, (_, got) in zip(rollout.tools, line["tools"], strict=False):
        if tool["status"] == "ok" and got not in (tool["result"], *fields(tool["result"])):
            faults.append(f"the tool's result {got} is recorded as {tool['result']}")
    return faults


def tools_expected(line: dict[str, Any], rollout: Rollout) -> list[tuple[str, str]]:
    """Name and status of each tool that is to be recorded."""
    match line["feature"]:
        case "structured by a tool":  # the object is the call's arguments, and nothing answers the call
            return [(tool["name"], "unanswered") for tool in rollout.tools[:1]]
        case "tool in text":  # such a client has no tools as far as the format knows
            return []
        case "forced tool answered in text":
            return [("calculator", "unanswered")]
        case _:
            return [("calculator", "ok")] * len(line["tools"])


def fields(result: str) -> tuple[Any, ...]:
    """The values of a result that is a JSON object: over Google's format a result is the field of an object."""
    read = value(result)
    return tuple(read.values()) if isinstance(read, dict) else ()


def texts(reply: str) -> list[str]:
    """The text of a recorded reply, and the arguments of its tool calls."""
    message = json.loads(reply)
    return [message.get("content") or "", *(call["function"]["arguments"] for call in message.get("tool_calls") or ())]


def value(text: str) -> Any:
    """The object that a text writes in JSON; the text itself, if it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return text


@cache
def results(server: PolicyServer) -> tuple[Result, ...]:
    with ThreadPoolExecutor(len(COMMANDS)) as pool:
        runs = [pool.submit(run, server, command, folder) for command, folder in COMMANDS]
        return tuple(found for one in runs for found in one.result())


def table(found: Sequence[Result]) -> str:
    """The matrix: a row for each client, a column for each feature."""
    rows: dict[tuple[str, str], dict[str, dict[bool, str]]] = {}
    for one in found:
        rows.setdefault((one.client, one.version), {}).setdefault(one.feature, {})[one.streamed] = one.fault
    lines = [f"| client | version | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for (client, version), cells in rows.items():
        noted = {
            NOTES[name]: cell(faults) + name.removeprefix(NOTES[name])
            for name, faults in cells.items()
            if name in NOTES
        }
        words = {name: cell(faults) for name, faults in cells.items()} | noted
        lines.append(f"| {client} | {version} | {' | '.join(words.get(name, '-') for name in COLUMNS)} |")
    return "\n".join(lines) + "\n"


def cell(faults: dict[bool, str]) -> str:
    """Example: {False: "", True: ""} -> "yes"; {False: ""} -> "unstreamed"."""
    words = {(): "no", (False,): "unstreamed", (True,): "streamed", (False, True): "yes"}
    good = words[tuple(sorted(streamed for streamed, fault in faults.items() if not fault))]
    return good if not any(faults.values()) else f"**{good}**"


def test_every_client_gets_its_answers_and_every_call_is_recorded_once(policy_server: PolicyServer) -> None:
    bad = [one for one in results(policy_server) if one.fault]
    assert not bad, "\n".join(map(str, bad))


def test_the_table_of_the_docs_is_what_ran(policy_server: PolicyServer) -> None:
    printed = table(results(policy_server))
    head, _, rest = PAGE.read_text().partition(BEGIN)
    shown, _, tail = rest.partition(END)
    if os.environ.get("AGL_WRITE_MATRIX"):
        PAGE.write_text(f"{head}{BEGIN}\n{printed}\n{END}{tail}")
    else:
        assert shown.strip() == printed.strip(), "AGL_WRITE_MATRIX=1 writes the table"
