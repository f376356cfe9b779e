"""DSPy, with its default adapter. The tiny policy was never taught DSPy's notation: the engine holds it to that."""

from __future__ import annotations

from typing import Any

import dspy
from harness import MODEL, PLAIN, QUESTION, Answer, Rollout, Seen, case, saying


async def run(program: Any, says: dict[str, str], rollout: Rollout, streamed: bool, question: str) -> tuple[int, Any]:
    """Number of calls, and the answer."""
    fields = "\n\n".join(f"[[ ## {name} ## ]]\n{value}" for name, value in says.items()) + "\n\n[[ ## completed ## ]]"
    model = dspy.LM(f"openai/{MODEL}", api_base=rollout.url, api_key="any", cache=False, **saying(fields))
    with dspy.context(lm=model):
        if streamed:
            async for piece in dspy.streamify(program)(question=question):
                prediction: Any = piece
        else:
            prediction = await program.acall(question=question)
    return len(model.history), prediction.answer


@case("DSPy", "dspy", "plain")
async def plain(rollout: Rollout, streamed: bool) -> Seen:
    calls, answer = await run(dspy.Predict("question -> answer"), {"answer": "26"}, rollout, streamed, PLAIN)
    return Seen(calls, answer)


@case("DSPy", "dspy", "structured")
async def structured(rollout: Rollout, streamed: bool) -> Seen:
    class Ask(dspy.Signature):
        question: str = dspy.InputField()
        answer: Answer = dspy.OutputField()

    says = {"answer": '{"sure":false,"unit":"figs"}'}
    calls, answer = await run(dspy.Predict(Ask), says, rollout, streamed, PLAIN)
    return Seen(calls, answer.model_dump_json())


@case("DSPy (ReAct)", "dspy", "tool in text")
async def react(rollout: Rollout, streamed: bool) -> Seen:
    step = {"next_thought": "Add.", "next_tool_name": "calculator", "next_tool_args": '{"expression": "28+25-27"}'}
    program = dspy.ReAct("question -> answer", tools=[rollout.calculator], max_iters=1)
    calls, answer = await run(program, {**step, "reasoning": "It is so.", "answer": "26"}, rollout, streamed, QUESTION)
    return Seen(calls, answer)
