// The agent with a calculator on the `openai` package of npm, as any user would write it. It is run as a command:
//
//   AGL_TASK='{"question": "What is 14 plus 3?"}' node agent.js   # The answer is 17.
//
// The client reads OPENAI_BASE_URL and OPENAI_API_KEY itself.

import OpenAI from "openai";

import { evaluate } from "./calculator.js";

const MAX_TURNS = 4;

const client = new OpenAI();
const tools = [
  {
    type: "function",
    function: {
      name: "calculator",
      description: "Work out one arithmetic expression, such as (14+3)*2.",
      parameters: {
        type: "object",
        properties: { expression: { type: "string", description: "Numbers, + - * / and ( )." } },
        required: ["expression"],
      },
    },
  },
];

// The tool message that answers one tool call; mistakes are told to the model.
function run(call) {
  try {
    const { expression } = JSON.parse(call.function.arguments);
    return { role: "tool", tool_call_id: call.id, content: String(evaluate(expression)) };
  } catch (error) {
    return { role: "tool", tool_call_id: call.id, content: `error: ${error.message}` };
  }
}

async function solve(question) {
  const messages = [
    { role: "system", content: "Solve the problem. Use the calculator." },
    { role: "user", content: question },
  ];
  let reply;
  for (let turn = 0; turn < MAX_TURNS; turn++) {
    const completion = await client.chat.completions.create({ model: process.env.AGL_MODEL, messages, tools });
    reply = completion.choices[0].message;
    if (!reply.tool_calls?.length) break;
    messages.push(reply, ...reply.tool_calls.map(run));
  }
  return reply.content ?? "";
}

console.log(await solve(JSON.parse(process.env.AGL_TASK).question));
