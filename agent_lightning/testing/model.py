"""A policy that is a table of logits: its language, its engine and its learner."""

from __future__ import annotations

import asyncio
import json
import uuid
import zlib
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from agent_lightning.core.json_values import as_mapping, parse_json
from agent_lightning.core.metrics import Max, Mean, merge
from agent_lightning.core.types import Batch, Ints
from agent_lightning.learners.base import Update, WeightBucket, Weights
from agent_lightning.serving.engine import Choice, Completion, Part, Refusal, join_parts, parse_error
from agent_lightning.serving.gate import Gate
from agent_lightning.serving.policy import Follower, PolicyBoard

PAD: Final = 0
END: Final = 1  # the token at the end of every message; the policy samples it after its word, with probability 1
ROLES: Final[Mapping[str, int]] = {"system": 2, "developer": 2, "user": 3, "assistant": 4, "tool": 5}
FIRST_BYTE: Final = 8
FIRST_WORD: Final = FIRST_BYTE + 256
CALL: Final = "call:"
"""If a request has tools, a word with this prefix is a tool call: "call:2+3" calls the first tool with 2+3,
"call:2+3;4" calls it twice."""


@dataclass(frozen=True, slots=True)
class ToyLanguage:
    """Turns text into tokens: an assistant's message that is a word is one token, any other text is its bytes.

    Example, with the words ("no", "yes"):

        encode([{"role": "user", "content": "A"}])  # [3 73 1 4]: user "A" END assistant
        # The policy answers "yes" END, [265 1]; the next prompt begins with [3 73 1 4 265 1].
    """

    words: tuple[str, ...]
    num_states: int = 1024

    def encode(self, messages: Sequence[Mapping[str, Any]]) -> Ints:
        """The prompt of a conversation, as token ids. Raises ValueError if it holds other than text."""
        tokens: list[int] = []
        for message in messages:
            text = message.get("content") or ""
            if isinstance(text, list):
                if any("text" not in part for part in text):
                    raise ValueError("not a multimodal model")
                text = "".join(part["text"] for part in text)
            if message.get("tool_calls"):
                arguments = [call["function"]["arguments"] for call in message["tool_calls"]]
                text = CALL + ";".join(str(as_mapping(parse_json(a)).get("expression", a)) for a in arguments)
            known = message["role"] == "assistant" and text in self.words
            inside = [FIRST_WORD + self.words.index(text)] if known else [FIRST_BYTE + byte for byte in text.encode()]
            tokens += [ROLES[message["role"]], *inside, END]
        return np.array([*tokens, ROLES["assistant"]], np.int32)

    def text(self, token: int) -> str:
        """A token as people read it: a word, a character of other text, or the number of a mark such as END."""
        if token < FIRST_WORD:
            return f"⟨{token}⟩" if token < FIRST_BYTE else chr(token - FIRST_BYTE)
        return self.words[token - FIRST_WORD]

    def prompts(self, request: Mapping[str, Any]) -> tuple[Ints, ...]:
        """The prompts of a chat or completion request, as token ids. Raises ValueError as vLLM does."""
        size = FIRST_WORD + len(self.words)
        if any(int(token) >= size for token in request.get("logit_bias", ())):
            raise ValueError("out of vocabulary (parameter=logit_bias)")
        if "prompt" not in request:
            return (self.encode(request["messages"]),)
        given = request["prompt"]
        several = isinstance(given, list) and given and not isinstance(given[0], int)
        prompts = given if several else [given]
        tokens = ([FIRST_BYTE + byte for byte in p.encode()] if isinstance(p, str) else p for p in prompts)
        arrays = tuple(np.array(prompt, np.int32) for prompt in tokens)
        if any(prompt_T.max() >= size for prompt_T in arrays):
            raise ValueError("out of vocabulary")
        return arrays

    def state(self, prompt_T: Ints) -> int:
        """The row of the table for a prompt: a hash of the last message of the user or of a tool."""
        starts = np.flatnonzero((prompt_T == ROLES["user"]) | (prompt_T == ROLES["tool"]))
        message = prompt_T[starts[-1] + 1 :] if starts.size else prompt_T
        end = int(np.argmax(message == END))
        return zlib.crc32(message[:end].astype(np.int32).tobytes()) % self.num_states


