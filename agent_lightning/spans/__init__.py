"""Spans of an attempt: from OTLP and from files, by any instrumentor, to ModelCall, ToolCall, Reward and AgentSpan.

Reading order: `otlp` and `traces.formats` turn bytes into raw spans (`tree.RawSpan`); `attributes` has the tables of
attribute names and `fields` reads a single span by them; `messages` and `message_forms` bring chat messages into
OpenAI's form; `tree` finds the kind of each span and the spans of the same event; `conventions` reads all spans of an
attempt; `assemble` joins them with the calls that the gateway recorded. `traces` imports and exports files.
"""
