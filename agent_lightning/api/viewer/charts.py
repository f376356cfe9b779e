"""The geometry of charts over steps, in pixels; templates/chart.html draws them as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

WIDTH: Final = 560.0
HEIGHT: Final = 210.0
LEFT: Final = 54.0
RIGHT: Final = 12.0
TOP: Final = 14.0
BOTTOM: Final = 26.0
MAX_POINTS: Final = 400
"""Points of a line that are drawn; of a longer series, the means of neighbours."""
STEP_SIZES: Final = (1, 2, 5, 10, 20, 25, 50, 100, 250, 500, 1000, 2500, 10_000, 10**9)

Link = Callable[[int], str]
"""From a step to the address that a click on it opens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    """(step, value), by step."""
    half_widths: Sequence[float] = ()
    """Half the width of the band around each point; empty if the line has no band."""
    dots: bool = False
    """Whether each point is marked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """What a template draws. Coordinates are pixels of an image of WIDTH x HEIGHT."""

    title: str
    unit: str
    names: Sequence[str]
    shapes: Sequence[Mapping[str, Any]]
    """Polylines, bands, dots and bars, each with the number of its line or part."""
    y_ticks: Sequence[tuple[float, str]]
    x_ticks: Sequence[tuple[float, int]]
    columns: Sequence[tuple[float, float, str, str]]
    """Left edge, width, text and address of each step's column, which shows its values and can be clicked."""
    size: tuple[float, float, float, float, float, float] = (WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM)


def line_chart(
    title: str, lines: Sequence[Line], *, link: Link | None = None, unit: str = "", log: bool = False
) -> Chart | None:
    """Lines over steps; None if they have no point. The axis begins at zero, or is logarithmic: values up to zero are
    then left out."""
    known = [line for line in (_thin(line, log) for line in lines) if line.points]
    if not known:
        return None
    edges = [
        v + s * w for line in known for (_, v), w in zip(line.points, line.half_widths, strict=False) for s in (-1, 1)
    ]
    values = [value for line in known for _, value in line.points]
    y, y_ticks = _vertical([*values, *filter(math.isfinite, edges)], log=log)
    x, x_ticks, width = _horizontal([step for line in known for step, _ in line.points])
    shapes: list[Mapping[str, Any]] = []
    tips: dict[float, list[str]] = {}
    for number, line in enumerate(known):
        half = [0.0 if math.isnan(w) else w for w in line.half_widths]
        if half:
            sides = [[(x(s), y(v + sign * w)) for (s, v), w in zip(line.points, half, strict=True)] for sign in (1, -1)]
            shapes.append({"kind": "band", "number": number, "path": _path([*sides[0], *sides[1][::-1]])})
        points = [(x(step), y(value)) for step, value in line.points]
        shapes.append({"kind": "line", "number": number, "path": _path(points)})
        shapes += [
            {"kind": "dot", "number": number, "x": a, "y": b} for a, b in points if line.dots or len(points) == 1
        ]
        for index, (step, value) in enumerate(line.points):
            spread = f" ± {number_text(half[index], 2)}" if half and half[index] else ""
            tips.setdefault(step, []).append(f"{line.name} {number_text(value)}{spread}")
    columns = _columns(tips, x, width, link)
    names = [line.name for line in known]
    return Chart(title=title, unit=unit, names=names, shapes=shapes, y_ticks=y_ticks, x_ticks=x_ticks, columns=columns)


def stacked_chart(
    title: str, series: Mapping[str, Mapping[float, float]], *, link: Link | None = None, unit: str = ""
) -> Chart | None:
    """Bars over steps, whose parts stand on each other; None if there is none. `series`: name -> step -> value."""
    top = dict.fromkeys(sorted({step for values in series.values() for step in values}), 0.0)
    if not top:
        return None
    y, y_ticks = _vertical([sum(values.get(step, 0.0) for values in series.values()) for step in top])
    x, x_ticks, width = _horizontal([min(top) - 0.5, max(top) + 0.5])
    shapes, tips = (
        [],
        {step: [f"{name} {number_text(v[step])}" for name, v in series.items() if v.get(step)] for step in top},
    )
    for number, values in enumerate(series.values()):
        for step, value in values.items():
            base, top[step] = y(top[step]), top[step] + value
            bar = {"x": x(step) - 0.43 * width, "width": 0.86 * width, "y": y(top[step]), "height": base - y(top[step])}
            shapes.append({"kind": "bar", "number": number} | bar)
    columns = _columns(tips, x, width, link)
    return Chart(
        title=title, unit=unit, names=list(series), shapes=shapes, y_ticks=y_ticks, x_ticks=x_ticks, columns=columns
    )