@dataclass(frozen=True, slots=True, kw_only=True)
class _Query:
    prompts: tuple[Ints, ...]
    temperature: float
    max_tokens: int
    num: int  # the number of choices for each prompt
    seed: int | None  # the seed of the sampling; None: it depends on how often the prompt has been sampled


class ToyEngine:
    """The policy's engine, with exact token ids, true log-probabilities, and the refusals of vLLM. It reads
    `temperature` (0: the likeliest word, with log-probability 0), `max_tokens`, `n` and `seed`. As in vLLM, one policy
    version answers a call from its first to its last token, unless the rule of the gate is "keep": then an update may
    fall between the word and END."""

    def __init__(
        self,
        language: ToyLanguage,
        *,
        seed: int = 0,
        max_len: int = 4096,
        delay_s: float = 0.0,
        gate: Gate | None = None,
    ) -> None:
        """Samples depend on the seed, the policy version, the prompt, and how often the version has sampled the prompt
        before, so a run whose rollouts come in another order samples the same. `max_len` is the most tokens of prompt
        and response together, `delay_s` the seconds that each answer takes; the attribute may be changed."""
        self.delay_s = delay_s
        self.version = 0
        self.in_flight = 0  # the number of calls that are being answered
        self._language = language
        self._max_len = max_len
        self._seed = seed
        self._repeats: Counter[int] = Counter()
        self._table = np.zeros((language.num_states, len(language.words)), np.float32)
        self._gate = gate or Gate()
        self._failures = 0
        self._follower: Follower | None = None

    def fail_next(self, num: int) -> None:
        """Refuse the next `num` calls with status 500, as a broken engine would."""
        self._failures = num

    async def generate(self, request: Mapping[str, Any]) -> Completion | Refusal:
        """Answer one chat or completion request."""
        query = await self._read(request)
        if isinstance(query, Refusal):
            return query
        async with self._counted():
            completion = await self._gate.complete(lambda: self._answer(query, request))
        tools, wanted = request.get("tools") or [], request.get("tool_choice", "auto")
        for choice in completion.reply["choices"] if tools and wanted != "none" else ():
            word = choice["message"]["content"]
            if word.startswith(CALL) or wanted != "auto":  # a forced call calls with any word
                name, expressions = tools[0]["function"]["name"], word.removeprefix(CALL).split(";")
                name = wanted["function"]["name"] if isinstance(wanted, dict) else name
                functions = [{"name": name, "arguments": json.dumps({"expression": text})} for text in expressions]
                calls = [{"id": f"call-{uuid.uuid4().hex[:8]}", "type": "function", "function": f} for f in functions]
                if choice["finish_reason"] == "length":
                    continue
                choice["finish_reason"] = "stop" if isinstance(wanted, dict) else "tool_calls"  # as OpenAI
                choice["message"] = {"role": "assistant", "content": None, "tool_calls": calls}
        return completion

    async def stream(self, request: Mapping[str, Any]) -> AsyncIterator[Part | Refusal]:
        """Answer token by token, each after `delay_s`; a word that is a tool call stays a word."""
        query = await self._read(request)
        if isinstance(query, Refusal):
            yield query
            return
        async with self._counted():
            async for part in self._gate.stream(lambda: self._parts(query, request)):
                yield part

    async def _answer(self, query: _Query, request: Mapping[str, Any]) -> Completion:
        version, choices = self.version, self._sample(query)
        await asyncio.sleep(self.delay_s)
        return join_parts([self._part(choices, slice(None), version, raw="prompt" in request)])

    async def _parts(self, query: _Query, request: Mapping[str, Any]) -> AsyncGenerator[Part, None]:
        version, choices = self.version, self._sample(query)
        for position in range(max(choice.response_T.size for choice in choices)):
            await asyncio.sleep(self.delay_s)
            yield self._part(choices, slice(position, position + 1), version, raw="prompt" in request)

    def _part(self, choices: Sequence[Choice], tokens: slice, version: int, *, raw: bool) -> Part:
        """The given positions of each choice, in the form of a chunk of vLLM; `raw`: of a text completion."""
        pieces = []
        for index, choice in enumerate(choices):
            ids, values = choice.response_T[tokens].tolist(), choice.logprob_T[tokens].tolist()
            texts = ["" if token == END else self._language.words[token - FIRST_WORD] for token in ids]
            text = "".join(texts)
            entries = [
                {"token": token or "<end>", "logprob": value, "bytes": list(token.encode()), "top_logprobs": []}
                for token, value in zip(texts, values, strict=True)
            ]
            ended = tokens.stop in (None, choice.response_T.size)
            # The word is sampled when the call begins, and END when it is out.
            kept_on = self.version > version and tokens.stop != 1
            piece = {
                "index": index,
                "prompt_token_ids": choice.prompt_T.tolist(),
                "token_ids": ids,
                "finish_reason": choice.finish_reason if ended else None,
                "logprobs": {"tokens": texts, "token_logprobs": values} if raw else {"content": entries},
                **({"text": text} if raw else {"delta": {"content": text}}),
                **({"new_versions": [(1, self.version)]} if kept_on else {}),
            }
            pieces += [piece] if ids else []
        prompt, completion = choices[0].prompt_T.size, sum(choice.response_T.size for choice in choices)
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return Part(chunk={"choices": pieces, "usage": usage}, policy_version=version)

    @asynccontextmanager
    async def _counted(self) -> AsyncIterator[None]:
        """Count a call, which waits until the engine has weights, if it follows a board."""
        self.in_flight += 1
        try:
            if self._follower is not None:
                await self._follower.wait_until_joined()
            yield
        finally:
            self.in_flight -= 1

    async def _read(self, request: Mapping[str, Any]) -> _Query | Refusal:
        """Parse a request, or refuse it as vLLM would."""
        if self._failures > 0:
            self._failures -= 1
            await asyncio.sleep(self.delay_s)
            return Refusal(status=500, message="the toy engine fails", code="engine_error", type="server_error")
        try:
            greedy = request.get("top_k") == 1 or request.get("top_p", 1.0) < 1e-3
            query = _Query(
                prompts=self._language.prompts(request),
                temperature=0.0 if greedy else float(request.get("temperature", 1.0)),
                max_tokens=int(request.get("max_tokens", 2)),
                num=int(request.get("n") or 1),
                seed=None if request.get("seed") is None else abs(int(request["seed"])),
            )
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            return parse_error(str(error), 400)
        if query.max_tokens < 1 or not query.temperature >= 0.0:
            return parse_error("max_tokens or temperature", 400)
        if max(prompt_T.size for prompt_T in query.prompts) >= self._max_len:
            return parse_error(f"maximum context length is {self._max_len}", 400)
        return query

    async def install(self, weights: Weights) -> None:
        """Switch to these weights; the gate decides what happens to running calls."""
        (bucket,) = weights.buckets
        (entry,) = bucket.parameters
        async with self._gate.update():
            raw = np.asarray(bucket.data, np.uint8)[entry["offset"] :].tobytes()
            self._table = np.frombuffer(raw, entry["dtype"]).reshape(entry["shape"])
            self.version = weights.version
            self._repeats.clear()

    async def join(self, board: PolicyBoard) -> None:
        """Become a replica of the policy, with the board's current weights."""
        self._follower = Follower(board, self.install, _check_alive)
        await self._follower.join()

    async def follow(self) -> None:
        """Install newer weights as they are published, until cancelled; call it after `join`."""
        assert self._follower is not None
        await self._follower.run()

    def _sample(self, query: _Query) -> list[Choice]:
        choices = []
        for index, prompt_T in enumerate(prompt_T for prompt_T in query.prompts for _ in range(query.num)):
            logits = self._table[self._language.state(prompt_T)]
            if query.temperature == 0.0:
                word, logprob = int(np.argmax(logits)), 0.0
            else:
                logprobs = _log_softmax(logits / query.temperature)
                word = int(self._random(prompt_T, query.seed, index).choice(logits.size, p=np.exp(logprobs)))
                logprob = float(logprobs[word])
            length = min(2, query.max_tokens, self._max_len - prompt_T.size)
            choice = Choice(
                prompt_T=prompt_T,
                response_T=np.array([FIRST_WORD + word, END][:length], np.int32),
                logprob_T=np.array([logprob, 0.0][:length], np.float32),
                finish_reason="stop" if length == 2 else "length",
            )
            choices.append(choice)
        return choices

    def _random(self, prompt_T: Ints, seed: int | None, index: int) -> np.random.Generator:
        if seed is not None:
            return np.random.default_rng([seed, index])
        prompt = zlib.crc32(prompt_T.tobytes())
        self._repeats[prompt] += 1
        return np.random.default_rng([self._seed, self.version, prompt, self._repeats[prompt]])


