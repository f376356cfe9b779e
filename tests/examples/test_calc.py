"""The calculator example: its tool, its agent, its reward and its problems."""

import asyncio
import gzip
import importlib.util
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from fractions import Fraction
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_lightning.config.load import load as load_config
from agent_lightning.core.errors import ConfigError, DataError
from agent_lightning.core.types import Split
from agent_lightning.launch.checks import load_tasks
from agent_lightning.rollouts.agents import load as load_target
from agent_lightning.run.tasks import load_jsonl

EXAMPLE = Path(__file__).parents[2] / "examples" / "calc_x"
DATA = Path(os.environ.get("AGL_DATA", Path(__file__).parents[3] / "shared" / "data")) / "calcx"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no Calc-X data in {DATA}")


def load(name: str) -> ModuleType:
    """Load a file of the example by its path, as the package's loader does."""
    spec = importlib.util.spec_from_file_location(f"calc_x_{name}", EXAMPLE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sys.path.insert(0, str(EXAMPLE))
agent, calculator, compare, parts, problems, reward = map(
    load, ("agent", "calculator", "compare", "parts", "problems", "reward")
)
sys.path.remove(str(EXAMPLE))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [dict(task.payload) for task in load_jsonl(path, required=("id", "question", "result"))]


# ---- calculator


@pytest.mark.parametrize(
    ("expression", "value", "text"),
    [
        ("(14+3)*2", 34, "34"),
        ("0.1+0.2", 0.3, "0.3"),
        ("1/3*3", 1, "1"),
        ("10/3", 10 / 3, "3.333333"),
        ("1,200/5", 240, "240"),
        ("7//2", 3, "3"),
        ("-7%3", 2, "2"),
        ("-3**2", -9, "-9"),
        ("2**-2", 0.25, "0.25"),
        ("2**0.5", 2**0.5, "1.414214"),
        (" 5 × 3 ", 15, "15"),
        ("007", 7, "7"),
        ("+.5", 0.5, "0.5"),
        ("1/8000", 0.000125, "0.000125"),
        ("9**30", 9**30, str(9**30)),
        ("+".join(["1"] * 100), 100, "100"),
    ],
)
def test_calculator(expression, value, text):
    assert calculator.evaluate(expression) == value
    assert type(calculator.evaluate(expression)) is type(value)
    assert calculator.render(value) == text


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("1/0", "division by zero"),
        ("5%0", "division by zero"),
        ("0**-1", "division by zero"),
        ("2**65", "exponent too large"),
        ("((9**64)**64)**64", "number too large"),
        ("1" * 31, "number too long"),
        ("-" * 150 + "1", "expression too deep"),
        ("1+" * 100 + "1", "expression too long"),
        ("(-8)**0.5", "not a real number"),
        *[(bad, "not a calculation") for bad in ("", "()", "two", "1(2)", "15%", "1 2", "1,2", "1e9", "1j", "1.2.3")],
        *[(bad, "not a calculation") for bad in ("__import__('os')", "[1]", "1<2", "1 if 1 else 2", "\0", "1;2", "²")],
    ],
)
def test_calculator_refuses(expression, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        calculator.evaluate(expression)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123456789.+-*/%(), ex", max_size=40))
def test_calculator_gives_a_number_or_a_short_message(expression):
    text = calculator.call(json.dumps({"expression": expression}))
    assert (text.startswith("error: ") and len(text) < 40) or set(text) <= set("0123456789.-")


@pytest.mark.parametrize(
    ("arguments", "content"),
    [
        ('{"expression": "2*3"}', "6"),
        ('{"expression": "1/0"}', "error: division by zero"),
        ("{", "error: arguments are not JSON"),
        ("[1]", "error: expression is missing"),
        ('{"expression": 5}', "error: expression is missing"),
    ],
)
def test_tool_call(arguments, content):
    assert calculator.call(arguments) == content


# ---- reward


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 1,234.5.", 1234.5),
        ("$12", 12),
        ("-$12", -12),
        ("3/4", 0.75),
        ("(11/20)", 0.55),
        ("4(4/7)", 32 / 7),
        ("12%", 0.12),
        ("It is -3.", -3),
        ("20-15", 15),
        ("<result>5</result>", 5),
        ("2/3 = around 0.666667", 0.666667),
        ("12_units", 12),
        ("96/4", 4),
        ("1/0", 0),
        ("34/1", 34),
        ("1_234 pens", 1234),
        ("1 3/4 cups", 1.75),
        ("2 and 1/2", 2.5),
        ("1又3/4", 1.75),
        (r"\frac{3}{4}", 0.75),
        (r"$4\frac{4}{7}$", 32 / 7),
        (r"\boxed{1{,}200}", 1200),
        ("-(1/2)", -0.5),
        ("12 cm^2", 12),
        ("9 percent", 0.09),
        (r"9\%", 0.09),
        ("5e-07", 5e-7),
        ("1e999999999", 1),
        ("9" * 200_000, None),
        (r"\frac{" * 20_000, None),
        ("9" * 199 + "/7", None),
        ("1." + "0" * 400, None),
        ("first 3, then 5", 5),
        ("none", None),
        ("", None),
    ],
)
def test_parse_answer(text, number):
    assert compare.parse_answer(text) == pytest.approx(number)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("b", "B"),
        ("option B", "B"),
        ("The answer is B) 12", "B"),
        ("A man walks 5 miles. The answer is: **D**.", "D"),
        ("not A but C", "C"),
        ("<result>E</result>", "E"),
        ("A", "A"),
        ("[c]", "C"),
        ("d. 12", "D"),
        ("B) Company A", "B"),
        ("the answer is c.", "C"),
        ("the answer is a number", None),
        ("A man has 12", None),
        ("12", None),
    ],
)
def test_parse_option(text, letter):
    assert compare.parse_option(text) == letter


