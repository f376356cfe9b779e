"""Search spaces, a line each: `algorithm.lr=loguniform(1e-4,3e-3)`. Text to values, and nothing else.

parse_words(["experiment=calc_tiny", "algorithm.lr=loguniform(1e-4,3e-3)", "credit=choice(identical,air)"])
# (("experiment=calc_tiny",), {"algorithm.lr": Between(1e-4, 3e-3, log=True), "credit": Choice(("identical", "air"))})
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agent_lightning.core.errors import ConfigError

FORMS = {
    "choice": "choice(A,B,…)",
    "range": "range(START,STOP) or range(START,STOP,STEP), STOP not included",
    "uniform": "uniform(LOW,HIGH)",
    "loguniform": "loguniform(LOW,HIGH)",
    "quniform": "quniform(LOW,HIGH,STEP)",
    "randint": "randint(LOW,HIGH), HIGH not included",
}
"""The distributions, and how each is written."""
MANY = 24
_CALL = re.compile(r"(\w+)\((.*)\)\Z", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Choice:
    """One of these, each as it would stand on a command line."""

    values: tuple[str, ...]

    def ends(self) -> tuple[str, ...]:
        """What the config is checked with: all of them, or of very many the first and the last."""
        return self.values if len(self.values) <= MANY else (self.values[0], self.values[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Between:
    """A number from `low` to `high`, both included."""

    low: float
    high: float
    log: bool = False
    """Each factor is as likely as the next."""
    step: float | None = None
    """Multiples of it only."""
    whole: bool = False

    def ends(self) -> tuple[str, ...]:
        return self.text(self.low), self.text(self.high)

    def nearest(self, value: float) -> float:
        """The value of this distribution that is nearest."""
        step = 1.0 if self.whole else self.step
        return min(max(round(value / step) * step if step else value, self.low), self.high)

    def text(self, value: float) -> str:
        """As on a command line: 0.00031234567 -> "0.000312346"."""
        return str(round(value)) if self.whole else f"{value:.6g}"


Distribution = Choice | Between


def parse_words(words: Sequence[str]) -> tuple[tuple[str, ...], dict[str, Distribution]]:
    """Split a command line into what is fixed and what is searched. Raises ConfigError.

    A value that looks like a call is a distribution; anything else is an ordinary override.
    """
    fixed: list[str] = []
    space: dict[str, Distribution] = {}
    for word in words:
        key, equals, value = word.partition("=")
        call = _CALL.match(value.strip())
        if not equals or call is None:
            fixed.append(word)
            continue
        if key in space:
            raise ConfigError(f"{key}: given twice")
        space[key] = _distribution(word, call[1], _arguments(call[2]))
    for word in fixed:
        if (key := word.partition("=")[0]) in space:
            raise ConfigError(f"{key}: given twice, as a value and as a distribution")
    return tuple(fixed), space


def sampled_words(space: Mapping[str, Distribution], values: Mapping[str, object]) -> tuple[str, ...]:
    """What a trial's command line says of the searched keys.

    Example: ({"algorithm.lr": Between(…)}, {"algorithm.lr": 0.00031}) -> ("algorithm.lr=0.00031",)
    """
    return tuple(
        f"{key}={one.text(float(str(values[key]))) if isinstance(one, Between) else values[key]}"
        for key, one in space.items()
    )


def _distribution(word: str, name: str, arguments: list[str]) -> Distribution:
    """Raises ConfigError that shows how it is written."""
    if name not in FORMS:
        raise ConfigError(f"{word}: there is no distribution {name}; there are {', '.join(FORMS)}")
    if name == "choice":
        if not all(arguments):
            raise ConfigError(f"{word}: write {FORMS[name]}")
        return Choice(tuple(dict.fromkeys(arguments)))
    try:
        numbers = [float(argument) for argument in arguments]
        wanted = {"range": (2, 3), "quniform": (3,)}.get(name, (2,))
        if len(numbers) not in wanted or not all(map(math.isfinite, numbers)):
            raise ValueError
    except ValueError:
        raise ConfigError(f"{word}: write {FORMS[name]}, in numbers") from None
    low, high, step = numbers[0], numbers[1], numbers[2] if len(numbers) == 3 else 1.0
    if low >= high or step <= 0 or (name == "loguniform" and low <= 0):
        above = " that are above 0" if name == "loguniform" else ""
        raise ConfigError(f"{word}: the first number must be below the second{above or ', and a step above 0'}")
    if name == "range":
        return Choice(tuple(f"{low + index * step:.6g}" for index in range(math.ceil((high - low) / step - 1e-9))))
    if name == "randint":
        if low != int(low) or high != int(high):
            raise ConfigError(f"{word}: write {FORMS[name]}, in whole numbers")
        return Between(low=low, high=high - 1, whole=True)
    return Between(low=low, high=high, log=name == "loguniform", step=step if name == "quniform" else None)


def _arguments(text: str) -> list[str]:
    """Split at the commas that no bracket or quote encloses: "a,[b,c]" -> ["a", "[b,c]"]."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote or char in "\"'":
            quote = "" if char == quote else quote or char
        depth += (char in "([{") - (char in ")]}") if not quote else 0
        if char == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts]
