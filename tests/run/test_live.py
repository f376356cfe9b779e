"""Live export: finished rollouts reach a collector, and no collector, slow, dead or wrong, holds up the run."""

from __future__ import annotations

import gzip
import json
import logging
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from builders import group, model_call, trajectory
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from rich.console import Console

from agent_lightning.config.load import load
from agent_lightning.core.errors import UserError
from agent_lightning.core.types import Group, RolloutKey
from agent_lightning.credit.assign import CreditRules
from agent_lightning.run.live import LiveTraces, from_environment
from agent_lightning.run.observer import RunObserver
from agent_lightning.run.report import Progress
from agent_lightning.run.tracking import RunDirectory

SECRET = "0123456789abcdef" * 2


@dataclass
class Collector:
    """A receiver of OTLP/HTTP in this process."""

    url: str = ""
    delay: float = 0.0
    status: int = 200
    requests: list[tuple[str, dict[str, str], ExportTraceServiceRequest]] = field(default_factory=list)

    def names(self) -> list[str]:
        bodies = [body for _, _, body in self.requests]
        spans = [
            s for body in bodies for part in body.resource_spans for scope in part.scope_spans for s in scope.spans
        ]
        return [span.name for span in spans]


@contextmanager
def collector(**settings: Any) -> Iterator[Collector]:
    state = Collector(**settings)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            body = gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
            time.sleep(state.delay)
            state.requests.append((self.path, dict(self.headers), ExportTraceServiceRequest.FromString(body)))
            self.send_response(state.status)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def rollouts(number: int, text: str = "hi") -> Group:
    keys = [RolloutKey(split="train", group=0, index=index) for index in range(number)]
    request = json.dumps([{"role": "user", "content": text}])
    calls = [replace(model_call(key, [1, 2], [3], started_at=1.7e9), request=request) for key in keys]
    return group(*(trajectory(call.key, call) for call in calls))


def live(url: str, monkeypatch: pytest.MonkeyPatch, **variables: str) -> LiveTraces:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
    for name, value in variables.items():
        monkeypatch.setenv(f"OTEL_{name}", value)
    traces = from_environment("calc-s0")
    assert traces is not None
    return traces


def test_a_collector_gets_each_rollout_with_the_headers_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://h/rollout/train-0-0/attempt/0/{SECRET}/agent/v1 \ud83d"
    with collector() as state:
        variables = {
            "EXPORTER_OTLP_HEADERS": "api-key=abc",
            "EXPORTER_OTLP_COMPRESSION": "gzip",
            "SERVICE_NAME": "mine",
        }
        traces = live(state.url, monkeypatch, **variables)
        traces.send(3, [rollouts(2, text=url)])
        traces.close()
        ((path, headers, body),) = state.requests
    assert (path, headers["api-key"]) == ("/v1/traces", "abc")
    assert state.names() == ["rollout", "chat policy"] * 2
    resource = {pair.key: pair.value.string_value for pair in body.resource_spans[0].resource.attributes}
    assert (resource["service.name"], resource["agl.run"]) == ("mine", "calc-s0")
    assert SECRET not in str(body)
    assert traces.counts() == {"traces/sent": 2, "traces/dropped": 0}


def test_the_endpoint_of_traces_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with collector() as state:
        traces = live("http://127.0.0.1:1", monkeypatch, EXPORTER_OTLP_TRACES_ENDPOINT=f"{state.url}/there")
        traces.send(0, [rollouts(1)])
        traces.close()
    assert [path for path, _, _ in state.requests] == ["/there"]


def test_large_rollouts_are_sent_in_several_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    with collector() as state:
        traces = live(state.url, monkeypatch)
        traces.send(0, [rollouts(4, text="x" * 2**20)])
        traces.close()
    assert len(state.requests) == 4


