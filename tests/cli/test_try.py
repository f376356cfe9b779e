"""agl init and agl try: a new project runs as it is, and one task shows everything, also failing code."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from agent_lightning.api.cli import FAILED, USER_ERROR
from agent_lightning.api.cli.files import init_project
from agent_lightning.api.cli.main import main
from agent_lightning.api.cli.try_one import try_one
from agent_lightning.core.errors import UserError

EXPERIMENT = "experiment=experiment/mine.yaml"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["init", "mine"]) == 0
    assert "agl try experiment=experiment/mine.yaml --toy" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path / "mine")
    return tmp_path / "mine"


def test_a_new_project_is_tried_with_one_command(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["try", EXPERIMENT, "--toy", "--task", "1"]) == 0
    shown = capsys.readouterr().out
    for text in ("task train-2 of train, against the toy", "user      What is 0 plus 1?", "parts: answer ", "finished"):
        assert text in shown
    assert main(["train", EXPERIMENT, "--dry-run"]) == 0
    assert "nothing is missing" in capsys.readouterr().out


def test_a_folder_with_something_in_it_is_left_alone(project: Path) -> None:
    assert main(["init", "."]) == USER_ERROR
    with pytest.raises(UserError, match="is not empty"):
        init_project(project)


@pytest.mark.parametrize("where", ["reward", "agent"])
def test_failing_code_is_shown_with_its_line_and_what_it_printed(
    project: Path, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = project / f"{where}.py"
    wrong = {"reward": ('task["answer"]', 'task["anwser"]'), "agent": ('task["question"]', 'task["qestion"]')}[where]
    body = file.read_text().replace(*wrong)
    first = "    numbers =" if where == "reward" else "    async with"
    file.write_text(body.replace(first, f"    print('here I am')\n{first}"))
    assert main(["try", EXPERIMENT, "--toy"]) == FAILED
    shown = capsys.readouterr().out
    line = next(n for n, text in enumerate(file.read_text().split("\n"), 1) if wrong[1] in text)
    assert f"({where}.py:{line} in {'score' if where == 'reward' else 'solve'})" in shown
    assert "Traceback" in shown
    assert "printed:\nhere I am" in shown


def test_a_task_that_there_is_not_is_one_line(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["try", EXPERIMENT, "--toy", "--task", "99"]) == USER_ERROR
    assert capsys.readouterr().err == "agl: --task 99: no such task of 12; give a number from 0, or an id\n"


@pytest.fixture
async def server() -> AsyncIterator[str]:
    """A server of OpenAI's protocol that gives neither token ids nor log-probabilities."""

    async def chat(request: web.Request) -> web.Response:
        body = await request.json()
        if body["model"] != "some/model":
            return web.json_response({"error": {"message": "no such model"}}, status=404)
        assert "return_token_ids" not in body
        message = {"role": "assistant", "content": f"5 {request.headers['Authorization']}"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 7, "completion_tokens": 1, "total_tokens": 8}
        return web.json_response({"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage})

    application = web.Application()
    application.router.add_post("/v1/chat/completions", chat)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield "http://{}:{}/v1".format(*runner.addresses[0][:2])
    await runner.cleanup()


@pytest.mark.parametrize("streams", [False, True])
async def test_any_url_answers(
    project: Path, server: str, streams: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-5")
    if streams:
        text = (project / "agent.py").read_text()
        call = "answer = await client.chat.completions.create(model=policy.model, messages=messages"
        text = text.replace(f"{call})", f"{call.replace('answer', 'chunks')}, stream=True)")
        reply = "''.join([chunk.choices[0].delta.content or '' async for chunk in chunks if chunk.choices])"
        (project / "agent.py").write_text(text.replace('answer.choices[0].message.content or ""', reply))
        (project / "agent.py").write_text(
            (project / "agent.py").read_text().replace("\n    return", "\n        return")
        )
    settings = {"task": "0", "split": "train", "toy": False, "url": server}
    assert await try_one([EXPERIMENT], **settings, model="some/model") == 0  # type: ignore[arg-type]
    assert "assistant 5 Bearer secret-5" in capsys.readouterr().out
    assert await try_one([EXPERIMENT], **settings, model="other") == FAILED  # type: ignore[arg-type]
    assert "answered 404" in capsys.readouterr().out
    rows = [json.loads(line) for line in (project / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 12
