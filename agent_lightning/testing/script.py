"""A policy that answers with given replies, and one rollout of an agent against it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from agent_lightning.buffer.taken import take_groups
from agent_lightning.config.running import AgentConfig
from agent_lightning.core.types import Task, Trajectory
from agent_lightning.serving.engine import Completion, Part, Refusal, parse_error, parse_reply
from agent_lightning.testing.model import END, FIRST_BYTE, ToyLanguage
from agent_lightning.testing.plugin import Reply
from agent_lightning.testing.world import ToyWorld


class ScriptedEngine:
    """Answers each call with the next reply: a text, or a mapping of the tools that it calls to their arguments. A call
    beyond the last reply, or of a tool that the request does not offer, is refused with status 400."""

    def __init__(self, replies: Sequence[Reply]) -> None:
        self._replies, self._calls = tuple(replies), 0

    async def generate(self, request: Mapping[str, Any]) -> Completion | Refusal:
        self._calls += 1
        if self._calls > len(self._replies):
            return _refuse(f"the test gives {len(self._replies)} replies, and this is call {self._calls}")
        reply = self._replies[self._calls - 1]
        offered = [tool["function"]["name"] for tool in request.get("tools") or ()]
        if not isinstance(reply, str) and (unknown := sorted(set(reply) - set(offered))):
            return _refuse(f"reply {self._calls} calls {unknown[0]}, and the agent offers {offered}")
        try:
            (prompt_T,) = ToyLanguage(()).prompts(request)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            return parse_error(str(error), 400)
        text = reply if isinstance(reply, str) else json.dumps(reply)
        ids = [*(FIRST_BYTE + byte for byte in text.encode()), END]
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "token_ids": ids}
        if "prompt" in request:
            choice |= {"text": text, "logprobs": {"tokens": [""] * len(ids), "token_logprobs": [0.0] * len(ids)}}
        else:
            entry = {"token": "", "logprob": 0.0, "bytes": [], "top_logprobs": []}
            choice |= {"message": {"role": "assistant", "content": text}, "logprobs": {"content": [entry] * len(ids)}}
        if not isinstance(reply, str):
            functions = [{"name": name, "arguments": json.dumps(arguments)} for name, arguments in reply.items()]
            calls = [
                {"id": f"call-{self._calls}-{index}", "type": "function", "function": function}
                for index, function in enumerate(functions)
            ]
            choice |= {"message": {"role": "assistant", "content": None, "tool_calls": calls}}
            choice["finish_reason"] = "tool_calls"
        prompt, completion = len(prompt_T), len(ids)
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        raw = {"choices": [choice], "prompt_token_ids": prompt_T.tolist(), "usage": usage}
        return parse_reply(raw, policy_version=0)

    async def stream(self, request: Mapping[str, Any]) -> AsyncIterator[Part | Refusal]:
        """The complete answer as one part."""
        answer = await self.generate(request)
        if isinstance(answer, Refusal):
            yield answer
            return
        (choice,), (tokens,) = answer.reply["choices"], answer.choices
        delta = dict(choice.get("message", {}))
        if "tool_calls" in delta:
            delta["tool_calls"] = [{**call, "index": index} for index, call in enumerate(delta["tool_calls"])]
        ids = {"prompt_token_ids": tokens.prompt_T.tolist(), "token_ids": tokens.response_T.tolist(), "delta": delta}
        yield Part(chunk={**answer.reply, "choices": [{**choice, **ids}]}, policy_version=0)


def _refuse(message: str) -> Refusal:
    return Refusal(status=400, message=message, code="invalid_request")


async def run_script(
    agent: Any, task: Mapping[str, object], replies: Sequence[Reply], section: Mapping[str, Any]
) -> Trajectory:
    """Run one attempt of an agent on a task; `section` holds keys of the config's section `agent`."""
    config = AgentConfig.model_validate({"timeout_s": 30.0, **section, "target": agent, "max_attempts": 1})
    row = Task(task_id=str(task.get("id", "test")), payload=dict(task))
    engine = ScriptedEngine(replies)
    world = ToyWorld(agent=config, tasks=[row], words=("",), sampling={"train": {}, "val": {}})
    world.link = lambda part, name, method: engine if name == "engine" else part
    async with world:
        await world.buffer.admit(row, split="val", num_rollouts=1)
        (group,) = await take_groups(world.buffer, 1, split="val")
    return group.trajectories[0]
