"""docs/security.md lists every port that listens while a policy is served, and no other process listens."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path

import psutil
import pytest
from policy_server import PolicyServer

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
