"""Paths of requests: whose call it is, which endpoint it is for, and what the path says about the call. Pure.

    /rollout/train-12-3/attempt/0/SECRET/AGENT/v1/chat/completions
    /rollout/train-12-3/attempt/0/SECRET/AGENT/openai/deployments/NAME/chat/completions      Azure's form
    /rollout/train-12-3/attempt/0/SECRET/AGENT/v1beta/models/NAME:streamGenerateContent      Google's form

Clients build paths in many ways: slashes at the end or twice, /v1 absent or twice, names with slashes, encoded or not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

from agent_lightning.core.types import RolloutKey
from agent_lightning.serving.dialects.base import BadRequest

TRACES, MODELS = "traces", "models"
GOOGLE = ("generateContent", "streamGenerateContent", "countTokens")
COUNT_TOKENS = ("messages/count_tokens", "countTokens")
_LONGEST = 512
_ENDPOINT = re.compile(
    r"(?:(?:v\d+(?:(?:alpha|beta)\d*)?|openai)/)*"
    r"(?:deployments/(?P<deployment>.+?)/)?"
    r"(?:(?:projects/.+/)?models/(?P<google>.+):(?P<action>generateContent|streamGenerateContent|countTokens)"
    r"|models/(?P<model>.+)"
    r"|(?P<name>chat/completions|completions|responses|messages|messages/count_tokens|models|traces))"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where a request goes."""

    key: RolloutKey
    secret: str
    agent: str
    path: str
    """The path below the agent's name, as the client wrote it."""
    endpoint: str
    """The end of the path in OpenAI's or Anthropic's form, or the action of Google's; "" if there is no such path."""
    fields: Mapping[str, Any]
    """What the path says of the request: `model`, and in Google's form `stream`."""

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that the endpoint takes."""
        return ("GET", "HEAD", "OPTIONS") if self.endpoint == MODELS else ("POST", "OPTIONS")


def split(scope: Mapping[str, Any]) -> list[str]:
    """The segments of a request's path, decoded after they are split: a name may hold an encoded slash."""
    raw = scope.get("raw_path") or scope["path"].encode()
    parts = (unquote_to_bytes(part) for part in raw.split(b"?")[0].split(b"/"))
    return [part.decode(errors="replace") for part in parts if part]


def find(segments: list[str]) -> Route:
    """Where a request with this path goes. Raises BadRequest if the path names no rollout."""
    try:
        _, rollout_id, _, number, secret, agent, *rest = segments[segments.index("rollout") :]
        key = RolloutKey.parse(rollout_id, int(number))
    except ValueError:
        path = "/".join(segments)
        message = f"no such path: /{path[:200]}: the client must keep all of its base URL, …/rollout/…"
        raise BadRequest(message, "not_found", 404) from None
    path = "/".join(rest)
    endpoint, fields = _endpoint(path)
    return Route(key=key, secret=secret, agent=agent, path=path, endpoint=endpoint, fields=fields)


def guess_endpoint(segments: list[str]) -> str:
    """The endpoint that the end of a path names, "" if none: a client that has lost its base URL gets a refusal in its
    own format."""
    return _endpoint("/".join(segments[-2:]))[0] or _endpoint("/".join(segments[-1:]))[0]


def _endpoint(path: str) -> tuple[str, dict[str, Any]]:
    """The endpoint and the fields of a path below the agent's name."""
    match = _ENDPOINT.fullmatch(path) if len(path) <= _LONGEST else None  # long ones could cost much time
    parts = match.groupdict() if match else {}
    fields: dict[str, Any] = {}
    if model := parts.get("google") or parts.get("model") or parts.get("deployment"):
        fields["model"] = model
    if action := parts.get("action"):
        fields["stream"] = action == "streamGenerateContent"
    return parts.get("name") or (action or MODELS if match else ""), fields
