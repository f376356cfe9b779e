"""`agl submit`: `agl train` as a Ray job, with its log, its exit code and its run's files here.

Like `ray job submit --runtime-env runtime_env.yaml -- agl train …`.
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
from agent_lightning.core.text import last_line, one_line
from agent_lightning.run import storage

RUNTIME_ENV = "runtime_env.yaml"
PROBE_SECONDS = 300.0
READY_SECONDS = 120.0
POLL_SECONDS = 1.0
STOPPED, FAILED = 130, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """The options of `agl submit`."""

    address: str | None
    """The cluster's dashboard, http://HOST:8265; None: RAY_API_SERVER_ADDRESS, or the cluster of this machine."""
    runtime_env: Path | None
    """The file of Ray's runtime environment; None: runtime_env.yaml, here or in the project."""
    wait: bool
    """Whether to wait for the end of the job."""
    follow: bool
    """Whether to show its log, and wait."""
    out: Path
    """The folder to which the run's folder is copied at the end."""


async def submit(overrides: Sequence[str], how: Submission) -> int:
    """Submit the job, and wait for its end if the options say so. Returns the run's exit code, or 0 once submitted.

    Raises UserError.
    """
    logging.getLogger("ray").setLevel(logging.WARNING)  # Ray would list every file that git ignores
    config = load(overrides)  # a mistake is refused here, not on the cluster
    client = _connect(how.address)
    environment = _runtime_env(how.runtime_env)
    name = f"agl-{re.sub('[^0-9A-Za-z_-]+', '-', config.experiment)}-{secrets.token_hex(3)}"
    await _probe(client, environment, f"{name}-probe")
    has_place = any(override.startswith("runs_dir=") for override in overrides)
    place = [] if has_place else [f"runs_dir=/tmp/agl-runs/{name}"]
    await _start(client, shlex.join(["agl", "train", *overrides, *place]), name, environment)
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
        _say(f"{name} failed: {one_line(info.message or '')[:300]}")
        return FAILED
    return int(info.driver_exit_code)


def _connect(address: str | None) -> JobSubmissionClient:
    if address is not None:
        check_answers(address, "--address")
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        reason = one_line(error)[:200]
        raise UserError(
            f"--address {address or '(none given)'}: no Ray cluster with a dashboard answers ({reason}); "
            "`ray start --head` prints its address"
        ) from error


def _runtime_env(file: Path | None) -> dict[str, Any]:
    """Ray's runtime environment from `file`, else from runtime_env.yaml, here or in the project. Raises UserError."""
    defaults = (Path(RUNTIME_ENV), project_folder("conf").parent / RUNTIME_ENV)
    file = file or next((default for default in defaults if default.is_file()), None)
    if file is None:
        return {}
    try:
        values = yaml.safe_load(file.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"--runtime-env {file}: cannot be read: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"--runtime-env {file}: must be a mapping, see {RUNTIME_ENV}")
    folder = values.get("working_dir")
    if folder and not storage.is_remote(folder):
        values["working_dir"] = str((file.parent / folder).resolve())
    return cast(dict[str, Any], values)


async def _probe(client: JobSubmissionClient, environment: dict[str, Any], name: str) -> None:
    """Run `agl --version` as a job: it takes seconds, and no GPU. Raises UserError if it fails."""
    await _start(client, "agl --version", name, environment)
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            log = await _wait(client, name)
    except TimeoutError:
        client.stop_job(name)
        raise UserError(f"the cluster did not run `agl --version` within {PROBE_SECONDS:.0f} s; is it busy?") from None
    info = client.get_job_info(name)
    if info.status != JobStatus.SUCCEEDED:
        reason = (last_line(log) or info.message or "no message")[:200]
        raise UserError(
            f"`agl` does not run in the cluster's environment ({reason}); install agent-lightning-ray on its nodes, "
            "with the folder of `agl` on the PATH of `ray start`"
        )


async def _start(client: JobSubmissionClient, command: str, name: str, environment: dict[str, Any]) -> None:
    """Submit a job, for READY_SECONDS again and again if the cluster has just come up. Raises UserError."""
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            client.submit_job(entrypoint=command, submission_id=name, runtime_env=environment)
            return
        except (RuntimeError, RayError, ValueError) as error:
            if "try again later" not in str(error) or time.monotonic() > deadline:
                raise UserError(f"the cluster does not take the job: {one_line(error)[:300]}") from error
            await asyncio.sleep(POLL_SECONDS)


async def _wait(client: JobSubmissionClient, name: str) -> str:
    while not client.get_job_status(name).is_terminal():  # ends with the job
        await asyncio.sleep(POLL_SECONDS)
    return cast(str, client.get_job_logs(name))


async def _follow(client: JobSubmissionClient, name: str) -> str:
    """Copy the log to standard output while the job runs. Returns all of it at the end."""
    async for lines in client.tail_job_logs(name):
        sys.stdout.write(lines)
        sys.stdout.flush()
    return await _wait(client, name)


async def _bring_back(client: JobSubmissionClient, log: str, out: Path) -> None:
    """Copy the run's folder, which its log names, to `out` without the checkpoints; a failure is only reported."""
    folders = re.findall(r"^ *run folder: (\S+)$", log, re.MULTILINE)
    if not folders:
        _say("the job wrote no run: nothing is brought back")
        return
    folder = folders[-1]
    try:
        copy = storage.fetch(folder, out) if storage.is_remote(folder) else await _untar(client, folder, out)
    except (UserError, binascii.Error, tarfile.TarError, OSError) as error:
        _say(f"{folder} could not be brought back: {error}")
        return
    _say(f"files: {copy} (checkpoints stay at {folder}/checkpoints)")


async def _untar(client: JobSubmissionClient, folder: str, out: Path) -> Path:
    """Copy a folder of the head node to `out`, through a job's log: only the job server is sure to be reachable."""
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