@pytest.mark.parametrize(
    ("result", "right", "wrong"),
    [
        ("34", "The answer is 34.00", "The answer is 34 or 35"),
        ("24", "24", "The answer is 96/4."),
        ("50%", "It is 0.5", "It is 0.05"),
        ("4(4/7)", "4.5714", "4"),
        ("36/(1-85%)", "240", "36"),
        ("36/(1-85%)", "36/(1-85%)", "136/(1-85%)"),
        ("0.333333", "1/3", "0.34"),
        ("B", "B) 34", "34"),
        ("1000", "1000.0000004", "1000.05"),
        ("25000", "25,000", "25001"),
        ("12345.67", "12345.67", "12346"),
        ("33.333333", "33.33", "33.4"),
        ("50%", "50", "5000%"),
        ("50", "50%", "0.5"),
        ("(1/2000000)", "5e-07", "1/1900000"),
        ("one half", "one half", "half"),
    ],
)
def test_score(result, right, wrong):
    assert reward.score({"result": result}, right) == 1.0
    assert reward.score({"result": result}, wrong) == 0.0
    assert reward.score({"result": result}, "") == 0.0


def forms(result: str, value: float) -> list[str]:
    """The usual ways to write a result whose value is known."""
    exact = calculator.render(value)
    written = [
        result,
        exact,
        f"The answer is {exact}.",
        f"**{exact}**",
        f"$\\boxed{{{exact}}}$",
        f"<result>{exact}</result>",
    ]
    written += [f"${exact}" if value >= 0 else f"-${exact[1:]}", f"{exact} apples", f"{exact} cm^2", f"x = {exact}"]
    integer, rest = divmod(abs(value), 1)
    sign = "-" if value < 0 else ""
    if not rest:
        written += [f"{int(value):,}", f"{int(value):,}.00", f"{int(value):_}"]
    else:
        written += [f"{value:,.6f}" if abs(value) > 0.1 else exact, f"{sign}{integer:,.0f}.{f'{rest:.4f}'[2:]}"][
            : 1 + (value > 1)
        ]
        ratio = Fraction(value).limit_denominator(1000)
        if abs(value - ratio) < 1e-7:
            written += [str(ratio), f"({ratio})"]
            top, bottom = abs(ratio.numerator), ratio.denominator
            written.append(f"{sign}\\frac{{{top}}}{{{bottom}}}")
            if top > bottom:
                written.append(f"{sign}{top // bottom} {top % bottom}/{bottom}")
                written.append(f"{sign}{top // bottom}({top % bottom}/{bottom})")
        written += [f"{calculator.render(100 * value)}%", f"{calculator.render(100 * value)} percent"]
    return written


