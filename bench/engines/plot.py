"""Tokens a second against context length as an SVG, one line an engine; read well on light and on dark pages."""

from __future__ import annotations

import re
from xml.sax.saxutils import escape

from bench.report import Figures
from protocol.errors import NotFound

_WIDTH, _HEIGHT = 800, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 216, 64, 56
_NAMES = {
    "torch_stock": "transformers, stock",
    "torch": "transformers, ours",
    "onnx_int8": "onnx int8",
    "onnx_int4": "onnx int4",
}
_DASHES = {"torch_stock": "6 4", "onnx_int4": "2 4"}
_STYLE = """
  .page { fill: #ffffff; } .text { fill: #1f2328; } .quiet { fill: #59636e; } .grid { stroke: #d8dee4; }
  .axis { stroke: #8c959f; } text { font: 13px system-ui, sans-serif; } .title { font-size: 16px; font-weight: 600; }
  .torch_stock { color: #6e7781; } .torch { color: #0969da; }
  .onnx_int8 { color: #1a7f37; } .onnx_int4 { color: #bc4c00; }
  .line { fill: none; stroke: currentColor; stroke-width: 2.5; }
  .dot { fill: currentColor; } .label { fill: currentColor; font-weight: 600; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117; } .text { fill: #f0f6fc; } .quiet { fill: #9198a1; } .grid { stroke: #2f3742; }
    .axis { stroke: #656c76; } .torch_stock { color: #9198a1; } .torch { color: #4493f8; }
    .onnx_int8 { color: #3fb950; } .onnx_int4 { color: #f0883e; }
  }
"""


def lines_of(figures: Figures) -> dict[str, list[tuple[int, float]]]:
    """(context, tokens a second) of each engine that was measured, in the order of the legend."""
    found: dict[str, list[tuple[int, float]]] = {}
    for label in _NAMES:
        pattern = re.compile(rf"{label}_decode_(\d+)_tokens_per_s")
        points = [
            (int(match.group(1)), float(value))
            for key, value in figures.items()
            if (match := pattern.fullmatch(key)) and isinstance(value, (int, float))
        ]
        if points:
            found[label] = sorted(points)
    return found


def svg(figures: Figures) -> str:
    """The picture. Raises NotFound when no tokens a second were measured."""
    lines = lines_of(figures)
    if not lines:
        raise NotFound(
            "drawing tokens a second against context length: none were measured",
            hint="measure the part `decode`",
            reason="no figures",
        )
    contexts = sorted({context for points in lines.values() for context, _ in points})
    where = f"{figures.get('model')}, {figures.get('machine')}, {figures.get('threads')} threads"
    step, top = _ticks(max(rate for points in lines.values() for _, rate in points))
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
            f'height="{_HEIGHT}" role="img" aria-label="Decoded tokens a second against context length">'
        ),
        f"<style>{_STYLE}</style>",
        f'<rect class="page" width="{_WIDTH}" height="{_HEIGHT}" rx="6"/>',
        f'<text class="text title" x="{_LEFT}" y="28">Decoding: tokens a second against context length</text>',
        f'<text class="quiet" x="{_LEFT}" y="47">{escape(where)}</text>',
    ]
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    for number in range(round(top / step) + 1):
        y = _y(number * step, top)
        kind = "axis" if number == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{_LEFT}" y1="{y}" x2="{right}" y2="{y}"/>')
        parts.append(f'<text class="quiet" x="{_LEFT - 10}" y="{y + 4}" text-anchor="end">{number * step:g}</text>')
    for at, context in enumerate(contexts):
        x = _x(at, len(contexts))
        parts.append(f'<line class="axis" x1="{x}" y1="{bottom}" x2="{x}" y2="{bottom + 5}"/>')
        parts.append(f'<text class="quiet" x="{x}" y="{bottom + 21}" text-anchor="middle">{context:,}</text>')
    parts.append(
        f'<text class="text" x="{(_LEFT + right) / 2:g}" y="{_HEIGHT - 14}" text-anchor="middle">'
        "tokens in the KV cache</text>"
    )
    for label, points in lines.items():
        places = [(_x(contexts.index(context), len(contexts)), _y(rate, top)) for context, rate in points]
        dash = f' stroke-dasharray="{_DASHES[label]}"' if label in _DASHES else ""
        path = " ".join(f"{x},{y}" for x, y in places)
        dots = "".join(f'<circle class="dot" cx="{x}" cy="{y}" r="3.5"/>' for x, y in places)
        parts.append(f'<g class="{label}"><polyline class="line" points="{path}"{dash}/>{dots}</g>')
    for label, y in _label_places({label: _y(points[-1][1], top) for label, points in lines.items()}).items():
        last = lines[label][-1][1]
        parts.append(
            f'<g class="{label}"><text class="label" x="{right + 12}" y="{y + 4:g}">'
            f"{escape(_NAMES[label])} ({last:.0f})</text></g>"
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _ticks(highest: float) -> tuple[float, float]:
    """A step of 1, 2 or 5 times a power of ten with four to eight of them, and the axis' end."""
    step = 10.0**-3
    factors = (2.0, 2.5, 2.0)
    number = 0
    while highest / step > 7:
        step *= factors[number % 3]
        number += 1
    step = float(f"{step:.6g}")
    return step, step * max(1, -int(-highest // step))


def _x(number: int, count: int) -> float:
    """Contexts stand at even distances: they grow by factors."""
    width = _WIDTH - _RIGHT - _LEFT - 40
    return round(_LEFT + 20 + width * (number / max(1, count - 1)), 1)


def _y(rate: float, top: float) -> float:
    return round(_HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * rate / top, 1)


def _label_places(wanted: dict[str, float]) -> dict[str, float]:
    """Each label beside the end of its line, pushed apart where they would lie on each other."""
    placed: dict[str, float] = {}
    floor = float(_HEIGHT - _BOTTOM)
    for label in sorted(wanted, key=lambda each: -wanted[each]):
        placed[label] = min(wanted[label], floor)
        floor = placed[label] - 18
    return placed
