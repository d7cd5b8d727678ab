"""Trial of a learned rung beside ``transform``: does a small autoencoder of keys and values beat principal axes?

``python -m bench.learned_rung [MINUTES]``. One group of layers of the model's basis, keys and values each. The
autoencoder begins as the transform itself (its axes as a linear path past the networks) and adds to encoder and decoder
a network with one hidden layer; both, and the scales of an entropy model, are trained on the calibration's texts for
rate and distortion together, with uniform noise in place of rounding (Ballé et al., arXiv 1611.01704). Distortion is
what ``transform`` rounds in: numbers times their weight, so that an error of one size costs the same everywhere. On
texts held back the bits of both are compared at equal distortion.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.report import Figures, Progress
from edge.models import ensure
from services.model_runner.bases import find_basis
from services.model_runner.chat import ChatFormat
from services.model_runner.codecs.base import Floats, block_layouts, block_planes
from services.model_runner.codecs.basis import NEAR, Basis, Group
from services.model_runner.codecs.exact_rows import SINK_TOKENS
from services.model_runner.codecs.texts import TEXT_TOKENS, calibration_texts
from services.model_runner.codecs.transform import gather
from services.model_runner.engine import Engine
from services.model_runner.transformers_engine import TransformersEngine

HIDDEN, BATCH = 256, 256
HELD_BACK = 3
"""Each so many-th text is for the comparison alone."""
STEPS = (0.7, 1.0, 1.4)
"""Times the step of the level near: a curve of each, to compare at equal distortion."""
SCALES_S = 4.0
"""Seconds of the processor for the entropy model of the transform itself."""


class Learned(nn.Module):
    """The transform, with a network beside each of its two matrices."""

    def __init__(self, axes: torch.Tensor, step: float) -> None:
        super().__init__()
        kept, width = axes.shape
        self.step = step
        # As ``transform`` does: its axes are rounded to 8 bits, so not quite at right angles.
        self.forward_axes = nn.Parameter(2 * axes - axes @ axes.T @ axes)
        self.back_axes = nn.Parameter(axes.clone())
        self.into = nn.Sequential(nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, kept))
        self.out_of = nn.Sequential(nn.Linear(kept, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, width))
        for network in (self.into, self.out_of):
            for parameter in network[2].parameters():
                nn.init.zeros_(parameter)
        self.log_scale = nn.Parameter(torch.zeros(kept))

    def encode(self, numbers: torch.Tensor) -> torch.Tensor:
        """In steps; so everything that is learned has a size near 1."""
        found: torch.Tensor = (numbers / self.step) @ self.forward_axes.T + self.into(numbers / self.step)
        return found

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = (codes @ self.back_axes + self.out_of(codes)) * self.step
        return found

    def bits(self, codes: torch.Tensor) -> torch.Tensor:
        """Of all codes, by a Laplace distribution for each component."""
        scale = self.log_scale.exp().clamp(min=0.02)
        above, below = (_laplace((codes + half) / scale) for half in (0.5, -0.5))
        return -torch.log2((above - below).clamp(min=2**-24)).sum()


def _laplace(at: torch.Tensor) -> torch.Tensor:
    """The cumulative distribution of the Laplace distribution of scale 1."""
    return 0.5 + 0.5 * at.sign() * (1 - torch.exp(-at.abs()))


def numbers_of(engine: Engine, basis: Basis, groups: Sequence[Group], texts: Sequence[list[int]]) -> list[torch.Tensor]:
    """Of each group (tokens, width): its weighted numbers as ``transform`` sees them."""
    found: list[list[Floats]] = [[] for _ in groups]
    for tokens in texts:
        cache = engine.new_cache(len(tokens) + 1)
        engine.prefill(cache, tokens)
        layers = engine.export_layers(cache)
        for layout in block_layouts(engine.spec, len(tokens)):
            first = max(0, SINK_TOKENS - layout.position)
            for group, own in zip(groups, found, strict=True):
                numbers = gather(group, block_planes(layers, layout), layout, basis.angles, first)
                own.append((numbers - group.mean) * group.weights)
        cache.close()
    return [torch.from_numpy(np.concatenate(own)) for own in found]


def trained(model: Learned, numbers: torch.Tensor, slope: float, seconds: float, networks: bool) -> Learned:
    """Minimise distortion + slope × bits; without ``networks``, the entropy model's scales alone."""
    if not networks:
        with torch.no_grad():
            model.log_scale.copy_((model.encode(numbers[::8]).abs().mean(0) + 0.02).log())
    groups: list[dict[str, Any]] = [{"params": [model.log_scale], "lr": 2e-2}]
    if networks:
        # Axes are small numbers that are right already.
        groups += [
            {"params": [model.forward_axes, model.back_axes], "lr": 2e-5},
            {"params": [*model.into.parameters(), *model.out_of.parameters()], "lr": 2e-4},
        ]
    optimiser = torch.optim.Adam(groups)
    generator = torch.Generator().manual_seed(1)
    end_s = time.process_time() + seconds
    while time.process_time() < end_s:
        rows = torch.randint(len(numbers), (BATCH,), generator=generator)
        part = numbers[rows]
        codes = model.encode(part)
        noisy = codes + torch.rand(codes.shape, generator=generator) - 0.5
        loss = (model.decode(noisy) - part).square().sum() / model.step**2 + slope * model.bits(noisy)
        optimiser.zero_grad()
        (loss / BATCH).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return model