def sparkline(values: Sequence[float]) -> str:
    """The points of a line of 96 x 24 pixels, for a cell of a table; "" if there are less than two values."""
    known = [value for value in values if math.isfinite(value)]
    low, span = min(known, default=0.0), (max(known, default=0.0) - min(known, default=0.0)) or 1.0
    points = [(2 + 92 * n / max(1, len(known) - 1), 20 - 16 * (v - low) / span) for n, v in enumerate(known)]
    return _path(points) if len(points) > 1 else ""


def number_text(value: float, digits: int = 3) -> str:
    """A number for a person: a few digits, a small one in scientific notation.
    Example: 0.00000157 -> "1.6e-06"; 0.42083 -> "0.421"; 12345.6 -> "12,346" """
    if not math.isfinite(value):
        return "–"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"


def _vertical(
    values: Sequence[float], *, log: bool = False
) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """The place of a value, and the ticks of the axis."""
    low, high = (min(values), max(values)) if log else (min(0.0, *values), max(0.0, *values))
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        size = max(1, math.ceil((last - first) / 4))
        ticks = [10.0**power for power in range(first, max(last, first + 1) + size, size)]
    else:
        size_of = 10 ** math.floor(math.log10(((high - low) or 1.0) / 3))
        step = next(size_of * factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (factor * size_of) <= 4.5)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        ticks = [n * step for n in range(first, max(last, first + 1) + 1)]
    scale = math.log10 if log else float
    bottom, top = scale(ticks[0]), scale(ticks[-1])

    def y(value: float) -> float:
        share = (scale(max(value, ticks[0]) if log else value) - bottom) / (top - bottom)
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)

    return y, [(y(tick), f"{tick:.0e}" if log else f"{tick:.4g}") for tick in ticks]


def _horizontal(steps: Sequence[float]) -> tuple[Callable[[float], float], list[tuple[float, int]], float]:
    """The place of a step, the ticks of the axis, and the width of a step."""
    low, high = min(steps), max(steps)
    low, high = (low - 0.5, high + 0.5) if low == high else (low, high)
    width = (WIDTH - LEFT - RIGHT) / (high - low)

    def x(step: float) -> float:
        return LEFT + width * (step - low)

    every = next(size for size in STEP_SIZES if size >= (high - low) / 8)
    return x, [(x(n), n) for n in range(math.ceil(low), math.floor(high) + 1) if n % every == 0], width


def _columns(
    tips: Mapping[float, Sequence[str]], x: Callable[[float], float], width: float, link: Link | None
) -> list[tuple[float, float, str, str]]:
    columns = []
    for step, values in sorted(tips.items()):
        size = max(6.0, min(width, 60.0))
        left = min(max(LEFT, x(step) - size / 2), WIDTH - RIGHT - size)
        columns.append((left, size, f"step {step:g}: {', '.join(values)}", link(int(step)) if link is not None else ""))
    return columns


def _thin(line: Line, log: bool) -> Line:
    """A line of at most MAX_POINTS points, without those that a logarithmic axis cannot show."""
    points = [point for point in line.points if point[1] > 0 or not log]
    size = math.ceil(len(points) / MAX_POINTS)
    if size <= 1:
        return Line(name=line.name, points=points, half_widths=() if log else line.half_widths, dots=line.dots)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    means = [(part[-1][0], math.fsum(value for _, value in part) / len(part)) for part in parts]
    return Line(name=line.name, points=means, half_widths=line.half_widths[::size][: len(means)])


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
