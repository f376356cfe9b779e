"""Exact match and F1 of short answers, as MuSiQue's official metrics/answer.py defines them (arXiv 2108.00573).

That is SQuAD's normalisation (lower case; no ASCII punctuation, articles or extra spaces) and, of several right
answers, the one that fits best.

Example:

    exact_match("The Danube.", ["Danube"])   # 1
    f1("river Danube", ["Danube", "Donau"])  # 0.666…: one of two words right, one of one found
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


def normalise(text: str) -> str:
    """ "The  U.S. Navy!" -> "us navy"."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, golds: Sequence[str]) -> int:
    """1 where the answer is one of the right ones after normalisation, else 0."""
    return int(normalise(answer) in {normalise(gold) for gold in golds})


def f1(answer: str, golds: Sequence[str]) -> float:
    """The best harmonic mean of precision and recall over the words of a right answer; words count as often as used.

    Where one of the two has no words left, 1 if the other has none either, else 0.
    """
    return max(_f1(normalise(answer).split(), normalise(gold).split()) for gold in golds)


def _f1(answer: Sequence[str], gold: Sequence[str]) -> float:
    if not answer or not gold:
        return float(answer == gold)
    same = sum((Counter(answer) & Counter(gold)).values())
    if not same:
        return 0.0
    precision, recall = same / len(answer), same / len(gold)
    return 2 * precision * recall / (precision + recall)
