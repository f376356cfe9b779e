"""The commands from an installed wheel, which has no checkout beside it: its files lie inside the package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from agent_lightning.api.cli import benchmarks

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of the wheel, at the places that pyproject.toml gives them."""
    folder = tmp_path_factory.mktemp("site-packages")
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    places = {package: package for package in wheel["packages"]} | wheel["force-include"]
    for source, place in places.items():
        ignored = shutil.ignore_patterns("__pycache__", "node_modules")
        shutil.copytree(ROOT / source, folder / place, ignore=ignored, dirs_exist_ok=True)
    return folder


def agl(site_packages: Path, folder: Path, *arguments: str, text: str = "") -> str:
    environment = {**os.environ, "PYTHONPATH": str(site_packages), "COLUMNS": "200"}
    command = [sys.executable, "-m", "agent_lightning", *arguments]
    ended = subprocess.run(
        command, cwd=folder, env=environment, input=text, capture_output=True, text=True, timeout=100
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout


def test_predictions_are_scored(site_packages: Path, tmp_path: Path) -> None:
    text = agl(site_packages, tmp_path, "score", "calc_x", "-", text='{"pred": "12", "result": "12"}\n')
    assert json.loads(text.splitlines()[-1]) == {"rows": 1, "score": 1.0}


@pytest.mark.parametrize("command", ["score", "reproduce"])
def test_the_benchmarks_are_those_of_the_checkout(command: str, site_packages: Path, tmp_path: Path) -> None:
    assert benchmarks.names() == ["calc_x", "musique", "spider"]
    assert "{calc_x,musique,spider}" in agl(site_packages, tmp_path, command, "--help")


def test_the_program_of_agl_reproduce_is_in_the_wheel(site_packages: Path) -> None:
    assert (site_packages / "agent_lightning" / "benchmarks/reproduce/report.py").is_file()
