"""docs/security.md lists every port that listens while a policy is served, and no other process listens. Whatever path
a client sends to proxy or gateway, the answer is in a protocol's own form. The engine computes as the config says."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path

import httpx
import psutil
import pytest
from policy_server import PolicyServer

from agent_lightning.config.running import ServingConfig
from agent_lightning.core.processes import cpu_environment

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]
PAGE = Path(__file__).parents[2] / "docs" / "security.md"


def documented() -> set[tuple[str, str]]:
    """(process, address) of each row of the page's table of ports that is about serving."""
    table = PAGE.read_text().partition("| process | listens on |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `([^`]+)` \| ([\w ,.`]+?) \|", table, re.MULTILINE)
    return {(process, address.strip(" `")) for process, addresses in rows for address in addresses.split(",")}


def listening(pid: int) -> set[tuple[str, str]]:
    """(process, address) of every TCP port on which a process or one of its descendants listens."""
    found = set()
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        name = re.sub(r"^(ray::|python).*", r"\1", process.name())
        for connection in process.net_connections(kind="tcp"):
            if connection.status == psutil.CONN_LISTEN:
                address = ipaddress.ip_address(connection.laddr.ip)
                kind = "loopback" if address.is_loopback else "all" if address.is_unspecified else "node"
                found.add((name, kind))
    return found


def test_the_ports_that_listen_are_those_that_the_page_lists(policy_server: PolicyServer) -> None:
    rows = documented()
    assert len(rows) > 5
    assert listening(policy_server.pid) == rows


def test_the_engine_has_the_threads_and_the_allocator_of_the_config(policy_server: PolicyServer) -> None:
    processes = psutil.Process(policy_server.pid).children(recursive=True)
    (engine,) = [process for process in processes if process.name().startswith("VLLM::Engine")]
    environment, wanted = engine.environ(), cpu_environment(ServingConfig().threads)
    assert environment["OMP_NUM_THREADS"] == wanted["OMP_NUM_THREADS"]
    # glibc cuts its own copy at the first colon when it has read it.
    assert wanted["GLIBC_TUNABLES"].startswith(environment["GLIBC_TUNABLES"])


def addresses(server: PolicyServer) -> dict[str, str]:
    """The roots of Serve's proxy and of the gateway, which agents of its node call past the proxy."""
    roots = {"proxy": str(httpx.URL(server.url).copy_with(path="/")).rstrip("/")}
    for process in psutil.Process(server.pid).children(recursive=True):
        if "-gateway" in " ".join(process.cmdline()):
            for connection in process.net_connections(kind="tcp"):
                root = f"http://127.0.0.1:{connection.laddr.port}"
                if connection.status == psutil.CONN_LISTEN and is_gateway(root):
                    roots["gateway"] = root
    return roots


def is_gateway(root: str) -> bool:
    try:
        return httpx.get(f"{root}/health", timeout=2.0).status_code == 200
    except httpx.HTTPError:  # gRPC, or another address
        return False


LOST = [
    ("POST", "/v1/chat/completions", {}, "error"),
    ("POST", "/chat/completions", {}, "error"),
    ("POST", "/v1/completions", {}, "error"),
    ("POST", "/v1/responses", {}, "error"),
    ("GET", "/v1/models", {}, "error"),
    ("GET", "/", {}, "error"),
    ("POST", "/rollout", {}, "error"),
    ("PUT", "/any/thing?a=1", {}, "error"),
    ("POST", "/v1/messages", {}, "type"),
    ("GET", "/v1/models", {"anthropic-version": "2023-06-01"}, "type"),
    ("POST", "/v1beta/models/policy:generateContent", {}, "status"),
]


@pytest.mark.parametrize("where", ["proxy", "gateway"])
def test_a_client_that_loses_its_base_url_is_told_so_in_its_format(where: str, policy_server: PolicyServer) -> None:
    with httpx.Client(base_url=addresses(policy_server)[where]) as http:
        assert http.get("/health").json()["status"] == "ok"
        for method, path, headers, key in LOST:
            reply = http.request(method, path, headers=headers)
            body = reply.json()
            assert reply.status_code == 404, (method, path)
            assert key in (body["error"] if key == "status" else body), (method, path, body)
            assert "must keep all of its base URL" in body["error"]["message"], (method, path)
