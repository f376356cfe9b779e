"""Which endpoint and whose attempt a path means, as clients write paths."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from test_gateway import HELLO, code_of, open_rig, url_of

from agent_lightning.serving import paths
from agent_lightning.testing.world import serve_locally

ROOT = "/agl-x/rollout/train-1-2/attempt/3/secret/agent"


@pytest.mark.parametrize(
    ("path", "endpoint", "fields"),
    [
        ("/v1/chat/completions", "chat/completions", {}),
        ("/v1/chat/completions/", "chat/completions", {}),
        ("//v1//chat//completions", "chat/completions", {}),
        ("/chat/completions", "chat/completions", {}),
        ("/v1/v1/chat/completions", "chat/completions", {}),
        ("/v1/v1/messages", "messages", {}),
        ("/messages/count_tokens", "messages/count_tokens", {}),
        ("/openai/v1/responses", "responses", {}),
        ("/openai/deployments/gpt-4o/chat/completions", "chat/completions", {"model": "gpt-4o"}),
        ("/v1/openai/deployments/ORG/NAME/completions", "completions", {"model": "ORG/NAME"}),
        ("/openai/deployments/ORG%2FNAME/responses", "responses", {"model": "ORG/NAME"}),
        ("/v1beta/openai/chat/completions", "chat/completions", {}),
        ("/v1/models", "models", {}),
        ("/v1/models/", "models", {}),
        ("/v1/models/gpt", "models", {"model": "gpt"}),
        ("/v1/models/ORG/NAME", "models", {"model": "ORG/NAME"}),
        ("/v1/models/ORG%2FNAME", "models", {"model": "ORG/NAME"}),
        ("/v1/models/a/b/c/health", "models", {"model": "a/b/c/health"}),
        ("/v1/models/日本 é", "models", {"model": "日本 é"}),
        ("/v1/traces", "traces", {}),
        ("/v1/chat", "", {}),
        ("/v1/embeddings", "", {}),
        ("/v2x/chat/completions", "", {}),
        ("/v1/chat/completions/x", "", {}),
        ("/v1" * 1000 + "/chat/completions", "", {}),
    ],
)
def test_paths(path: str, endpoint: str, fields: dict[str, Any]) -> None:
    raw = (ROOT + path).encode()
    for scope in ({"path": ROOT + path, "raw_path": raw}, {"path": ROOT + path.replace("%2F", "/")}):
        route = paths.find(paths.split(scope))
        assert (route.endpoint, dict(route.fields)) == (endpoint, fields)
        assert (route.key.rollout_id, route.key.attempt, route.secret, route.agent) == (
            "train-1-2",
            3,
            "secret",
            "agent",
        )


async def test_models_with_any_name_and_every_method() -> None:
    async with open_rig() as rig:
        url = url_of(rig.key)
        assert (await rig.http.get(f"{url}/models/ORG/NAME")).json()["id"] == "ORG/NAME"
        assert (await rig.http.get(f"{url}/models/health")).json()["id"] == "health"
        assert (await rig.http.head(f"{url}/models")).status_code == 200
        allowed = await rig.http.options(f"{url}/chat/completions")
        assert (allowed.status_code, allowed.headers["allow"]) == (204, "POST, OPTIONS")
        for method in ("GET", "PUT", "DELETE", "PATCH"):
            refused = await rig.http.request(method, f"{url}/chat/completions")
            assert code_of(refused) == (405, "method_not_allowed")
            assert refused.headers["allow"] == "POST, OPTIONS"
        assert code_of(await rig.http.post(f"{url}/models")) == (405, "method_not_allowed")
        assert (await rig.http.get(f"{url}/messages")).json()["type"] == "error"


async def test_a_websocket_is_refused_in_the_protocols_form() -> None:
    upgrade = {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
    headers = upgrade | {"sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ=="}
    async with open_rig() as rig, serve_locally(rig.gateway) as root, httpx.AsyncClient() as http:
        assert code_of(await http.get(f"{root}{url_of(rig.key)}/responses", headers=headers)) == (426, "unsupported")


async def test_azures_paths_are_answered() -> None:
    async with open_rig() as rig:
        url = url_of(rig.key).removesuffix("/v1")
        path = f"{url}/openai/deployments/ORG/NAME/chat/completions?api-version=2024-10-21"
        reply = await rig.http.post(path, json={"messages": HELLO})
        assert (reply.status_code, reply.json()["model"]) == (200, "ORG/NAME")
        agent = url.replace("/agent", "/judge%2F2")
        assert (await rig.http.post(f"{agent}/v1/chat/completions/", json={"messages": HELLO})).status_code == 200
        assert [call.agent for call in (await rig.end()).calls] == ["agent", "judge/2"]


@pytest.mark.parametrize(
    ("path", "headers", "form"),
    [
        ("/v1/chat/completions", {}, "openai"),
        ("/chat/completions", {}, "openai"),
        ("/agl-x/v1/responses", {}, "openai"),
        ("/v1/models", {}, "openai"),
        ("/v1/embeddings", {}, "openai"),
        ("/", {}, "openai"),
        ("/agl-x/rollout/train-1-2/v1/chat/completions", {}, "openai"),
        ("/v1/messages", {}, "anthropic"),
        ("/agl-x/v1/messages/count_tokens", {}, "anthropic"),
        ("/v1/models", {"anthropic-version": "2023-06-01"}, "anthropic"),
        ("/v1beta/models/policy:generateContent", {}, "google"),
        ("/v1beta/models", {"x-goog-api-key": "any"}, "google"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_a_client_that_loses_its_base_url_is_told_so_in_its_format(
    method: str, path: str, headers: dict[str, str], form: str
) -> None:
    async with open_rig() as rig:
        refused = await rig.http.request(method, path, headers=headers)
    body = refused.json()
    assert (refused.status_code, refused.headers["x-should-retry"]) == (404, "false")
    assert "must keep all of its base URL" in body["error"]["message"]
    kind = "anthropic" if body.get("type") == "error" else "google" if "status" in body["error"] else "openai"
    assert kind == form
