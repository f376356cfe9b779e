"""Tables of the span attributes that are read: which kind a span is, and which attribute holds which field.

The same tables are in docs/traces.md.

Sources: OpenTelemetry's GenAI conventions with their older forms (OpenLLMetry, OpenLIT), OpenInference, Langfuse,
LangSmith, Logfire, pydantic-ai, the Vercel AI SDK, Google's ADK, MLflow, Laminar, Genkit, Agent Lightning 0.x, and
our own client.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class Kind(StrEnum):
    """The kind of event that a span describes."""

    CALL = "model call"
    TOOL = "tool call"
    AGENT = "agent"
    REWARD = "reward"
    OTHER = "nothing of ours"


def _kinds(**values: str) -> Mapping[str, Kind]:
    """Value of an attribute -> kind, from the values of each kind, separated by blanks."""
    return {value: Kind[kind.upper()] for kind, listed in values.items() for value in listed.split()}


KINDS: tuple[tuple[str, Mapping[str, Kind]], ...] = (
    (
        "gen_ai.operation.name",
        _kinds(
            call="chat text_completion generate_content",
            tool="execute_tool",
            agent="invoke_agent create_agent",
            other="embeddings retrieval invoke_workflow",
        ),
    ),
    ("openinference.span.kind", _kinds(call="LLM", tool="TOOL", agent="AGENT", other="EMBEDDING RETRIEVER RERANKER")),
    (
        "ai.operationId",
        _kinds(
            call="ai.generateText ai.generateText.doGenerate ai.streamText ai.streamText.doStream "
            "ai.generateObject ai.generateObject.doGenerate ai.streamObject ai.streamObject.doStream",
            tool="ai.toolCall",
            other="ai.embed ai.embed.doEmbed ai.embedMany ai.embedMany.doEmbed",
        ),
    ),
    ("traceloop.span.kind", _kinds(tool="tool", agent="agent")),
    ("llm.request.type", _kinds(call="chat completion", other="embedding")),
    ("langfuse.observation.type", _kinds(call="generation", tool="tool", agent="agent")),
    ("langsmith.span.kind", _kinds(call="llm", tool="tool", other="embedding retriever")),
    (
        "mlflow.spanType",
        _kinds(call="CHAT_MODEL LLM", tool="TOOL", agent="AGENT", other="EMBEDDING RETRIEVER RERANKER"),
    ),
    ("lmnr.span.type", _kinds(call="LLM", tool="TOOL")),
    ("genkit:metadata:subtype", _kinds(call="model", tool="tool")),
)
"""Attribute -> value -> kind. The first attribute whose value is listed decides, unless PRESENT finds a reward."""

PRESENT: tuple[tuple[str, Kind], ...] = (
    *((name, Kind.REWARD) for name in ("agl.reward.value", "agentlightning.reward.*")),
    *((name, Kind.TOOL) for name in ("gen_ai.tool.name", "gen_ai.tool.call.id", "ai.toolCall.name")),
    *((name, Kind.CALL) for name in ("gen_ai.output.messages", "gen_ai.completion.*", "gen_ai.completion")),
    *((name, Kind.CALL) for name in ("llm.output_messages.*", "llm.hosted_vllm.prompt_token_ids")),
    *((name, Kind.CALL) for name in ("llm.completions.*", "response_data", "gen_ai.request.model")),
)
"""Attributes whose presence decides the kind of a span: for a reward always, for others if KINDS does not decide."""

FIELDS: Mapping[str, tuple[str, ...]] = {
    "model": (
        *("gen_ai.response.model", "ai.response.model", "gen_ai.request.model", "llm.model_name", "ai.model.id"),
        *("langfuse.observation.model.name", "llm.response.model", "llm.request.model"),
    ),
    "reply id": ("gen_ai.response.id", "ai.response.id", "llm.response.id"),
    "finish reason": (
        *("gen_ai.response.finish_reasons", "ai.response.finishReason", "llm.finish_reason"),
        "gen_ai.completion.0.finish_reason",
    ),
    "request": (
        *("gen_ai.input.messages", "llm.input_messages.*", "gen_ai.prompt.*", "ai.prompt.messages"),
        *("gcp.vertex.agent.llm_request", "gen_ai.events", "events", "request_data", "langfuse.observation.input"),
        *("mlflow.spanInputs", "input.value", "gen_ai.prompt", "ai.prompt", "llm.prompts.*", "traceloop.entity.input"),
        *("lmnr.span.input", "genkit:input"),
    ),
    "system prompt": ("gen_ai.system_instructions", "gen_ai.events"),
    "previous reply": ("previous_response_id", "gen_ai.request.previous_response_id"),
    "parameters": ("llm.invocation_parameters", "request_data", "langfuse.observation.metadata.parameters"),
    "conversation": ("gen_ai.conversation.id",),
    "reply": (
        *("gen_ai.output.messages", "llm.output_messages.*", "gen_ai.completion.*", "gcp.vertex.agent.llm_response"),
        *("gen_ai.events", "events", "response_data", "langfuse.observation.output", "mlflow.spanOutputs"),
        *("output.value", "gen_ai.completion", "llm.completions.*", "traceloop.entity.output"),
        *("lmnr.span.output", "genkit:output"),
    ),
    "reply's text": ("ai.response.text", "ai.response.object"),
    "reply's reasoning": ("ai.response.reasoning",),
    "reply's tool calls": ("ai.response.toolCalls",),
    "tools offered": (
        *("gen_ai.tool.definitions", "llm.tools.*", "llm.request.functions.*", "ai.prompt.tools"),
        *("langfuse.observation.metadata.tools", "mlflow.chat.tools", "model_request_parameters"),
    ),
    "prompt tokens": (
        *("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens", "llm.token_count.prompt", "ai.usage.promptTokens"),
        *("ai.usage.inputTokens", "langfuse.observation.usage_details.input"),
    ),
    "reply tokens": (
        *("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens", "llm.token_count.completion"),
        *("ai.usage.completionTokens", "ai.usage.outputTokens", "langfuse.observation.usage_details.output"),
    ),
    "prompt token ids": ("agl.prompt_token_ids", "prompt_token_ids", "llm.hosted_vllm.prompt_token_ids"),
    "reply token ids": ("agl.response_token_ids", "response_token_ids", "llm.hosted_vllm.response_token_ids"),
    "log-probabilities": ("agl.logprobs", "logprobs.content"),
    "agent": (
        *("gen_ai.agent.name", "agent.name", "agent_role", "graph.node.id", "ai.telemetry.functionId"),
        *("agent_name", "traceloop.entity.name", "gen_ai.agent.id"),
    ),
    "graph node": (
        *("langfuse.observation.metadata.langgraph_node", "langsmith.metadata.langgraph_node"),
        *("traceloop.association.properties.langgraph_node", "metadata.langgraph_node"),
    ),
    "tool": ("gen_ai.tool.name", "tool.name", "ai.toolCall.name", "tool_call.function.name", "traceloop.entity.name"),
    "tool call id": ("gen_ai.tool.call.id", "ai.toolCall.id", "tool_call.id", "tool.id"),
    "arguments": (
        *("gen_ai.tool.call.arguments", "ai.toolCall.args", "gcp.vertex.agent.tool_call_args"),
        *("tool_call.function.arguments", "tool_arguments", "langfuse.observation.input", "mlflow.spanInputs"),
        *("input.value", "tool.parameters", "traceloop.entity.input", "lmnr.span.input", "genkit:input"),
    ),
    "result": (
        *("gen_ai.tool.call.result", "ai.toolCall.result", "gcp.vertex.agent.tool_response"),
        *("tool_response", "langfuse.observation.output", "mlflow.spanOutputs", "output.value"),
        *("traceloop.entity.output", "lmnr.span.output", "genkit:output"),
    ),
    "status": ("agl.tool.status",),
    "requesting call": ("agl.call_id",),
    "request's own text": ("agl.request",),
    "reply's own text": ("agl.reply",),
    "reward": ("agl.reward.value", "agentlightning.reward.*"),
    "reward's name": ("agl.reward.name",),
    "what a reward is about": ("agl.reward.about", "agentlightning.link.*"),
    "span id": ("agl.span_id",),
}
"""Field -> the attributes that may hold it, the best first. A name that ends in ".*" stands for a list spread over
attributes (`prefix.0.role`, …); the value of any other attribute may be JSON text."""
