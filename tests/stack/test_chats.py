"""Chats for supervised training: what is learnt is what the engine would sample; bad chats are named and left out."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from agent_lightning.core.types import Task
from agent_lightning.learners.chats import BadChat, ChatEncoder

pytestmark = pytest.mark.stack
POLICY = Path(__file__).parents[2] / "examples" / "calc_x" / "tiny_policy"
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"properties": {"sum": {"type": "string"}}}}}]
CALL = {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"sum": "1+1"}'}}
USER, ANSWER = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}
CALLS: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "a", "content": "2"}
SYSTEM = {"role": "system", "content": "Add."}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(POLICY)


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    return ChatEncoder(str(POLICY), (), 128)


def chat(*messages: Mapping[str, Any], **row: Any) -> Task:
    return Task(task_id="chat", payload={"messages": list(messages), **row})


def with_template(folder: Path, change: tuple[str, str]) -> ChatEncoder:
    """An encoder of the tiny policy, in whose chat template a text is replaced."""
    shutil.copytree(POLICY, folder / "model")
    template = folder / "model" / "chat_template.jinja"
    assert change[0] in template.read_text()
    template.write_text(template.read_text().replace(*change))
    return ChatEncoder(str(folder / "model"), (), 128)


TOOL_CALL = '<tool_call>\n{"name": "add", "arguments": {"sum": "1+1"}}\n</tool_call><|im_end|>'


@pytest.mark.parametrize(
    ("task", "learnt"),
    [
        (chat(USER, ANSWER), ["2<|im_end|>"]),
        (chat(SYSTEM, USER, ANSWER, USER, ANSWER), ["2<|im_end|>2<|im_end|>"]),
        (chat(USER, CALLS, RESULT, ANSWER, tools=TOOLS), [f"{TOOL_CALL}2<|im_end|>"]),
        (chat(USER, CALLS, tools=TOOLS), [TOOL_CALL]),
        (chat(USER, ANSWER, USER), ["2<|im_end|>"]),
        (chat(USER, {**ANSWER, "weight": 0}, USER, ANSWER), ["2<|im_end|>"]),
        (chat({"role": "user", "content": [{"type": "text", "text": "1 + 1?"}]}, ANSWER), ["2<|im_end|>"]),
    ],
)
def test_the_tokens_of_the_assistant_are_learnt_to_the_end_token(
    task: Task, learnt: list[str], encoder: ChatEncoder, tokenizer: Any
) -> None:
    rows = encoder.encode(task, 0)
    assert [tokenizer.decode(row.token_T[row.mask_T]) for row in rows] == learnt
    for row in rows:  # each reply begins where the engine would have begun to sample
        starts = [i for i in range(1, row.mask_T.size) if row.mask_T[i] and not row.mask_T[i - 1]]
        assert all(tokenizer.decode(row.token_T[:i]).endswith("<|im_start|>assistant\n") for i in starts)


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        (chat(), "no message of the assistant"),
        (Task(task_id="chat", payload={"question": "1 + 1?"}), r'no {"messages": \[\.\.\.\]}'),
        (chat(USER), "no message of the assistant"),
        (chat(USER, {**ANSWER, "weight": 0}), "no message of the assistant"),
        (chat(USER, USER, ANSWER), "roles do not alternate: user after user"),
        (chat(USER, ANSWER, ANSWER), "roles do not alternate: assistant after assistant"),
        (chat(ANSWER), "roles do not alternate: assistant at the start"),
        (chat(USER, SYSTEM, ANSWER), "roles do not alternate: system after user"),
        (chat(USER, RESULT, ANSWER), "roles do not alternate: tool after user"),
        (chat(USER, CALLS, USER, ANSWER), "roles do not alternate: user after tool calls"),
        (chat(USER, {"role": "robot", "content": "2"}), "unknown role 'robot'"),
        (chat(USER, {"role": "assistant", "content": ""}), "an empty message of the assistant"),
        (chat({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ANSWER), "not text"),
        (chat(USER, {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": "{"}}]}), "no JSON"),
        (chat({"role": "user", "content": "1 + 1? " * 60}, ANSWER), "longer than model.max_len=128 tokens"),
    ],
)
def test_a_chat_that_cannot_be_learnt_has_a_reason(task: Task, reason: str, encoder: ChatEncoder) -> None:
    with pytest.raises(BadChat, match=reason):
        encoder.encode(task, 0)
    good, refused = encoder.encode_all([chat(USER, ANSWER), task])
    assert len(good) == 1
    assert list(refused.values()) == [["chat"]]


@pytest.mark.parametrize(
    ("change", "task", "reason"),
    [
        (("message.tool_calls or []", "[]"), chat(USER, CALLS), "drops tool calls"),
        (("{{ call.function.arguments | tojson }}", "{}"), chat(USER, CALLS), "drops tool calls"),
        (("loop.first and tools", "false"), chat(USER, ANSWER, tools=TOOLS), "drops tools"),
        (
            ("loop.first and tools %}", "false %}{% endif %}{% if message.tool_calls %}{{ raise_exception('no') }}"),
            *(chat(USER, ANSWER, tools=TOOLS), "drops tools"),
        ),
        (
            ("{{ message.content }}", "{% if message.role != 'tool' %}{{ message.content }}{% endif %}"),
            chat(USER, CALLS, RESULT, ANSWER),
            "drops results of tools",
        ),
        (("<|im_end|>", ""), chat(USER, ANSWER), "does not close a reply with an end token"),
        (("assistant\n{% endif", "assistant\nSo: {% endif"), chat(USER, ANSWER), "otherwise than after its prompt"),
        (
            ("{%- for message in", "{{ raise_exception('no') }}{%- for message in"),
            chat(USER, ANSWER),
            "refuses it: TemplateError: no",
        ),
    ],
)
def test_a_template_that_loses_something_is_named(
    change: tuple[str, str], task: Task, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(BadChat, match=reason):
        with_template(tmp_path, change).encode(task, 0)
