"""Search spaces on a command line: `algorithm.lr=loguniform(1e-4,3e-3)` searches a key by a distribution of Ray Tune.

Example:

    parse_words(["experiment=calc_tiny", "algorithm.lr=loguniform(1e-4,3e-3)", "credit=choice(identical,air)"])
    # (("experiment=calc_tiny",),
    #  {"algorithm.lr": Numbers("loguniform", (1e-4, 3e-3)), "credit": Choice(("identical", "air"))})
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
    "qloguniform": "qloguniform(LOW,HIGH,STEP)",
    "randint": "randint(LOW,HIGH), HIGH not included",
    "lograndint": "lograndint(LOW,HIGH), HIGH not included",
    "qrandint": "qrandint(LOW,HIGH,STEP)",
    "qlograndint": "qlograndint(LOW,HIGH,STEP)",
}
"""The form of each distribution. All but `range`, which stands for a choice, have Ray Tune's name and meaning."""
MOST_CHECKED = 24
_CALL = re.compile(r"(\w+)\((.*)\)\Z", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Choice:
    """A choice from values, each written as on a command line."""

    values: tuple[str, ...]

    def check_values(self) -> tuple[str, ...]:
        """The values with which the config is checked: all, or the first and the last of more than `MOST_CHECKED`."""
        return self.values if len(self.values) <= MOST_CHECKED else (self.values[0], self.values[-1])


@dataclass(frozen=True, slots=True)
class Numbers:
    """A distribution of numbers: Ray Tune's name for it, and its arguments (LOW, HIGH) or (LOW, HIGH, STEP)."""

    name: str
    arguments: tuple[float, ...]

    @property
    def integers(self) -> bool:
        return self.name.endswith("randint")

    @property
    def logarithmic(self) -> bool:
        return "log" in self.name

    @property
    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest possible value."""
        low, high = self.arguments[:2]
        return low, high - 1 if self.name in ("randint", "lograndint") else high

    def check_values(self) -> tuple[str, ...]:
        """Both bounds, as on a command line."""
        return tuple(map(self.text, self.bounds))

    def nearest(self, value: float) -> float:
        """The possible value that is nearest to `value`."""
        step = self.arguments[2] if len(self.arguments) == 3 else float(self.integers)
        low, high = self.bounds
        return min(max(round(value / step) * step if step else value, low), high)

    def text(self, value: float) -> str:
        """A value as on a command line: 0.00031234567 -> "0.000312346"."""
        return str(round(value)) if self.integers else f"{value:.6g}"


Distribution = Choice | Numbers


def parse_words(words: Sequence[str]) -> tuple[tuple[str, ...], dict[str, Distribution]]:
    """Split a command line into its fixed words and its search space. Raises ConfigError. A value that looks like a
    call is a distribution; any other value is an ordinary override."""
    fixed: list[str] = []
    space: dict[str, Distribution] = {}
    for word in words:
        key, _, value = word.partition("=")
        if (call := _CALL.match(value.strip())) is None:
            fixed.append(word)
        elif key in space:
            raise ConfigError(f"{key}: given twice")
        else:
            space[key] = _distribution(word, call[1], _arguments(call[2]))
    for word in fixed:
        if (key := word.partition("=")[0]) in space:
            raise ConfigError(f"{key}: given twice, as a value and as a distribution")
    return tuple(fixed), space


def sampled_words(space: Mapping[str, Distribution], values: Mapping[str, object]) -> tuple[str, ...]:
    """The words of a trial's command line for the searched keys.
    Example: ({"algorithm.lr": Numbers("uniform", (0, 1))}, {"algorithm.lr": 0.00031}) -> ("algorithm.lr=0.00031",)"""
    return tuple(
        f"{key}={values[key] if isinstance(distribution, Choice) else distribution.text(float(str(values[key])))}"
        for key, distribution in space.items()
    )


def _distribution(word: str, name: str, arguments: list[str]) -> Distribution:
    """Read a distribution. Raises ConfigError, which shows the form."""
    if name not in FORMS:
        raise ConfigError(f"{word}: there is no distribution {name}; there are {', '.join(FORMS)}")
    if name == "choice":
        if not all(arguments):
            raise ConfigError(f"{word}: write {FORMS[name]}")
        return Choice(tuple(dict.fromkeys(arguments)))
    try:
        numbers = tuple(map(float, arguments))
    except ValueError:
        numbers = ()
    counts = (2, 3) if name == "range" else (2 + name.startswith("q"),)
    if len(numbers) not in counts or not all(map(math.isfinite, numbers)):
        raise ConfigError(f"{word}: write {FORMS[name]}, in numbers")
    distribution = Numbers(name, numbers)
    low, high, step = (*numbers, 1.0)[:3]
    if low >= high or step <= 0 or (distribution.logarithmic and low <= 0):
        above = " that are above 0" if distribution.logarithmic else ", and a step above 0"
        raise ConfigError(f"{word}: the first number must be below the second{above}")
    if name == "range":
        return Choice(tuple(f"{low + index * step:.6g}" for index in range(math.ceil((high - low) / step - 1e-9))))
    if distribution.integers and not all(map(float.is_integer, numbers)):
        raise ConfigError(f"{word}: write {FORMS[name]}, in whole numbers")
    if name.startswith("q") and not all(math.isclose(end / step, round(end / step)) for end in (low, high)):
        raise ConfigError(f"{word}: the first and the second number must be multiples of the third")
    return distribution


def _arguments(text: str) -> list[str]:
    """Split at the commas outside of brackets and quotes: "a,[b,c]" -> ["a", "[b,c]"]."""
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
