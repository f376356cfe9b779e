"""`agl submit`: `agl train` as a Ray job, its log here, and the run's files brought back.

The same as `ray job submit --runtime-env runtime_env.yaml -- agl train …`, and the exit code is the run's.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import logging
import re
import secrets
import shlex
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from ray.exceptions import RayError
from ray.job_submission import JobStatus, JobSubmissionClient

from agent_lightning.config.load import load, project_folder
from agent_lightning.core.actors import check_answers
from agent_lightning.core.errors import UserError
from agent_lightning.run import storage

RUNTIME_ENV = "runtime_env.yaml"
PROBE_SECONDS = 300.0
READY_SECONDS = 120.0
POLL_SECONDS = 1.0
STOPPED, FAILED = 130, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """How to submit."""

    address: str | None
    """Of the cluster's dashboard, http://HOST:8265; None: RAY_API_SERVER_ADDRESS, or the cluster of this machine."""
    runtime_env: Path | None
    wait: bool
    follow: bool
    out: Path
    """Where the run's folder is brought."""


async def submit(overrides: Sequence[str], how: Submission) -> int:
    """Submit, and where asked wait for the end. The run's exit code, or 0 once submitted. Raises UserError."""
    logging.getLogger("ray").setLevel(logging.WARNING)  # it would list every file that git ignores
    config = load(overrides)  # refused here, not on the cluster
    client = _connect(how.address)
    environment = _runtime_env(how.runtime_env)
    name = f"agl-{re.sub('[^0-9A-Za-z_-]+', '-', config.experiment)}-{secrets.token_hex(3)}"
    await _probe(client, environment, f"{name}-probe")
    place = next((one.partition("=")[2] for one in overrides if one.startswith("runs_dir=")), None)
    given = list(overrides) if place is not None else [*overrides, f"runs_dir=/tmp/agl-runs/{name}"]
    await _start(client, shlex.join(["agl", "train", *given]), name, environment)
    address = client.get_address()
    _say(
        f"submitted {name}; log: ray job logs {name} --address {address}; stop: ray job stop {name} --address {address}"
    )
    if not (how.wait or how.follow):
        return 0
    log = await _follow(client, name) if how.follow else await _wait(client, name)
    info = client.get_job_info(name)
    await _bring_back(client, log, how.out)
    if info.status == JobStatus.STOPPED:
        _say(f"{name} was stopped")
        return STOPPED
    if info.driver_exit_code is None:
        _say(f"{name} failed: {' '.join((info.message or '').split())[:300]}")
        return FAILED
    return int(info.driver_exit_code)


def _connect(address: str | None) -> JobSubmissionClient:
    if address is not None:
        check_answers(address, "--address")
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"--address {address or '(none given)'}: no Ray cluster with a dashboard answers ({said}); "
            "`ray start --head` prints its address"
        ) from error


def _runtime_env(file: Path | None) -> dict[str, Any]:
    """Of the file given, else of the one here, else of the project's. Raises UserError."""
    there = [one for one in (Path(RUNTIME_ENV), project_folder("conf").parent / RUNTIME_ENV) if one.is_file()]
    file = file or (there[0] if there else None)
    if file is None:
        return {}
    try:
        values = yaml.safe_load(file.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"--runtime-env {file}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"--runtime-env {file}: must be a mapping, see {RUNTIME_ENV}")
    folder = values.get("working_dir")
    if folder and not storage.is_remote(folder):
        values["working_dir"] = str((file.parent / folder).resolve())
    return cast(dict[str, Any], values)


async def _probe(client: JobSubmissionClient, environment: dict[str, Any], name: str) -> None:
    """Whether `agl` runs there at all: seconds, before a GPU is taken. Raises UserError."""
    await _start(client, "agl --version", name, environment)
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            log = await _wait(client, name)
    except TimeoutError:
        client.stop_job(name)
        raise UserError(f"the cluster did not run `agl --version` within {PROBE_SECONDS:.0f} s; is it busy?") from None
    info = client.get_job_info(name)
    if info.status != JobStatus.SUCCEEDED:
        said = (log.strip().splitlines() or [info.message or "no message"])[-1][:200]
        raise UserError(
            f"`agl` does not run in the cluster's environment ({said}); install agent-lightning-ray on its nodes, "
            "with the folder of `agl` on the PATH of `ray start`"
        )


async def _start(client: JobSubmissionClient, command: str, name: str, environment: dict[str, Any]) -> None:
    """A cluster that has just come up takes no jobs for some seconds. Raises UserError."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            client.submit_job(entrypoint=command, submission_id=name, runtime_env=environment)
            return
        except (RuntimeError, RayError, ValueError) as error:
            if "try again later" not in str(error) or time.monotonic() > deadline:
                raise UserError(f"the cluster does not take the job: {' '.join(str(error).split())[:300]}") from error
            await asyncio.sleep(POLL_SECONDS)


async def _wait(client: JobSubmissionClient, name: str) -> str:
    while not client.get_job_status(name).is_terminal():  # ends with the job
        await asyncio.sleep(POLL_SECONDS)
    return cast(str, client.get_job_logs(name))


async def _follow(client: JobSubmissionClient, name: str) -> str:
    """The log as it comes, on standard output."""
    async for lines in client.tail_job_logs(name):
        sys.stdout.write(lines)
        sys.stdout.flush()
    return await _wait(client, name)


async def _bring_back(client: JobSubmissionClient, log: str, out: Path) -> None:
    """The run's folder without its checkpoints, as the run's own log names it. What cannot be brought is told."""
    found = re.findall(r"^ *run folder: (\S+)$", log, re.MULTILINE)
    if not found:
        _say("the job wrote no run: nothing is brought back")
        return
    try:
        folder = storage.fetch(found[-1], out) if storage.is_remote(found[-1]) else await _untar(client, found[-1], out)
    except (UserError, binascii.Error, tarfile.TarError, OSError) as error:
        _say(f"{found[-1]} could not be brought back: {error}")
        return
    _say(f"files: {folder} (checkpoints stay at {found[-1]}/checkpoints)")


async def _untar(client: JobSubmissionClient, folder: str, out: Path) -> Path:
    """A folder of the head node through the log of one more job: nothing but the job server is reachable for sure."""
    path = Path(folder)
    pack = f"tar -C {shlex.quote(str(path.parent))} --exclude=checkpoints -cz {shlex.quote(path.name)} | base64"
    name = f"agl-files-{secrets.token_hex(3)}"
    await _start(client, pack, name, {})
    log = await _wait(client, name)
    lines = [line for line in log.splitlines() if re.fullmatch("[0-9A-Za-z+/]+=*", line)]
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode("".join(lines), validate=True))) as files:
        files.extractall(out, filter="data")
    return out / path.name


def _say(text: str) -> None:
    sys.stderr.write(f"agl: {text}\n")
