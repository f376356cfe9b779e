"""Make the tiny starting policy: a 1.6M-parameter Llama with its own tokenizer, pre-trained on the CPU.

    python examples/calc_x/pretrain.py --mawps DATA/calcx/mawps_train.jsonl.gz --out examples/calc_x/tiny_policy

Trains from scratch through the same learner as reinforcement learning (veRL's SFT loss) on right chats: the
generator's problems and MAWPS training questions with re-drawn numbers. In the first part every chat works its
calculation out with the calculator. In the rest, as in what people write, short sums are mostly done in the head, and
long ones hardly ever. The answers are right, but a model of this size cannot calculate: it picks up the habit without
the ability. To find out that calling the calculator pays is what it leaves for reinforcement learning.
The seed is fixed; the note beside the weights says how long it took.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections.abc import Iterator, Sequence
from itertools import accumulate, count
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import calculator
import problems
import reward
import tiny_model
from calculator import SYSTEM
from tiny_model import END, Row, replies

from agent_lightning.run.tasks import load_jsonl

CALL_OPEN = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "'
CALL_CLOSE = '"}}\n</tool_call>'
ROLES = ("system", "user", "assistant", "tool")
BUCKET = 8

# Hermes' form: a system turn that names the tools, and calls as JSON between <tool_call> tags. What the model sampled
# is rendered back token for token, so that the next prompt extends it.
TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content %}{{ message.content }}{% endif %}
{%- if loop.first and tools %} Tools:{% for tool in tools %} {{ tool.function.name }}({{ (tool.function.parameters.properties or {}).keys() | join(", ") }}){% endfor %}{% endif %}
{%- for call in message.tool_calls or [] -%}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor -%}
<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""

IN_THE_HEAD = {1: 0.65}
"""Share of the chats without the calculator in the last part, by the number of operations; IN_THE_HEAD_LONG else."""
IN_THE_HEAD_LONG = 0.1

TOOLS = [{"type": "function", "function": {"name": "calculator", "parameters": {"properties": {"expression": {}}}}}]


def encode(tokenizer: Any, chat: Sequence[dict[str, Any]]) -> Row:
    """Token ids of a chat, and where an assistant wrote them (its end-of-turn token included)."""
    chat = [_as_the_engine_reads(message) for message in chat]
    ids = tokenizer.apply_chat_template(chat, tools=TOOLS, tokenize=True, return_dict=False)
    opening, end = tokenizer.convert_tokens_to_ids(["<|im_start|>assistant\n", END])
    mask, writing = [], False
    for token in ids:
        mask.append(writing)
        writing = token == opening or (writing and token != end)
    return ids, mask


def _as_the_engine_reads(message: dict[str, Any]) -> dict[str, Any]:
    """Arguments of tool calls travel as JSON text; engines hand templates the object."""
    calls = [
        {**call, "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}}
        for call in message.get("tool_calls") or ()
    ]
    return {**message, "tool_calls": calls} if calls else message


def stream(args: argparse.Namespace, tokenizer: Any, mawps: Sequence[dict[str, Any]]) -> Iterator[list[Row]]:
    """Batches without end: a share of the generator's problems, the rest from MAWPS with numbers re-drawn.

    Rows of a batch are of like length: BUCKET batches are drawn at once, sorted and dealt out in random order.
    """
    rng = random.Random(args.seed)
    generated = problems.generate(args.seed + 1, 20_000, "train")
    weights = list(accumulate(args.two_step_weight if row["steps"] > 1 else 1.0 for row in generated))
    for drawn in count(0, BUCKET):
        rows: list[Row] = []
        last_part = drawn >= args.calculator_only * args.steps
        while len(rows) < BUCKET * args.batch:
            if rng.random() < args.generated_share:
                row = rng.choices(generated, cum_weights=weights)[0]
            else:
                row = problems.redraw(rng.choice(mawps), rng)
            if row is not None:
                in_the_head = IN_THE_HEAD.get(problems.operations(row["equation"]), IN_THE_HEAD_LONG)
                chat = problems.solution(row, in_the_head=last_part and rng.random() < in_the_head)
                rows.append(encode(tokenizer, chat))
        rows.sort(key=lambda row: len(row[0]))
        batches = [rows[i : i + args.batch] for i in range(0, len(rows), args.batch)]
        rng.shuffle(batches)
        yield from batches


def accuracy(model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], opening: str = "") -> tuple[float, float]:
    """Share of rows whose first greedy reply is right (a calculation by its value), and of those with a calculation.

    `opening` begins the reply: with CALL_OPEN, how well the model does where it always uses the calculator.
    """
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["question"]}],
            tools=TOOLS,
            add_generation_prompt=True,
            tokenize=False,
        )
        + opening
        for row in rows
    ]
    right = called = 0
    for row, text in zip(rows, replies(model, tokenizer, texts, max_tokens=40), strict=True):
        head, _, rest = (opening + text).partition(CALL_OPEN)
        called += bool(rest)
        arguments = json.dumps({"expression": rest.split('"')[0]})
        right += reward.score(row, calculator.call(arguments) if rest else head)
    return right / len(rows), called / len(rows)


def train(args: argparse.Namespace) -> None:
    mawps = [dict(task.payload) for task in load_jsonl(args.mawps)]
    validation = [dict(t.payload) for t in load_jsonl(str(args.mawps).replace("_train", "_validation"))]
    held_out = problems.generate(args.seed + 2, 240, "val")
    texts = [row["question"] for row in mawps] * 2 + [row["question"] for row in problems.generate(0, 4000, "train")]
    numbers = " ".join(str(number) for number in range(100))
    fixed = f"{SYSTEM} Tools: calculator(expression)", "The answer is", numbers
    tokenizer = tiny_model.build_tokenizer(
        [*texts, *fixed * 300],
        args.vocab_size,
        roles=ROLES,
        # "124" is "12" and "4": most numbers are then copied in one step, which a small model learns sooner.
        alone=r"\d{1,2}",
        template=TEMPLATE,
        units=(CALL_OPEN, CALL_CLOSE),
    )

    def measure(model: Any) -> dict[str, float]:
        note: dict[str, float] = {}
        for name, rows in ("generated_val", held_out), ("mawps_validation", validation):
            right, called = accuracy(model, tokenizer, rows)
            able, _ = accuracy(model, tokenizer, rows, CALL_OPEN)
            note |= {name: round(right, 3), f"{name}_calls": round(called, 3), f"{name}_able": round(able, 3)}
        return note

    asyncio.run(tiny_model.pretrain(args, tokenizer, stream(args, tokenizer, mawps), measure))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mawps", type=Path, required=True, help="mawps_train.jsonl.gz; its validation file beside it")
    tiny_model.arguments(parser, steps=1300, batch=64, vocab_size=1024)
    parser.add_argument("--generated-share", type=float, default=0.4)
    parser.add_argument("--two-step-weight", type=float, default=0.4)
    parser.add_argument(
        "--calculator-only", type=float, default=0.75, help="share of the steps that make the first part"
    )
    train(parser.parse_args())


if __name__ == "__main__":
    main()
