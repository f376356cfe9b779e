"""Several hosts on this machine: network namespaces on one bridge, a Ray node in each, each with its own loopback.

    with Hosts(cpus=2) as hosts:            # the head; needs root, and `ip`
        other = hosts.join()
        run = subprocess.Popen(hosts.head.command("agl", "train", ...), env=hosts.environment)
        hosts.kill(other)                   # as if its plug were pulled

All of them see the same files, as those of a cluster with a shared file system do, but for Ray's own, which are on a
disk of each: one node's log monitor would else read and send the lines of all.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

from agent_lightning.core.ray_private import NODE_ENVIRONMENT

BIN = Path(sys.executable).parent
PORT = 6379
READY_SECONDS = 180.0


def can_be_made() -> bool:
    """Whether this account may make network namespaces here."""
    name = f"agl-{secrets.token_hex(3)}"
    if os.geteuid() != 0 or shutil.which("ip") is None or subprocess.call(["ip", "netns", "add", name]) != 0:
        return False
    subprocess.check_call(["ip", "netns", "del", name])
    return True


@dataclass(frozen=True, slots=True)
class Host:
    """One of them."""

    namespace: str
    link: str
    """Its end of the bridge."""
    address: str

    def command(self, *words: str) -> list[str]:
        """The same command, on this host."""
        return ["ip", "netns", "exec", self.namespace, *words]

    def processes(self, title: str = "") -> list[psutil.Process]:
        """Those on this host whose command line has `title` in it."""
        processes = []
        for pid in self.pids():
            try:
                process = psutil.Process(pid)
                if title in " ".join(process.cmdline()):
                    processes.append(process)
            except psutil.NoSuchProcess:
                continue
        return processes

    def pids(self) -> list[int]:
        """The ids of all processes on this host."""
        words = ["ip", "netns", "pids", self.namespace]
        return [int(pid) for pid in subprocess.run(words, capture_output=True, text=True).stdout.split()]

    def received(self) -> int:
        """Bytes that have come to it from other hosts."""
        return int(Path(f"/sys/class/net/{self.link}/statistics/tx_bytes").read_text())


class Hosts:
    """Starts with the head. `cpus`: what Ray takes each host to have."""

    def __init__(self, cpus: int = 2) -> None:
        self._cpus = cpus
        self._name = f"agl{secrets.token_hex(2)}"
        self._subnet = f"10.{77 + os.getpid() % 100}.{secrets.randbelow(250)}"
        self._made: list[Host] = []
        self._folder = tempfile.mkdtemp(prefix="agl-hosts-")
        self._disks = tempfile.mkdtemp(prefix="agl-disks-")
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        self.environment = kept | {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            **NODE_ENVIRONMENT,
        }

    def __enter__(self) -> Hosts:
        try:
            _ip("link", "add", self._name, "type", "bridge")
            _ip("link", "set", self._name, "up")
            self.join()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    @property
    def head(self) -> Host:
        return self._made[0]

    @property
    def address(self) -> str:
        """The address of the cluster."""
        return f"{self.head.address}:{PORT}"

    def pids(self) -> list[int]:
        """The ids of all processes on all hosts."""
        return [pid for host in self._made for pid in host.pids()]

    def join(self, *, apart: bool = False) -> Host:
        """One more host, with a Ray node. `apart`: its processes see those of no other host, without which Ray takes
        the head's node to be a driver's own wherever it sees that run."""
        number = len(self._made) + 1
        host = Host(f"{self._name}-{number}", f"{self._name}v{number}", f"{self._subnet}.{number}")
        self._made.append(host)
        _ip("netns", "add", host.namespace)
        _ip("link", "add", host.link, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
        _ip("link", "set", host.link, "master", self._name, "up")
        for words in (("addr", "add", f"{host.address}/24", "dev", "eth0"), ("link", "set", "eth0", "up")):
            _ip("-n", host.namespace, *words)
        _ip("-n", host.namespace, "link", "set", "lo", "up")
        role = ["--head", f"--port={PORT}", "--temp-dir", self._folder] if number == 1 else ["--address", self.address]
        ray = ["ray", "start", *role, f"--node-ip-address={host.address}", f"--num-cpus={self._cpus}"]
        ray += ["--object-store-memory=300000000", "--include-log-monitor=no"]  # this and `chrt` as in ray_cluster.yaml
        disk = tempfile.mkdtemp(prefix="disk-", dir=self._disks) if number > 1 else self._folder
        # `ip netns exec` has a mount namespace of its own, which Ray's processes inherit.
        start = ["sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"', disk, self._folder, "chrt", "--batch", "0"]
        if apart:  # its first process must stay, and with it all of them end
            start, ray = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *start], [*ray, "--block"]
        command = host.command(*start, str(BIN / ray[0]), *ray[1:])
        log = Path(self._folder) / f"start-{number}.log"
        with log.open("w") as out:
            starting = subprocess.Popen(command, env=self.environment, stdout=out, stderr=out)
        deadline = time.monotonic() + READY_SECONDS
        while starting.poll() is None and not (apart and "Ray runtime started" in log.read_text()):
            if time.monotonic() > deadline:
                starting.kill()
            time.sleep(0.1)
        if starting.returncode:
            raise RuntimeError(f"ray start on {host.namespace}: {log.read_text()}")
        return host

    def kill(self, host: Host) -> None:
        """Its plug is pulled: no process says goodbye, and no packet leaves it."""
        _ip("link", "set", host.link, "down")
        _end(host)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for host in reversed(self._made):
            _end(host)
            subprocess.call(["ip", "netns", "del", host.namespace])
        subprocess.call(["ip", "link", "del", self._name])
        for folder in (self._folder, self._disks):
            shutil.rmtree(folder, ignore_errors=True)


def _ip(*words: str) -> None:
    subprocess.check_call(["ip", *words])


def _end(host: Host) -> None:
    deadline = time.monotonic() + 20
    while (left := host.processes()) and time.monotonic() < deadline:
        for process in left:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=5)