@needs_data
def test_score_of_every_row_of_calc_x():
    rows = [row for path in sorted(DATA.glob("*.jsonl*")) for row in rows_of(path)]
    assert len(rows) > 20_000
    values = {}
    for row in rows:
        result, value = row["result"], row.get("result_float")
        if result not in "ABCDE":
            # A whole one may be longer than a float can tell.
            value = int(result) if result.isdigit() else compare.parse_answer(result) if value is None else value
            values[result] = value
        elif row.get("options"):
            assert reward.score(row, f"{result}) {row['options'][result]}") == 1.0, row["id"]
    for result, value in values.items():
        for text in forms(result, value):
            assert compare.same(result, text), (result, text)
        for changed in (value + 1, value - 1, 1.01 * value + 1, value + (0.01 if value % 1 else 2), -value - 1):
            assert not compare.same(result, f"The answer is {calculator.render(changed)}."), (result, changed)
    for letter in "ABCDE":
        for form in ("{}", "({})", "Option {}", "The answer is {}.", "**{}**", "\\boxed{{{}}}", "answer: {}"):
            for other in "ABCDE":
                assert compare.same(letter, form.format(other)) == (letter == other)
        assert compare.same(letter, letter.lower())


# ---- agent


class Model:
    """An OpenAI endpoint over HTTP that does what it is told: one scripted message per call of a conversation."""

    def __init__(self, *script: dict[str, Any]) -> None:
        self.script = script
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str] = set()

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        self.keys.add(request.headers["Authorization"])
        turn = sum(message["role"] == "assistant" for message in body["messages"])
        message = {"role": "assistant", "content": None, "refusal": None, **self.script[turn]}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        return web.json_response(
            {"id": "call", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
        )


@asynccontextmanager
async def serving(model: Model) -> AsyncIterator[SimpleNamespace]:
    """The policy that an agent is given, while the endpoint is up."""
    app = web.Application()
    app.router.add_post("/{rollout}/v1/chat/completions", model.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield SimpleNamespace(base_url=f"http://127.0.0.1:{runner.addresses[0][1]}/r0/v1", api_key="key-0", model="tiny")
    await runner.cleanup()


@pytest.fixture
async def serve():
    async with AsyncExitStack() as stack:

        async def start(model: Model) -> SimpleNamespace:
            return await stack.enter_async_context(serving(model))

        yield start


def ask(expression: str, name: str = "calculator") -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps({"expression": expression})}
    return {"tool_calls": [{"id": f"call_{expression}", "type": "function", "function": function, "index": 0}]}


QUESTION = {"question": "What is 14 plus 3, twice?", "result": "34"}


async def test_agent_uses_its_tool(serve):
    model = Model(ask("(14+3)*2"), ask("1/0"), ask("1", name="search"), {"content": "The answer is 34."})
    policy = await serve(model)
    assert await agent.solve(QUESTION, policy) == "The answer is 34."
    messages = model.requests[-1]["messages"]
    assert messages[:2] == [
        {"role": "system", "content": "Solve the problem. Use the calculator."},
        {"role": "user", "content": QUESTION["question"]},
    ]
    sent = ask("(14+3)*2")["tool_calls"][0]
    del sent["index"]
    assert messages[2] == {"role": "assistant", "tool_calls": [sent]}
    assert messages[3] == {"role": "tool", "tool_call_id": "call_(14+3)*2", "content": "34"}
    assert messages[5]["content"] == "error: division by zero"
    assert messages[7]["content"] == "error: the only tool is calculator"
    assert {request["model"] for request in model.requests} == {"tiny"}
    assert model.requests[0]["tools"][0]["function"]["name"] == "calculator"
    # Each request extends the one before, which is what makes its tokens one training row.
    for before, after in zip(model.requests, model.requests[1:], strict=False):
        assert after["messages"][: len(before["messages"])] == before["messages"]


async def test_agent_answers_with_the_first_result_of_its_tool(serve):
    model = Model(ask("1/0"), ask("(14+3)*2"), {"content": "never asked"})
    assert await agent.solve_to_result(QUESTION, await serve(model)) == "34"
    assert len(model.requests) == 2
    assert await agent.solve_to_result(QUESTION, await serve(Model({"content": "It is 34."}))) == "It is 34."


async def test_agent_stops_after_its_last_turn(serve):
    model = Model(*[{"content": f"turn {i}", **ask("1+1")} for i in range(9)])
    assert await agent.solve(QUESTION, await serve(model)) == "turn 3"
    assert len(model.requests) == agent.MAX_TURNS == 4


async def test_rollouts_share_a_client_but_not_their_policy(serve):
    model = Model(ask("1+1"), {"content": "2"})
    policy = await serve(model)
    policies = [
        SimpleNamespace(base_url=policy.base_url.replace("r0", f"r{i}"), api_key=f"key-{i}", model="tiny")
        for i in range(50)
    ]
    assert await asyncio.gather(*[agent.solve(QUESTION, p) for p in policies]) == ["2"] * 50
    assert model.keys == {f"Bearer key-{i}" for i in range(50)}


def test_the_client_ends_with_its_loop():
    async def main() -> Any:
        async with serving(Model({"content": "2"})) as policy:
            await agent.solve(QUESTION, policy)
            client, _ = agent._clients[asyncio.get_running_loop()]
            assert not client.is_closed()
            return client

    before = len(agent._clients)
    assert asyncio.run(main()).is_closed()
    assert len(agent._clients) == before


async def test_the_agent_on_autogen(serve):
    pytest.importorskip("autogen_agentchat")
    solve = load_target("examples/calc_x/autogen_agent.py:solve")
    model = Model(ask("(14+3)*2"), ask("1/0"), {"content": "The answer is 34."})
    assert await solve(QUESTION, await serve(model)) == "The answer is 34."
    system, user, *rest = model.requests[-1]["messages"]
    assert (system["content"], user["content"]) == (agent.SYSTEM, QUESTION["question"])
    assert [message["content"] for message in rest[1::2]] == ["34", "error: division by zero"]
    assert model.requests[0]["tools"][0]["function"]["name"] == "calculator"
    for before, after in zip(model.requests, model.requests[1:], strict=False):
        assert after["messages"][: len(before["messages"])] == before["messages"]
    # It has had its turns, and the last was a tool call.
    assert await solve(QUESTION, await serve(Model(*[ask("1+1")] * 9))) == ""


async def test_agent_in_a_process_of_its_own(serve, monkeypatch):
    model = Model(ask("(14+3)*2"), {"content": "34"})
    policy = await serve(model)
    monkeypatch.setenv("OPENAI_BASE_URL", policy.base_url)
    monkeypatch.setenv("OPENAI_API_KEY", policy.api_key)
    monkeypatch.setenv("AGL_MODEL", policy.model)
    assert await asyncio.to_thread(agent.solve_blocking, QUESTION) == "34"
    assert len(model.requests) == 2


# ---- problems


def test_problems_are_sound():
    rows = problems.generate(seed=0, num=1500, split="train")
    assert len({row["question"] for row in rows}) == len({row["id"] for row in rows}) == 1500
    assert len(Counter(row["kind"] for row in rows)) == len(problems.KINDS) >= 24
    for row in rows:
        value = calculator.evaluate(row["equation"])
        assert 0 <= value <= 999
        assert float(10 * value).is_integer()
        assert row["result"] == calculator.render(value)
        assert reward.score(row, f"The answer is {row['result']}.") == 1.0
        assert not set("{}") & set(row["question"])
        numbers = {int(number) for number in problems._QUESTION_NUMBER.findall(row["question"])}
        used = {int(number) for number in problems._EQUATION_NUMBER.findall(row["equation"])}
        assert used - numbers <= ({2} if row["kind"] == "average" else set())


def test_problems_must_be_read():
    rows = problems.generate(seed=1, num=1000, split="train")
    orders = [
        (problems._QUESTION_NUMBER.findall(row["question"]), problems._EQUATION_NUMBER.findall(row["equation"]))
        for row in rows
        if row["kind"] != "average"
    ]
    assert 0.2 < sum(stated != used for stated, used in orders) / len(orders) < 0.7
    assert 0.05 < sum(len(stated) > len(used) for stated, used in orders) / len(orders) < 0.3


def test_problems_are_the_same_everywhere_and_splits_are_apart():
    train, val = problems.generate(0, 1000, "train"), problems.generate(7, 100, "val")
    assert train[:10] == problems.generate(0, 10, "train")
    assert train[0] != problems.generate(1, 1, "train")[0]
    assert not {row["question"] for row in train} & {row["question"] for row in val}
    assert train[0] == FIRST


FIRST = {
    "id": "calc-train-0-0",
    "question": "Zeno had 73 coins and paid 4 for 68 pins and 18 for a tray. How many coins are left?",
    "result": "51",
    "equation": "73-4-18",
    "kind": "take_twice",
    "steps": 2,
}


def test_a_sheet_is_right_only_where_all_of_it_is():
    (sheet, other) = problems.generate_sheets(0, 2, "val")
    assert [len(drawn["rows"]) for drawn in (sheet, other)] == [problems.SHEET] * 2
    answers = [f"The answer is {row['result']}." for row in sheet["rows"]]
    assert reward.score_sheet(sheet, answers) == 1.0
    assert reward.score_sheet(sheet, [*answers[:-1], "The answer is -1."]) == 0.0


def test_solution_is_a_chat_that_the_agent_would_have(serve):
    row = problems.generate(3, 1, "train")[0]
    system, user, request, tool, answer = problems.solution(row)
    assert (system["content"], user["content"]) == (agent.SYSTEM, row["question"])
    assert json.loads(request["tool_calls"][0]["function"]["arguments"]) == {"expression": row["equation"]}
    assert tool["content"] == row["result"]
    assert reward.score(row, answer["content"]) == 1.0
    assert problems.solution(row, in_the_head=True) == [system, user, answer]
    with pytest.raises(ValueError, match="2\\+2 does not lead to 5"):
        problems.solution({"question": "?", "equation": "2+2", "result": "5"})


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("X=((22.0-14.0)/4.0)", "(22-14)/4"),
        ("x=3*6", "3*6"),
        ("( 76.0 - 25.0 )", "76-25"),
        ("7 + 2 = x", "7+2"),
        ("x=(2.50*10.05)+(100.0)", "(2.5*10.05)+(100)"),
        ("miles=4.0/30.0*48.0", "4/30*48"),
        ("((1))", "1"),
        ("(1+2)*(3+4)", "(1+2)*(3+4)"),
    ],
)
def test_normalise_equation(text, plain):
    assert problems.normalise_equation(text) == plain


