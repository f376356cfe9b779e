"""LangChain's model, and agents of LangChain and LangGraph."""

from __future__ import annotations

from typing import Any

from harness import MODEL, NEXT, PLAIN, QUESTION, SYSTEM, Answer, Rollout, Seen, case
from langchain.agents import create_agent
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition


def asking(question: str) -> list[Any]:
    return [("system", SYSTEM), ("user", question)]


def model(rollout: Rollout) -> ChatOpenAI:
    return ChatOpenAI(model=MODEL, base_url=rollout.url, api_key="any")  # type: ignore[arg-type]


async def ask(runnable: Any, streamed: bool, question: str, *more: Any) -> Any:
    """The reply, or what the pieces of it add up to."""
    messages = [*asking(question), *more]
    if not streamed:
        return await runnable.ainvoke(messages)
    total: Any = None
    async for piece in runnable.astream(messages):
        total = piece if total is None or not hasattr(piece, "content") else total + piece
    return total


async def run(graph: Any, streamed: bool, question: str, *told: Any) -> dict[str, Any]:
    """The last state of a graph."""
    start = {"messages": [*told, ("user", question)]}
    if not streamed:
        state: dict[str, Any] = await graph.ainvoke(start)
        return state
    async for mode, piece in graph.astream(start, stream_mode=["messages", "values"]):
        state = piece if mode == "values" else {}
    return state


def seen(state: dict[str, Any]) -> Seen:
    return Seen(sum(message.type == "ai" for message in state["messages"]), state["messages"][-1].text)


@case("LangChain", "langchain-openai", "plain")
async def plain(rollout: Rollout, streamed: bool) -> Seen:
    return Seen(1, (await ask(model(rollout), streamed, PLAIN)).text)


@case("LangChain agent", "langchain", "tool")
async def tool(rollout: Rollout, streamed: bool) -> Seen:
    agent = create_agent(model(rollout), tools=[rollout.calculator], system_prompt=SYSTEM)
    return seen(await run(agent, streamed, QUESTION))


@case("LangChain", "langchain-openai", "forced tool")
async def forced(rollout: Rollout, streamed: bool) -> Seen:
    choice = "calculator" if streamed else "any"
    reply = await ask(model(rollout).bind_tools([rollout.calculator], tool_choice=choice), streamed, QUESTION)
    results = [
        {"role": "tool", "content": rollout.calculator(**call["args"]), "tool_call_id": call["id"]}
        for call in reply.tool_calls
    ]
    return Seen(2, (await model(rollout).ainvoke([*asking(QUESTION), reply, *results])).text)


@case("LangChain", "langchain-openai", "structured")
async def structured(rollout: Rollout, streamed: bool) -> Seen:
    return Seen(1, (await ask(model(rollout).with_structured_output(Answer), streamed, PLAIN)).model_dump_json())


@case("LangChain", "langchain-openai", "structured by a tool")
async def structured_tool(rollout: Rollout, streamed: bool) -> Seen:
    runnable = model(rollout).with_structured_output(Answer, method="function_calling")
    return Seen(1, (await ask(runnable, streamed, PLAIN)).model_dump_json())


@case("LangChain agent", "langchain", "structured by a tool")
async def structured_agent(rollout: Rollout, streamed: bool) -> Seen:
    agent = create_agent(model(rollout), system_prompt=SYSTEM, response_format=Answer)
    state = await run(agent, streamed, PLAIN)
    return Seen(seen(state).calls, state["structured_response"].model_dump_json())


@case("LangGraph", "langgraph", "tool")
async def graph_tool(rollout: Rollout, streamed: bool) -> Seen:
    bound = model(rollout).bind_tools([rollout.calculator])

    async def think(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await bound.ainvoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    graph.add_node("think", think)
    graph.add_node("tools", ToolNode([rollout.calculator]))
    graph.add_edge(START, "think")
    graph.add_conditional_edges("think", tools_condition)
    graph.add_edge("tools", "think")
    return seen(await run(graph.compile(), streamed, QUESTION, ("system", SYSTEM)))


def over_responses(rollout: Rollout) -> ChatOpenAI:
    return ChatOpenAI(
        model=MODEL, base_url=rollout.url, api_key="any", use_responses_api=True, use_previous_response_id=True
    )  # type: ignore[call-arg, arg-type]


@case("LangChain (Responses)", "langchain-openai", "tool")
async def responses_tool(rollout: Rollout, streamed: bool) -> Seen:
    agent = create_agent(over_responses(rollout), tools=[rollout.calculator], system_prompt=SYSTEM)
    return seen(await run(agent, streamed, QUESTION))


@case("LangChain (Responses)", "langchain-openai", "second turn")
async def responses_second(rollout: Rollout, streamed: bool) -> Seen:
    first = await ask(over_responses(rollout), streamed, PLAIN)
    return Seen(2, (await ask(over_responses(rollout), streamed, PLAIN, first, ("user", NEXT))).text)


@case("LangChain (Responses)", "langchain-openai", "plain")
async def responses_plain(rollout: Rollout, streamed: bool) -> Seen:
    return Seen(1, (await ask(over_responses(rollout), streamed, PLAIN)).text)


@case("LangChain (Responses)", "langchain-openai", "structured")
async def responses_structured(rollout: Rollout, streamed: bool) -> Seen:
    runnable = over_responses(rollout).with_structured_output(Answer)
    return Seen(1, (await ask(runnable, streamed, PLAIN)).model_dump_json())