async def _check_alive() -> None:
    """Does nothing: a table cannot die."""


class ToyLearner:
    """The clipped policy gradient of PPO (arXiv 1707.06347, equation 7) on the table, by plain gradient ascent."""

    def __init__(
        self, language: ToyLanguage, *, lr: float = 8.0, clip_ratio: float = 0.2, temperature: float = 1.0
    ) -> None:
        """`temperature` is that of the sampling that made the samples."""
        self._language = language
        self._lr = lr
        self._clip_ratio = clip_ratio
        self._temperature = temperature
        self.table = np.zeros((language.num_states, len(language.words)), np.float32)
        self._version = 0

    async def update(self, batches: Sequence[Batch], *, epochs: int = 1) -> Update:
        """Take a step for each batch. Only the first reports the gap between the engine's log-probabilities and the
        table's: later steps see another table than the engine had."""
        steps = [self._step(batch, gap=index == 0) for index, batch in enumerate([*batches] * epochs)]
        return Update(metrics=merge(*(step.metrics for step in steps)), logprobs=steps[0].logprobs if steps else ())

    async def publish(self) -> Weights:
        self._version += 1
        entry = {"name": "table", "dtype": "float32", "shape": list(self.table.shape), "offset": 0}
        data = np.frombuffer(self.table.tobytes(), np.uint8)
        return Weights(version=self._version, buckets=(WeightBucket(parameters=(entry,), data=data),))

    async def save(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        np.save(path / "table.npy", self.table)

    async def restore(self, path: Path, version: int) -> None:
        self.table = np.load(path / "table.npy")
        self._version = version

    def _step(self, batch: Batch, *, gap: bool) -> Update:
        logprob_NT = np.zeros(batch.token_NT.shape, np.float32)  # END has 0
        gradient = np.zeros(self.table.shape, np.float64)
        objective, clipped, gaps = 0.0, [], []
        current_NT = batch.version_NT >= self._version  # the table has moved since it sampled the other tokens
        for row, position in np.argwhere(batch.mask_NT):
            word = int(batch.token_NT[row, position]) - FIRST_WORD
            old = float(batch.logprob_NT[row, position])
            if word < 0:  # END has probability 1, so it has no gradient
                gaps += [abs(old)] if current_NT[row, position] and not np.isnan(old) else []
                continue
            state = self._language.state(batch.token_NT[row, :position])
            logprobs = _log_softmax(self.table[state] / self._temperature)
            logprob_NT[row, position] = logprobs[word]
            if np.isnan(old):  # the engine gave none
                old = float(logprobs[word])
            elif current_NT[row, position]:
                gaps.append(abs(float(logprobs[word]) - old))
            ratio = float(np.exp(logprobs[word] - old))
            advantage = float(batch.advantage_NT[row, position])
            weight = float(batch.weight_NT[row, position])
            bounded = float(np.clip(ratio, 1 - self._clip_ratio, 1 + self._clip_ratio))
            objective += weight * min(ratio * advantage, bounded * advantage)
            clipped.append(bounded * advantage < ratio * advantage)
            if not clipped[-1]:
                one_hot = np.arange(logprobs.size) == word
                gradient[state] += weight * advantage * ratio / self._temperature * (one_hot - np.exp(logprobs))
        self.table = (self.table + self._lr * gradient).astype(np.float32)
        metrics: dict[str, Mean | Max] = {
            "learner/loss": Mean.of([-objective]),
            "learner/grad_norm": Mean.of([float(np.linalg.norm(gradient))]),
            "learner/clip_fraction": Mean.of(clipped),
        }
        if gap and gaps:
            metrics |= {"logprob_gap/mean_abs": Mean.of(gaps), "logprob_gap/max_abs": Max(max(gaps, default=0.0))}
        return Update(metrics=metrics, logprobs=(logprob_NT,))


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()), np.float64)