@torch.inference_mode()
def measured(model: Learned, numbers: torch.Tensor) -> tuple[float, float]:
    """Bits a number, and the mean square of the error over that of the numbers."""
    codes = model.encode(numbers).round()
    error = (model.decode(codes) - numbers).square().sum() / numbers.square().sum()
    return float(model.bits(codes)) / numbers.numel(), float(error)


def bits_at(points: Sequence[tuple[float, float]], error: float) -> float:
    """Bits at which a curve has that error, between or beyond its points."""
    ordered = sorted(points, key=lambda point: point[1])
    slope, start = np.polyfit([math.log(each[1]) for each in ordered], [each[0] for each in ordered], 1)
    return float(slope * math.log(error) + start)


def run(minutes: float, progress: Progress = print) -> Figures:
    """Bits of both at the transform's own distortion, for keys and for values."""
    folder = ensure("smollm2-135m-instruct", on_progress=progress, folders=[]).folder
    engine = TransformersEngine.load(folder, dtype="float32", device="cpu")
    basis = find_basis(engine.spec)
    if basis is None:
        raise SystemExit("there is no basis: mindstream snapshot calibrate")
    chat = ChatFormat.load(folder)
    texts = [chat.encode(text, special=False)[:TEXT_TOKENS] for text in calibration_texts()]
    held = [text for at, text in enumerate(texts) if at % HELD_BACK == 1]
    rest = [text for at, text in enumerate(texts) if at % HELD_BACK != 1]
    middle = len(basis.groups) // 4 * 2
    groups = basis.groups[middle : middle + 2]
    train, test = (numbers_of(engine, basis, groups, part) for part in (rest, held))
    return {"learned_minutes": minutes} | compared(basis, middle, train, test, minutes, progress)


def compared(
    basis: Basis,
    first: int,
    train: Sequence[torch.Tensor],
    test: Sequence[torch.Tensor],
    minutes: float,
    progress: Progress,
) -> Figures:
    """Of the basis' groups from ``first`` on, whose numbers these are."""
    level = basis.levels[NEAR]
    figures: Figures = {}
    for at, (own, held) in enumerate(zip(train, test, strict=True), first):
        group = basis.groups[at]
        kept = torch.from_numpy(group.axes[np.flatnonzero(level.classes[at])].copy())
        progress(f"{group.side} of layers {group.layers[0]} to {group.layers[-1]}: {len(kept)} of {group.width} axes")
        curves: dict[str, list[tuple[float, float]]] = {"transform": [], "learned": []}
        for times in STEPS:
            model = trained(Learned(kept, level.row.step * times), own, 0.0, SCALES_S, False)
            curves["transform"].append(measured(model, held))
            # At the transform's own optimum a bit more makes an error's square of 1/12 a quarter: that is its slope.
            trained(model, own, math.log(2) / 6, minutes * 60 / len(STEPS) / len(train), True)
            curves["learned"].append(measured(model, held))
            for name, points in curves.items():
                bits, error = points[-1]
                progress(f"  {name}, step times {times}: {bits:.4f} bits a number, error {error:.5f}")
        error = curves["transform"][1][1]
        for name, points in curves.items():
            figures[f"{name}_{group.side}_bits"] = round(bits_at(points, error), 4)
    return figures


if __name__ == "__main__":
    for key, value in run(float(sys.argv[1]) if len(sys.argv) > 1 else 6.0).items():
        print(f"{key} {value}")
