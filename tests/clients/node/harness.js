// The harness of harness.py for programs on Node: one gateway root a line on standard input, one JSON line a case.

import { readFileSync } from "node:fs";

export const SYSTEM = "Solve the problem. Use the calculator.";
export const QUESTION = "Hana has 28 apples, gets 25 and loses 27. How many apples are left?";
export const PLAIN = "Gita takes 76 figs out of a tray that held 85 figs. How many stay?";
export const NEXT = "Mina needs 55 candles and has 45. How many candles are missing?";
export const MODEL = "policy";

const cases = [];

// program(rollout, streamed) returns {calls, text}.
export function add(client, name, feature, program) {
  const { version } = JSON.parse(readFileSync(new URL(`node_modules/${name}/package.json`, import.meta.url)));
  for (const streamed of [false, true]) cases.push({ client, version, feature, streamed, program });
}

// What a case talks to, and each run of its calculator.
class Rollout {
  constructor(root) {
    this.root = root;
    this.url = `${root}/v1`;
    this.tools = [];
  }

  calculator(expression) {
    let result;
    try {
      result = String(Function(`"use strict"; return (${expression})`)()); // what the policy of a test says
    } catch (error) {
      result = `error: ${error.name}`;
    }
    this.tools.push([expression, result]);
    return result;
  }
}

export async function main() {
  const wanted = process.env.CLIENTS_ONLY ?? "";
  const chosen = cases.filter((one) => `${one.client} ${one.feature}`.includes(wanted));
  console.log(JSON.stringify({ cases: chosen.length }));
  const roots = readFileSync(0, "utf8").split("\n").filter(Boolean);
  for (const [index, { program, ...one }] of chosen.entries()) {
    const rollout = new Rollout(roots[index]);
    let seen = { calls: 0, text: "", error: "" };
    try {
      seen = { ...seen, ...(await program(rollout, one.streamed)) };
    } catch (error) {
      seen.error = `${error.name}: ${error.message}`.slice(0, 2000);
    }
    console.log(JSON.stringify({ ...one, root: rollout.root, ...seen, tools: rollout.tools }));
  }
  process.exit(0);
}