def redraw(question: str, equation: str, result: str, seed: int = 0) -> Any:
    row = {"id": "m1", "question": question, "equation": equation, "result": result}
    return problems.redraw(row, random.Random(seed))


@pytest.mark.parametrize("seed", range(20))
def test_redraw_changes_question_and_equation_together(seed):
    row = redraw("Sam has 1,200 pens, 3 bags of 3 and $33.60. 7 days go by.", "x=1200.0-(3.0*3.0)", "1191", seed)
    many, few, again, money, days = problems._QUESTION_NUMBER.findall(row["question"])
    assert row["equation"] == f"{many}-({few}*{again})"
    assert few == again
    assert many != "1,200"
    assert (money, days) == ("33.60", "7")
    assert row["result"] == calculator.render(int(many) - int(few) ** 2)
    assert row["id"].startswith("m1-")


@pytest.mark.parametrize("seed", range(20))
def test_redraw_keeps_what_numbers_are(seed):
    row = redraw("4 pens and 9 pads cost $2.50 a dozen for 1 day.", "x=(9-4)*2.50*12-1", "149", seed)
    assert row["equation"].endswith("*12-1")
    assert "for 1 day" in row["question"]
    price = row["question"].split("$")[1].split()[0]
    assert 0.83 <= float(price) <= 7.5
    assert len(price.split(".")[1]) == 2
    pens, pads = int(row["question"].split()[0]), int(row["question"].split()[3])
    assert pads >= pens
    assert float(row["result"]).is_integer()


