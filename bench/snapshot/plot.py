"""The picture of size against fidelity, as a PNG: every rung and every pruner that a run's figures have.

Drawn with OpenCV (extra `edge`). ``python -m bench.snapshot.plot FIGURES.json PICTURE.png``.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.report import Figures
from protocol.errors import NotFound

_WIDTH, _HEIGHT = 1100, 720
_LEFT, _RIGHT, _TOP, _BOTTOM = 96, 40, 84, 128
_SCALE = 2
"""Drawn so many times as large and made smaller, for smooth edges."""
_INK, _QUIET, _GRID, _PAGE = (40, 35, 31), (110, 99, 89), (228, 222, 216), (255, 255, 255)
_COLOURS = {"exact": (55, 127, 26), "lossy": (218, 105, 9), "pruned": (0, 76, 188), "both": (160, 60, 130)}
"""Blue, green, red, as OpenCV has them."""
_LEAST_KL = 1e-5


@dataclass(frozen=True)
class Point:
    """A rung or a pruner."""

    name: str
    ratio: float
    """16-bit size over its size."""
    kl: float
    """Mean divergence in nats a token; 0: exact."""
    dppl_pct: float
    top1: float

    @property
    def kind(self) -> str:
        """Which colour it has."""
        if self.name.startswith(("prune", "budget")):
            return "both" if "+" in self.name or self.name.startswith("budget") else "pruned"
        return "exact" if self.kl <= 0 else "lossy"

    @property
    def label(self) -> str:
        """What stands beside it: a budget's name has the ratio that was asked for."""
        share = re.fullmatch(r"prune (\w+) ([\d.]+)\+(.+)", self.name)
        return f"{share[1]} {share[2]} % + {share[3]}" if share else self.name.replace("+", " by ")

    @property
    def pruner(self) -> str:
        """Of ``prune_PRUNER_SHARE``: its name; empty for anything else."""
        match = re.fullmatch(r"prune (.+) [\d.]+", self.name)
        return match.group(1) if match else ""


def points_of(figures: Figures) -> list[Point]:
    """Whatever has a ratio, a divergence, a share of equal likeliest tokens and a difference of perplexity."""
    found = []
    for key in figures:
        match = re.fullmatch("(.+)_ratio", key)
        if match is None:
            continue
        name = match.group(1)
        values = [figures.get(f"{name}_{each}") for each in ("ratio", "kl", "dppl_pct", "top1")]
        if all(isinstance(value, (int, float)) for value in values):
            found.append(Point(name.replace("_", " "), *(float(value) for value in values if value is not None)))
    return sorted(found, key=lambda point: (point.ratio, point.name))


