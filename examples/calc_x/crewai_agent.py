"""The agent with a calculator on CrewAI: a crew of one, as any user of CrewAI would write it. Run as a command.

OPENAI_BASE_URL, OPENAI_API_KEY and AGL_MODEL say where the model is, AGL_TASK what to answer:

    AGL_TASK='{"question": "What is 14 plus 3?"}' python crewai_agent.py  # The answer is 17.
"""

from __future__ import annotations

import json
import os
import sys

from calculator import SYSTEM, evaluate, render
from crewai import LLM, Agent, Crew, Task
from crewai.tools import tool

MAX_TURNS = 4


@tool("calculator")
def calculator(expression: str) -> str:
    """Work out one arithmetic expression, such as (14+3)*2."""
    try:
        return render(evaluate(expression))
    except ValueError as error:
        return f"error: {error}"


def main() -> None:
    question = json.loads(os.environ["AGL_TASK"])["question"]
    calc = Agent(
        role="calc",
        goal=SYSTEM,
        backstory="You solve word problems.",
        llm=LLM(model=os.environ["AGL_MODEL"], custom_openai=True),
        tools=[calculator],
        max_iter=MAX_TURNS,
    )
    task = Task(description=question, expected_output="The answer is N.", agent=calc)
    sys.stdout.write(f"{Crew(agents=[calc], tasks=[task]).kickoff()}\n")


if __name__ == "__main__":
    main()
