// OpenAI's and Anthropic's clients on Node, and Vercel's AI SDK, with their defaults.

import Anthropic from "@anthropic-ai/sdk";
import { zodOutputFormat } from "@anthropic-ai/sdk/helpers/zod";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createGoogleGenerativeAI } from "@ai-sdk/google";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, stepCountIs, streamObject, streamText, tool } from "ai";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

globalThis.AI_SDK_LOG_WARNINGS = false; // it would print them between the results

import { add, main, MODEL, NEXT, PLAIN, QUESTION, SYSTEM } from "./harness.js";

const Answer = z.object({ sure: z.boolean(), unit: z.enum(["figs", "trays"]) });
const PARAMETERS = {
  type: "object",
  properties: { expression: { type: "string" } },
  required: ["expression"],
  additionalProperties: false,
};
const FUNCTION = { name: "calculator", description: "Computes.", parameters: PARAMETERS };
const asking = (question) => [
  { role: "system", content: SYSTEM },
  { role: "user", content: question },
];
const openai = (rollout) => new OpenAI({ baseURL: rollout.url, apiKey: "any" });

async function chatReply(client, streamed, body) {
  const completions = client.chat.completions;
  if (streamed) return (await completions.stream({ model: MODEL, ...body }).finalChatCompletion()).choices[0].message;
  return (await completions.create({ model: MODEL, ...body })).choices[0].message;
}

async function chatLoop(rollout, streamed, first = {}) {
  const messages = asking(QUESTION);
  const tools = [{ type: "function", function: FUNCTION }];
  for (let calls = 1; ; calls++, first = {}) {
    const message = await chatReply(openai(rollout), streamed, { messages, tools, ...first });
    if (!message.tool_calls?.length || calls === 4) return { calls, text: message.content ?? "" };
    messages.push(message);
    for (const call of message.tool_calls) {
      const content = rollout.calculator(JSON.parse(call.function.arguments).expression);
      messages.push({ role: "tool", tool_call_id: call.id, content });
    }
  }
}

add("openai (Node, chat)", "openai", "plain", async (rollout, streamed) => {
  return { calls: 1, text: (await chatReply(openai(rollout), streamed, { messages: asking(PLAIN) })).content };
});
add("openai (Node, chat)", "openai", "tool", (rollout, streamed) => chatLoop(rollout, streamed));
add("openai (Node, chat)", "openai", "forced tool", (rollout, streamed) => {
  const named = { type: "function", function: { name: "calculator" } };
  return chatLoop(rollout, streamed, { tool_choice: streamed ? named : "required" });
});
add("openai (Node, chat)", "openai", "structured", async (rollout, streamed) => {
  const body = { model: MODEL, messages: asking(PLAIN), response_format: zodResponseFormat(Answer, "answer") };
  const completions = openai(rollout).chat.completions;
  const reply = streamed ? await completions.stream(body).finalChatCompletion() : await completions.parse(body);
  return { calls: 1, text: JSON.stringify(reply.choices[0].message.parsed) };
});

async function response(client, streamed, body) {
  const request = { model: MODEL, instructions: SYSTEM, ...body };
  return streamed ? client.responses.stream(request).finalResponse() : client.responses.create(request);
}

async function responsesLoop(rollout, streamed, first = {}) {
  const input = [{ role: "user", content: QUESTION }];
  const tools = [{ type: "function", ...FUNCTION, strict: true }];
  for (let calls = 1; ; calls++, first = {}) {
    const reply = await response(openai(rollout), streamed, { input, tools, ...first });
    const called = reply.output.filter((item) => item.type === "function_call");
    if (!called.length || calls === 4) return { calls, text: reply.output_text };
    input.push(...reply.output);
    for (const call of called) {
      const output = rollout.calculator(JSON.parse(call.arguments).expression);
      input.push({ type: "function_call_output", call_id: call.call_id, output });
    }
  }
}

add("openai (Node, Responses)", "openai", "plain", async (rollout, streamed) => {
  return { calls: 1, text: (await response(openai(rollout), streamed, { input: PLAIN })).output_text };
});
add("openai (Node, Responses)", "openai", "tool", (rollout, streamed) => responsesLoop(rollout, streamed));
add("openai (Node, Responses)", "openai", "forced tool", (rollout, streamed) => {
  const named = { type: "function", name: "calculator" };
  return responsesLoop(rollout, streamed, { tool_choice: streamed ? named : "required" });
});
add("openai (Node, Responses)", "openai", "structured", async (rollout, streamed) => {
  const body = { model: MODEL, input: PLAIN, text: { format: zodTextFormat(Answer, "answer") } };
  const responses = openai(rollout).responses;
  const reply = streamed ? await responses.stream(body).finalResponse() : await responses.parse(body);
  return { calls: 1, text: JSON.stringify(reply.output_parsed) };
});

add("openai (Node, Responses)", "openai", "second turn", async (rollout, streamed) => {
  const client = openai(rollout);
  const first = await response(client, streamed, { input: PLAIN });
  const reply = await response(client, streamed, { input: NEXT, previous_response_id: first.id });
  return { calls: 2, text: reply.output_text };
});

const textOf = (message) => message.content.map((block) => block.text ?? "").join("");

async function messageOf(rollout, streamed, body) {
  const client = new Anthropic({ baseURL: rollout.root, apiKey: "any" });
  const request = { model: MODEL, max_tokens: 256, system: SYSTEM, ...body };
  return streamed ? client.messages.stream(request).finalMessage() : client.messages.create(request);
}

