"""The gateway answers or refuses every request in the form that its description gives, and never fails itself."""

from __future__ import annotations

import asyncio
import os
import re
from typing import Any

import pytest
from gateway_openapi import describe
from hypothesis import HealthCheck, settings
from malformed import SECRET, attack, new_rollout
from starlette.applications import Starlette

from agent_lightning.buffer.buffer import Buffer, attempt_secret
from agent_lightning.config.running import AgentConfig
from agent_lightning.core.types import RolloutKey
from agent_lightning.serving.gateway import DIALECTS, Gateway, GatewayConfig, application
from agent_lightning.testing.model import ToyEngine, ToyLanguage
from agent_lightning.testing.world import SAMPLING

pytest.importorskip("schemathesis")

import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

pytestmark = pytest.mark.chaos


def open_gateway() -> tuple[Starlette, RolloutKey]:
    """A gateway with one open rollout, which may make any number of calls."""
    buffer = Buffer(run_secret=SECRET, agent=AgentConfig(target="", max_calls=10**9))
    config = GatewayConfig(model="policy", run_secret=SECRET, sampling=SAMPLING)
    engine = ToyEngine(ToyLanguage(("no", "yes", "call:2+3")))
    return application(Gateway(engine=engine, recorder=buffer, config=config)), asyncio.run(new_rollout(buffer))


app, key = open_gateway()
schema = schemathesis.openapi.from_dict(describe(DIALECTS))
schema.app = app


@schemathesis.serializer("application/x-protobuf")
def as_bytes(_: Any, value: Any) -> bytes:
    return str(value).encode("utf-8", "replace")


@schema.parametrize()
@settings(
    max_examples=int(os.environ.get("CHAOS_EXAMPLES", "8")), deadline=None, suppress_health_check=list(HealthCheck)
)
def test_any_request_of_the_description_has_an_answer_of_the_description(case: Any) -> None:
    if "secret" in (case.path_parameters or {}):  # without a valid secret every request would be refused
        secret = attempt_secret(SECRET, key)
        # Starlette's router, which only this test has in front of the gateway, matches no path with a line break.
        agent = re.sub("%0[Aa]|\n", "", str(case.path_parameters.get("agent", ""))) or "agent"
        case.path_parameters |= {"rollout": key.rollout_id, "attempt": key.attempt, "secret": secret, "agent": agent}
    case.call_and_validate(
        checks=[not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    )


async def test_malformed_requests_are_refused_and_none_is_a_server_error() -> None:
    result = await attack(3000, seed=1)
    assert result["server_errors"] == 0, result["examples"]
    assert result["statuses"].keys() >= {"200", "400", "403", "404", "413"}
