"""The contents of the viewer's page of tokens: what became of every token that a rollout sampled."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Final

from agent_lightning.api.viewer.charts import number_text
from agent_lightning.api.viewer.decode import Decode
from agent_lightning.api.viewer.pages import Context
from agent_lightning.api.viewer.rollout import Credits, find
from agent_lightning.core.types import Group, ModelCall
from agent_lightning.credit.assign import CallCredit

SHADES: Final = 5
"""Shades of a colour on each side of zero."""
MAX_TOKENS: Final = 6000
"""Tokens of a call that its page shows; the others are counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A sampled token with what became of it."""

    text: str
    shade: str
    """The class of its colour."""
    tip: str
    untrained: bool


def tokens_page(
    group: Group, rollout_id: str, all_credits: Credits, decode: Decode, colour: str, problem: str = ""
) -> Context:
    """The sampled tokens of a rollout, coloured by `colour`: advantage, logprob, gap or version. `problem` says why
    they are shown as ids."""
    index, rollout = find(group, rollout_id)
    credits = all_credits[index]
    others = [credit for rollout_credits in all_credits for credit in rollout_credits or ()]
    largest = max((abs(credit.advantage) for credit in others if math.isfinite(credit.advantage)), default=0.0)
    trained = sum(credit.tokens for credit in credits or () if credit.status == "trained")
    calls = list(zip(rollout.calls, credits or repeat(None, len(rollout.calls)), strict=True))
    largest_gap = max((abs(gap) for call, credit in calls for gap in _gaps(call, credit)), default=math.nan)
    rows = []
    for number, (call, credit) in enumerate(calls):
        largest_value = largest_gap if colour == "gap" else largest
        shown = list(_tokens(call, credit, decode, colour, largest_value, trained))
        prompt = "".join(map(decode, call.prompt_T[-MAX_TOKENS:].tolist()))
        rows.append({"number": number, "call": call, "credit": credit, "prompt": prompt, "tokens": shown})
        rows[-1]["rest"] = call.response_T.size - len(shown)
    reasons = sorted({credit.status for credit in credits or () if credit.status != "trained"})
    return {
        "rollout": rollout,
        "rows": rows,
        "colour": colour,
        "reasons": reasons,
        "trained": trained,
        "largest": largest,
        "largest_gap": largest_gap,
        "versions": sorted({version for call in rollout.calls for version in call.version_T.tolist()}),
        "group_id": group.group_id,
        "held_out": rollout.key.split != "train",
        "problem": problem,
    }


def _tokens(
    call: ModelCall, credit: CallCredit | None, decode: Decode, colour: str, largest: float, trained: int
) -> Iterator[Token]:
    reason = "" if credit is None or credit.status == "trained" else credit.status
    reason = reason if call.key.split == "train" else "held out: never trained"
    arrays = (call.response_T[:MAX_TOKENS], call.logprob_T, call.version_T)
    columns = [*(array.tolist() for array in arrays), _gaps(call, credit) or repeat(math.nan)]
    for token, logprob, version, gap in zip(*columns, strict=False):
        advantage = credit.advantage if credit is not None and not reason else math.nan
        tip = f"token {token} · log-probability {number_text(logprob)} (p {math.exp(logprob):.3f}) · v{version}"
        if reason:
            tip += f" · not trained: {reason}"
        elif credit is not None:
            tip += f" · advantage {advantage:+.3f} · weight 1/{trained} of the rollout's"
        if not math.isnan(gap):
            tip += f" · gap {gap:+.1e}"
        if colour == "logprob":
            shade = "" if math.isnan(logprob) else f"p{min(SHADES, int((1 - math.exp(logprob)) * (SHADES + 1)))}"
        elif colour == "version":
            shade = f"c{version % 6}"
        else:
            value = gap if colour == "gap" else advantage
            scaled = value / largest if largest and math.isfinite(value) else 0.0
            level = math.ceil(abs(scaled) * SHADES)
            shade = f"{'up' if scaled > 0 else 'down'}{level}" if level else ""
        yield Token(text=decode(token), shade=shade, tip=tip, untrained=bool(reason))


def _gaps(call: ModelCall, credit: CallCredit | None) -> list[float]:
    """The learner's log-probability minus the engine's of each sampled token; empty if the learner's are not known."""
    if credit is None or len(credit.learner_logprobs) != call.response_T.size:
        return []
    pairs = zip(credit.learner_logprobs, call.logprob_T.tolist(), strict=True)
    return [learner - engine for learner, engine in pairs]