@pytest.mark.parametrize(
    ("question", "equation", "result"),
    [
        ("200 miles at a speed", "(200/x)=1", "200"),
        ("4 pens and 5 pens", "4+5", "10"),
        ("4 pens and some", "4+77", "81"),
        ("no numbers", "4+5", "9"),
        ("4 pens less 9", "4-9", "-5"),
        ("2 twice a number", "2*3", "6"),
    ],
)
def test_redraw_refuses(question, equation, result):
    assert redraw(question, equation, result) is None


# ---- parts of Calc-X


def write_part(path: Path, *numbers: int) -> None:
    rows = [
        {"id": f"a{number}", "question": f"What is {number} plus 1?", "result": str(number + 1)} for number in numbers
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def test_parts_are_joined(tmp_path: Path) -> None:
    write_part(tmp_path / "first.jsonl", 1, 2)
    write_part(tmp_path / "second.jsonl.gz", 3)
    write_part(tmp_path / "again.jsonl", 3)
    (tmp_path / "short.jsonl").write_text('{"id": "x", "question": "?"}')

    def ids(*names: str, num: int = 9) -> list[str]:
        return [row["id"] for row in parts.rows(root=str(tmp_path), names=names, split="first", num=num, seed=0)]

    assert ids("second", "first") == ["a3", "a1", "a2"]
    assert ids() == ["a1", "a2"]
    assert len(ids("second", "first", num=2)) == 2
    with pytest.raises(DataError, match="again: id 'a3' is also in second"):
        ids("second", "again")
    with pytest.raises(DataError, match="the row has no 'result'"):
        ids("short")
    with pytest.raises(DataError, match=r"third\.jsonl\[\.gz\] does not exist; set data\.root"):
        ids("third")


def test_every_fifth_question_is_held_out_and_known_ones_are_left_out(tmp_path: Path) -> None:
    write_part(tmp_path / "asdiv_a_test.jsonl.gz", *range(12))
    write_part(tmp_path / "mawps_train.jsonl.gz", 5, 6)
    config = load_config(["experiment=calc_asdiv_smollm2", f"data.root={tmp_path}", "model.path=tiny"])
    train, val = ([task.task_id for task in load_tasks(config, split)] for split in ("train", "val"))
    assert (train, val) == (["a1", "a2", "a3", "a4", "a7", "a8", "a9", "a11"], ["a0", "a10"])


def test_calc_mawps_reads_its_parts_under_data_root(tmp_path: Path) -> None:
    write_part(tmp_path / "mawps_train.jsonl.gz", 1, 2)
    write_part(tmp_path / "mawps_validation.jsonl", 3)
    write_part(tmp_path / "other.jsonl", 4)

    def ids(split: Split, *overrides: str) -> list[str]:
        config = load_config(["experiment=calc_mawps", f"data.root={tmp_path}", *overrides])
        return [task.task_id for task in load_tasks(config, split)]

    assert (ids("train"), ids("val")) == (["a1", "a2"], ["a3"])
    assert ids("train", "data.train.num=1") in (["a1"], ["a2"])
    assert ids("train", "data.train.names=[other,mawps_train]") == ["a4", "a1", "a2"]
    with pytest.raises(DataError, match=r"^none/mawps_train\.jsonl\[\.gz\] does not exist; set data\.root"):
        ids("train", "data.root=none")
    with pytest.raises(
        ConfigError, match=r"^data\.train\.names=\['a'\]: not read by .*problems\.py:generate; remove it$"
    ):
        load_tasks(load_config(["experiment=calc_tiny", "data.train.names=[a]"]), "train")


@needs_data
def test_redraw_mawps():
    rows = rows_of(DATA / "mawps_train.jsonl.gz")
    rng = random.Random(0)
    started = time.monotonic()
    drawn = [(row, problems.redraw(row, rng)) for row in rows]
    assert time.monotonic() - started < 20
    done = [(row, new) for row, new in drawn if new is not None]
    assert len(done) >= 0.9 * len(rows)
    assert sum(row["question"] != new["question"] for row, new in done) >= 0.98 * len(done)
    for row, new in done:
        assert calculator.render(calculator.evaluate(new["equation"])) == new["result"]
        assert float(new["result"]) >= 0
        assert problems.normalise_equation(new["equation"]) == new["equation"]
        old = problems.normalise_equation(row["equation"])
        assert problems._EQUATION_NUMBER.sub("n", old) == problems._EQUATION_NUMBER.sub("n", new["equation"])
        assert problems.solution(new)[-1]["content"] == f"The answer is {new['result']}."