def png(figures: Figures) -> bytes:
    """The picture. Raises NotFound when nothing of the kind was measured."""
    points = points_of(figures)
    if not points:
        raise NotFound(
            "drawing size against fidelity: nothing has both",
            hint="measure the parts `codecs` and `prune`: mindstream bench snapshot --json FILE",
            reason="no figures",
        )
    import cv2
    import numpy as np

    canvas = np.full((_HEIGHT * _SCALE, _WIDTH * _SCALE, 3), _PAGE, np.uint8)
    drawing = _Drawing(cv2, canvas)
    most_ratio = max(16.0, *(point.ratio for point in points)) * 1.6
    kls = [point.kl for point in points if point.kl > 0]
    least, most = math.floor(math.log10(max(_LEAST_KL, min(kls, default=0.001)))), math.ceil(math.log10(max(*kls, 0.1)))

    def x_of(ratio: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * math.log(max(ratio, 0.95) / 0.9) / math.log(most_ratio / 0.9)

    floor = _HEIGHT - _BOTTOM
    band = 56
    """Room for what is exact, whose logarithm is nowhere."""

    def y_of(kl: float) -> float:
        if kl <= 0:
            return floor - band / 2
        share = (math.log10(max(kl, 10**least)) - least) / (most - least)
        return floor - band - (floor - band - _TOP) * share

    _axes(drawing, x_of, y_of, most_ratio, least, most, floor)
    _title(drawing, figures)
    taken: list[tuple[float, float, float, float]] = []
    for point in points:
        x, y = x_of(point.ratio), y_of(point.kl)
        taken.append((x - 7, y - 7, x + 7, y + 7))
    # A pruner is a line, from the most that it keeps to the least; its name stands at its smallest.
    ends = set()
    for pruner in sorted({point.pruner for point in points} - {""}):
        own = [(x_of(point.ratio), y_of(point.kl)) for point in points if point.pruner == pruner]
        for one, other in itertools.pairwise(own):
            drawing.line(*one, *other, _COLOURS["pruned"])
        ends.add(max((point for point in points if point.pruner == pruner), key=lambda point: point.ratio))
    for point in points:
        drawing.dot(x_of(point.ratio), y_of(point.kl), _COLOURS[point.kind])
    named = [point for point in points if point.kind in ("exact", "lossy") or point in ends or _is_best(point, points)]
    for point in named:
        label = point.pruner if point in ends else f"{point.label} {point.ratio:.3g}x"
        if point.kl > 0:
            label += f"  {point.dppl_pct:.2g} %"
        _label(drawing, label, x_of(point.ratio), y_of(point.kl), _COLOURS[point.kind], taken)
    return drawing.encoded(_WIDTH, _HEIGHT)


class _Drawing:
    """Lines, dots and words in points, whatever the scale."""

    def __init__(self, cv2: Any, canvas: Any) -> None:
        self._cv2 = cv2
        self._canvas = canvas

    def line(self, x: float, y: float, to_x: float, to_y: float, colour: tuple[int, int, int], width: int = 1) -> None:
        ends = [(round(a * _SCALE), round(b * _SCALE)) for a, b in ((x, y), (to_x, to_y))]
        self._cv2.line(self._canvas, *ends, colour, width * _SCALE, self._cv2.LINE_AA)

    def dot(self, x: float, y: float, colour: tuple[int, int, int]) -> None:
        centre = round(x * _SCALE), round(y * _SCALE)
        self._cv2.circle(self._canvas, centre, 6 * _SCALE, colour, -1, self._cv2.LINE_AA)

    def text(self, words: str, x: float, y: float, colour: tuple[int, int, int], size: float = 0.5) -> None:
        place = round(x * _SCALE), round(y * _SCALE)
        font = self._cv2.FONT_HERSHEY_SIMPLEX
        self._cv2.putText(self._canvas, words, place, font, size * _SCALE, colour, _SCALE, self._cv2.LINE_AA)

    def width(self, words: str, size: float = 0.5) -> float:
        (width, _), _ = self._cv2.getTextSize(words, self._cv2.FONT_HERSHEY_SIMPLEX, size * _SCALE, _SCALE)
        return float(width) / _SCALE

    def encoded(self, width: int, height: int) -> bytes:
        small = self._cv2.resize(self._canvas, (width, height), interpolation=self._cv2.INTER_AREA)
        return bytes(self._cv2.imencode(".png", small, [self._cv2.IMWRITE_PNG_COMPRESSION, 9])[1].tobytes())


def _axes(drawing: _Drawing, x_of: Any, y_of: Any, most_ratio: float, least: int, most: int, floor: float) -> None:
    for ratio in (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 20, 30, 40, 60, 80, 120, 160, 240):
        if ratio <= most_ratio:
            drawing.line(x_of(ratio), _TOP, x_of(ratio), floor, _GRID)
            drawing.text(f"{ratio:g}", x_of(ratio) - drawing.width(f"{ratio:g}", 0.45) / 2, floor + 18, _QUIET, 0.45)
    for power in range(least, most + 1):
        y = y_of(10.0**power)
        drawing.line(_LEFT, y, _WIDTH - _RIGHT, y, _GRID)
        words = f"{10.0**power:g}"
        drawing.text(words, _LEFT - 10 - drawing.width(words, 0.45), y + 5, _QUIET, 0.45)
    drawing.text("exact", _LEFT - 10 - drawing.width("exact", 0.45), y_of(0) + 5, _QUIET, 0.45)
    drawing.line(_LEFT, floor, _WIDTH - _RIGHT, floor, _QUIET)
    words = "times smaller than keys and values at 16 bits a number"
    drawing.text(words, (_LEFT + _WIDTH - _RIGHT - drawing.width(words)) / 2, floor + 42, _INK)


def _title(drawing: _Drawing, figures: Figures) -> None:
    drawing.text("Size against fidelity: every codec and every pruner", _LEFT, 34, _INK, 0.75)
    drawing.text(
        "upwards: mean divergence from the exact cache's next tokens, nats; beside a name: its mean |dPPL|",
        _LEFT,
        60,
        _QUIET,
        0.45,
    )
    legend = (("exact", "exact"), ("lossy", "codec"), ("pruned", "pruned"), ("both", "pruned and coded"))
    x: float = _LEFT
    for kind, words in legend:
        drawing.dot(x + 6, _HEIGHT - 54, _COLOURS[kind])
        drawing.text(words, x + 18, _HEIGHT - 49, _INK, 0.45)
        x += drawing.width(words, 0.45) + 48
    where = f"{figures.get('model')}, {figures.get('codec_texts_count') or '?'} texts, {figures.get('machine')}"
    drawing.text(where, _LEFT, _HEIGHT - 20, _QUIET, 0.42)


def _label(
    drawing: _Drawing,
    words: str,
    x: float,
    y: float,
    colour: tuple[int, int, int],
    taken: list[tuple[float, float, float, float]],
) -> None:
    """Beside its point, wherever no other label is."""
    width, height = drawing.width(words, 0.45), 13.0
    sides = [(x + 11, y + 5), (x - 11 - width, y + 5)]
    shifts = (0, *itertools.chain.from_iterable((-step, step) for step in range(15, 181, 15)))
    places = [(left, base + shift) for shift in shifts for left, base in sides]
    for left, base in places:
        box = (left, base - height, left + width, base + 3)
        inside = left >= _LEFT - 4 and box[2] <= _WIDTH - 6 and box[1] >= _TOP - 16
        if inside and not any(_overlap(box, other) for other in taken):
            break
    else:
        left, base = places[1] if sides[0][0] + width > _WIDTH - 6 else places[0]
        box = (left, base - height, left + width, base + 3)
    taken.append(box)
    if abs(base - sides[0][1]) > 15:
        drawing.line(x, y, left - 3 if left > x else left + width + 3, base - 4, _GRID)
    drawing.text(words, left, base, colour, 0.45)


def _is_best(point: Point, points: Sequence[Point]) -> bool:
    """Whether none is both smaller and nearer."""
    return not any(other.ratio >= point.ratio and other.kl < point.kl for other in points)


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


if __name__ == "__main__":
    source, target = (Path(each) for each in sys.argv[1:3])
    target.write_bytes(png(json.loads(source.read_bytes())))