@pytest.mark.parametrize(
    ("settings", "seconds"),
    [({"delay": 60.0}, 4.0), ({"status": 401}, 2.0), (None, 4.0)],
    ids=["slow", "wrong key", "dead"],
)
def test_a_collector_that_takes_nothing_costs_no_time_and_is_counted(
    settings: Any, seconds: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with collector(**(settings or {})) as state:
        traces = live(state.url if settings else f"http://127.0.0.1:{closed_port()}", monkeypatch)
        begun = time.monotonic()
        for step in range(20):
            traces.send(step, [rollouts(8)])
        assert time.monotonic() - begun < 0.2
        traces.close()
        assert time.monotonic() - begun < seconds
    assert traces.counts()["traces/sent"] == 0
    assert traces.counts()["traces/dropped"] >= 100
    ours = [record.getMessage() for record in caplog.records if record.name == "agent_lightning.run.live"]
    assert len(ours) == 2
    assert ours[-1] == "160 of 160 rollouts did not reach the collector of traces"
    assert sum(record.levelno >= logging.WARNING for record in caplog.records) <= 3


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (
            {"EXPORTER_OTLP_PROTOCOL": "http/json"},
            "OTEL_EXPORTER_OTLP_PROTOCOL=http/json: set it to http/protobuf or grpc",
        ),
        ({"EXPORTER_OTLP_TRACES_ENDPOINT": "localhost:4318"}, "localhost:4318: it begins with http:// or https://"),
    ],
)
def test_a_variable_that_cannot_be_used_is_refused(
    variables: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=words):
        live("http://127.0.0.1:1", monkeypatch, **variables)


@pytest.mark.parametrize("variables", [{}, {"SDK_DISABLED": "true"}, {"TRACES_EXPORTER": "none"}])
def test_without_a_collector_nothing_is_sent(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1" if variables else "")
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(f"OTEL_{name}", value)
    assert from_environment("run") is None


def test_the_rollouts_of_a_run_are_sent_and_counted_in_its_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collector() as state:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", state.url)
        config, run = load(["experiment=toy"]), RunDirectory.create(tmp_path, "toy", 0)
        run.config.touch()
        progress = Progress("toy", steps=1, console=Console(quiet=True))
        observer = RunObserver(config=config, run=run, progress=progress, rules=CreditRules())
        observer.record_rollouts(1, 0, [rollouts(3)])
        deadline = time.monotonic() + 10
        while len(state.names()) < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
        observer.record_step(1, {"train/reward": 0.5})
        observer.close()
    (line,) = map(json.loads, run.metrics.read_text().splitlines())
    assert {"traces/sent", "traces/dropped"} <= line.keys()
    assert state.names().count("rollout") == 3


PHOENIX = os.environ.get("PHOENIX_PROGRAM") or shutil.which("phoenix")


@pytest.mark.slow
@pytest.mark.skipif(PHOENIX is None, reason="Phoenix is not installed: pip install arize-phoenix, in a venv of its own")
@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_phoenix_shows_a_rollout_with_its_calls(protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port, grpc_port = closed_port(), closed_port()
    settings = {"PHOENIX_WORKING_DIR": str(tmp_path), "PHOENIX_TELEMETRY_ENABLED": "false"}
    settings |= {"PHOENIX_PORT": str(port), "PHOENIX_GRPC_PORT": str(grpc_port)}
    url = f"http://127.0.0.1:{port}"
    query = {"query": "{projects{edges{node{traceCount spans(first:9){edges{node{name spanKind parentId}}}}}}}"}

    def shown() -> Any:
        body, head = json.dumps(query).encode(), {"content-type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(f"{url}/graphql", body, head), timeout=5) as answer:
            return json.load(answer)["data"]["projects"]["edges"][0]["node"]

    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([str(PHOENIX), "serve"], env=os.environ | settings, stdout=log, stderr=log)
    try:
        wait_for(lambda: bool(shown()), 120)
        endpoint = url if protocol == "http/protobuf" else f"http://127.0.0.1:{grpc_port}"
        traces = live(endpoint, monkeypatch, EXPORTER_OTLP_PROTOCOL=protocol)
        traces.send(0, [rollouts(2)])
        traces.close()
        assert traces.counts() == {"traces/sent": 2, "traces/dropped": 0}
        wait_for(lambda: shown()["traceCount"] == 2, 30)
        nodes = [edge["node"] for edge in shown()["spans"]["edges"]]
        assert sorted((node["name"], node["spanKind"], node["parentId"] is None) for node in nodes) == [
            *[("chat policy", "llm", False)] * 2,
            *[("rollout", "chain", True)] * 2,
        ]
    finally:
        process.terminate()
        process.wait(30)


def wait_for(condition: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except OSError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.2)