async function messagesLoop(rollout, streamed, first = {}) {
  const messages = [{ role: "user", content: QUESTION }];
  const tools = [{ name: "calculator", description: "Computes.", input_schema: PARAMETERS }];
  for (let calls = 1; ; calls++, first = {}) {
    const reply = await messageOf(rollout, streamed, { messages, tools, ...first });
    if (reply.stop_reason !== "tool_use" || calls === 4) return { calls, text: textOf(reply) };
    const used = reply.content.filter((block) => block.type === "tool_use");
    const results = used.map((block) => {
      const content = rollout.calculator(block.input.expression);
      return { type: "tool_result", tool_use_id: block.id, content };
    });
    messages.push({ role: "assistant", content: reply.content }, { role: "user", content: results });
  }
}

add("anthropic (Node)", "@anthropic-ai/sdk", "plain", async (rollout, streamed) => {
  const messages = [{ role: "user", content: PLAIN }];
  return { calls: 1, text: textOf(await messageOf(rollout, streamed, { messages })) };
});
add("anthropic (Node)", "@anthropic-ai/sdk", "tool", (rollout, streamed) => messagesLoop(rollout, streamed));
add("anthropic (Node)", "@anthropic-ai/sdk", "forced tool", (rollout, streamed) => {
  return messagesLoop(rollout, streamed, { tool_choice: streamed ? { type: "tool", name: "calculator" } : { type: "any" } });
});

add("anthropic (Node)", "@anthropic-ai/sdk", "structured", async (rollout, streamed) => {
  const client = new Anthropic({ baseURL: rollout.root, apiKey: "any" });
  const output_config = { format: zodOutputFormat(Answer) };
  const body = { model: MODEL, max_tokens: 256, messages: [{ role: "user", content: PLAIN }], output_config };
  const reply = streamed ? await client.messages.stream(body).finalMessage() : await client.messages.parse(body);
  return { calls: 1, text: JSON.stringify(reply.parsed_output) };
});

const PROVIDERS = {
  "Vercel AI SDK (Responses)": (rollout) => createOpenAI({ baseURL: rollout.url, apiKey: "any" })(MODEL),
  "Vercel AI SDK (chat)": (rollout) => createOpenAI({ baseURL: rollout.url, apiKey: "any" }).chat(MODEL),
  "Vercel AI SDK (compatible)": (rollout) => {
    // Without this setting it sends no schema: https://ai-sdk.dev/providers/openai-compatible-providers
    const settings = { name: "agl", supportsStructuredOutputs: true };
    return createOpenAICompatible({ ...settings, baseURL: rollout.url, apiKey: "any" })(MODEL);
  },
  "Vercel AI SDK (Google)": (rollout) => {
    return createGoogleGenerativeAI({ baseURL: `${rollout.root}/v1beta`, apiKey: "any" })(MODEL);
  },
  "Vercel AI SDK (messages)": (rollout) => createAnthropic({ baseURL: rollout.url, apiKey: "any" })(MODEL),
};

async function vercel(model, streamed, settings) {
  const request = { model, system: SYSTEM, maxRetries: 0, ...settings };
  if (!streamed) return generateText(request);
  let failure;
  const result = streamText({ ...request, onError: ({ error }) => (failure = error) });
  await result.consumeStream();
  if (failure) throw failure;
  return { text: await result.text, steps: await result.steps, response: result.response };
}

// The second request refers to the items of the first reply, as the provider's `store` is on by default.
add("Vercel AI SDK (Responses)", "ai", "second turn", async (rollout, streamed) => {
  const model = PROVIDERS["Vercel AI SDK (Responses)"](rollout);
  const messages = [{ role: "user", content: PLAIN }];
  const { response } = await vercel(model, streamed, { messages });
  messages.push(...(await response).messages, { role: "user", content: NEXT });
  return { calls: 2, text: (await vercel(model, streamed, { messages })).text };
});

for (const [client, provider] of Object.entries(PROVIDERS)) {
  add(client, "ai", "plain", async (rollout, streamed) => {
    return { calls: 1, text: (await vercel(provider(rollout), streamed, { prompt: PLAIN })).text };
  });
  const tools = (rollout) => ({
    calculator: tool({
      description: "Computes.",
      inputSchema: z.object({ expression: z.string() }),
      execute: async ({ expression }) => rollout.calculator(expression),
    }),
  });
  add(client, "ai", "tool", async (rollout, streamed) => {
    const loop = { prompt: QUESTION, tools: tools(rollout), stopWhen: stepCountIs(4) };
    const { text, steps } = await vercel(provider(rollout), streamed, loop);
    return { calls: steps.length, text };
  });
  add(client, "ai", "forced tool", async (rollout, streamed) => {
    const toolChoice = streamed ? { type: "tool", toolName: "calculator" } : "required";
    const prepareStep = ({ stepNumber }) => ({ toolChoice: stepNumber ? "auto" : toolChoice });
    const loop = { prompt: QUESTION, tools: tools(rollout), prepareStep, stopWhen: stepCountIs(4) };
    const { text, steps } = await vercel(provider(rollout), streamed, loop);
    return { calls: steps.length, text };
  });
  const structured = client.includes("messages") ? "structured by a tool" : "structured";
  add(client, "ai", structured, async (rollout, streamed) => {
    const request = { model: provider(rollout), system: SYSTEM, prompt: PLAIN, schema: Answer };
    if (!streamed) return { calls: 1, text: JSON.stringify((await generateObject(request)).object) };
    const result = streamObject(request);
    for await (const _ of result.partialObjectStream);
    return { calls: 1, text: JSON.stringify(await result.object) };
  });
}

await main();
