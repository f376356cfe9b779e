"""What `agl import` writes for a warm start, through veRL's SFT dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agent_lightning.core.errors import DataError

pytestmark = pytest.mark.stack
POLICY = Path(__file__).parents[2] / "examples" / "calc_x" / "tiny_policy"
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"properties": {argument: {"type": "string"}}}}}
    for name, argument in (("add", "sum"), ("look_up", "word"))
]
QUESTION = {"role": "user", "content": "1 + 1?"}
CALL = {"id": "a", "type": "function", "function": {"name": "add", "arguments": {"sum": "1 + 1"}}}
CHATS = [
    {"messages": [QUESTION, {"role": "assistant", "content": "", "tool_calls": [CALL]}], "tools": TOOLS, "reward": 1.0},
    {"messages": [QUESTION, {"role": "assistant", "content": "2"}]},
]


def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(POLICY)


def dataset(path: Path) -> Any:
    """The data set as veRL's trainer makes it from `data.custom_cls`."""
    from verl.utils.import_utils import load_extern_object

    data_set = load_extern_object("pkg://agent_lightning.learners.verl_sft", "JsonlSFTDataset")
    return data_set(parquet_files=[str(path)], tokenizer=tokenizer(), config={"pad_mode": "no_padding"}, max_samples=-1)


def test_each_chat_is_learnt_where_the_assistant_speaks_and_tools_keep_their_own_arguments(tmp_path: Path) -> None:
    path = tmp_path / "sft.jsonl"
    path.write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    rows = dataset(path)
    decode = tokenizer().decode
    with_tools, without = (rows[i] for i in range(len(rows)))
    assert "Tools: add(sum) look_up(word)" in decode(with_tools["input_ids"])
    learnt = decode(with_tools["input_ids"][with_tools["loss_mask"].bool()])
    assert '{"name": "add", "arguments": {"sum": "1 + 1"}}' in learnt
    assert "1 + 1?" not in learnt
    assert "Tools:" not in decode(without["input_ids"])
    assert decode(without["input_ids"][without["loss_mask"].bool()]).startswith("2")


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "sft.jsonl"
    path.write_text(json.dumps(CHATS[1]) + "\n{half\n")
    with pytest.raises(DataError, match=r"sft.jsonl, line 2: not a chat"):
        dataset(path)
