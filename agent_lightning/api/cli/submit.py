"""`agl submit`: `agl train` as a Ray job, with its log, its exit code and its run's files here. Like `ray job submit
--runtime-env runtime_env.yaml -- agl train …`."""

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
from pathlib import Path
from typing import Any, cast

import yaml
from ray.exceptions import RayError
from ray.job_submission import JobStatus, JobSubmissionClient

from agent_lightning.api.cli import FAILED, STOPPED
from agent_lightning.config.load import load, project_folder
from agent_lightning.core.actors import check_answers
from agent_lightning.core.errors import UserError
from agent_lightning.core.text import last_line, one_line
from agent_lightning.run import storage

RUNTIME_ENV = "runtime_env.yaml"
PROBE_SECONDS = 300.0
READY_SECONDS = 120.0
POLL_SECONDS = 1.0


async def submit(
    overrides: Sequence[str], *, address: str | None, runtime_env: Path | None, wait: bool, follow: bool, out: Path
) -> int:
    """Submit the job, and wait for its end if the options want that. Returns the run's exit code, or 0 once
    submitted. `address` is the cluster's dashboard, http://HOST:8265; None means RAY_API_SERVER_ADDRESS, or the
    cluster of this machine. `runtime_env` is a file of Ray's runtime environment; None means runtime_env.yaml, here
    or in the project. `follow` shows the log, and waits too. At the end the run's folder is copied to `out`. Raises
    UserError."""
    logging.getLogger("ray").setLevel(logging.WARNING)  # Ray would list every file that git ignores
    config = load(overrides)  # a mistake is refused here, not on the cluster
    if address is not None:
        check_answers(address, "--address")
    try:
        client = JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise UserError(
            f"--address {address or '(none given)'}: no Ray cluster with a dashboard answers "
            f"({one_line(error)[:200]}); `ray start --head` prints its address"
        ) from error
    environment = _runtime_env(runtime_env)
    name = f"agl-{re.sub('[^0-9A-Za-z_-]+', '-', config.experiment)}-{secrets.token_hex(3)}"
    await _probe(client, environment, f"{name}-probe")
    # An override of the same key that comes later counts.
    words = ["agl", "train", f"runs_dir=/tmp/agl-runs/{name}", *overrides]
    await _start(client, shlex.join(words), name, environment)
    at = f"{name} --address {client.get_address()}"
    _say(f"submitted {name}; log: ray job logs {at}; stop: ray job stop {at}")
    if not (wait or follow):
        return 0
    if follow:
        async for lines in client.tail_job_logs(name):  # ends with the job
            sys.stdout.write(lines)
            sys.stdout.flush()
    log = await _wait(client, name)
    info = client.get_job_info(name)
    await _bring_back(client, log, out)
    if info.status == JobStatus.STOPPED:
        _say(f"{name} was stopped")
        return STOPPED
    if info.driver_exit_code is None:
        _say(f"{name} failed: {one_line(info.message or '')[:300]}")
        return FAILED
    return int(info.driver_exit_code)


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
    """The log of a job, once it has ended."""
    while not client.get_job_status(name).is_terminal():
        await asyncio.sleep(POLL_SECONDS)
    return cast(str, client.get_job_logs(name))


async def _bring_back(client: JobSubmissionClient, log: str, out: Path) -> None:
    """Copy the run's folder, which its log names, to `out` without the checkpoints; a failure is only reported."""
    if not (folders := re.findall(r"^ *run folder: (\S+)$", log, re.MULTILINE)):
        _say("the job wrote no run: nothing is brought back")
        return
    folder, path = folders[-1], Path(folders[-1])
    try:
        if storage.is_remote(folder):
            copy = storage.fetch(folder, out)
        else:
            # The folder comes through the log of a job: on the head node only the job server is sure to be reachable.
            pack = f"tar -C {shlex.quote(str(path.parent))} --exclude=checkpoints -cz {shlex.quote(path.name)} | base64"
            name = f"agl-files-{secrets.token_hex(3)}"
            await _start(client, pack, name, {})
            lines = (await _wait(client, name)).splitlines()
            text = "".join(line for line in lines if re.fullmatch("[0-9A-Za-z+/]+=*", line))
            out.mkdir(parents=True, exist_ok=True)
            with tarfile.open(fileobj=io.BytesIO(base64.b64decode(text, validate=True))) as files:
                files.extractall(out, filter="data")
            copy = out / path.name
    except (UserError, binascii.Error, tarfile.TarError, OSError) as error:
        _say(f"{folder} could not be brought back: {error}")
        return
    _say(f"files: {copy} (checkpoints stay at {folder}/checkpoints)")


def _say(text: str) -> None:
    sys.stderr.write(f"agl: {text}\n")
