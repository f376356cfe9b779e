"""A call whose replica dies is sent to another replica, unless the agent has seen a part of its answer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import ray.exceptions

from agent_lightning.serving.app import HandleEngine
from agent_lightning.serving.engine import Part, Refusal

DIED = ray.exceptions.RayActorError()
PART = Part(chunk={}, policy_version=3)
REFUSED = Refusal(status=400, message="no", code="invalid_request")


class Replicas:
    """Stands in for Serve's handle; each call takes the next of the given ends."""

    def __init__(self, ends: Sequence[Any]) -> None:
        self.ends = list(ends)
        self.generate = self.stream = self

    def options(self, **settings: Any) -> Replicas:
        return self

    def remote(self, request: Any) -> Reply:
        return Reply(self.ends.pop(0))


class Reply:
    """An answer, or the parts of an answer, or an error instead of or after them."""

    def __init__(self, end: Any) -> None:
        self.end = end

    def __await__(self) -> Any:
        if isinstance(self.end, Exception):
            raise self.end
        yield from ()
        return self.end

    async def __aiter__(self) -> AsyncIterator[Any]:
        for part in self.end:
            if isinstance(part, Exception):
                raise part
            yield part

    def cancel(self) -> None:
        """Nothing is in flight."""


@pytest.mark.parametrize(
    ("ends", "code", "left"),
    [
        ([DIED, DIED, REFUSED], "invalid_request", 0),
        ([DIED, DIED, DIED, REFUSED], "engine_error", 1),
        ([ValueError("its own fault"), REFUSED], "engine_error", 1),
    ],
)
async def test_an_answer_is_asked_for_again_where_its_replica_died(ends: list[Any], code: str, left: int) -> None:
    replicas = Replicas(ends)
    answer = await HandleEngine(replicas).generate({})  # type: ignore[arg-type]
    assert isinstance(answer, Refusal)
    assert (answer.code, len(replicas.ends)) == (code, left)


@pytest.mark.parametrize(
    ("ends", "seen", "left"),
    [
        ([[DIED], [PART, PART]], [PART, PART], 0),
        ([[PART, DIED], [PART]], [PART, "engine_error"], 1),
        ([[DIED], [DIED], [DIED], [PART]], ["engine_error"], 1),
    ],
)
async def test_a_stream_is_begun_again_where_nothing_of_it_was_seen(
    ends: list[Any], seen: list[Any], left: int
) -> None:
    replicas = Replicas(ends)
    parts = [part async for part in HandleEngine(replicas).stream({})]  # type: ignore[arg-type]
    assert [part.code if isinstance(part, Refusal) else part for part in parts] == seen
    assert len(replicas.ends) == left
