"""Makes a model's basis for the rung ``transform``, from texts that its user's conversations are not among.

Each text is cut into windows: a beginning, whose keys and values are looked at, and a continuation, through which the
gradient of the log-likelihood by each of them is computed. The continuation's labels are drawn from the model itself,
so that mean squares of gradients are the Fisher information: half the sum of δᵀ F δ is the divergence that errors δ
cause. Two windows are held back; on them each level's step is searched for, by running the model on decoded keys and
values, so that no text that a benchmark measures has any part in it.

The only module of the ladder that needs torch: gradients. What it makes serves any engine of the same model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import torch
from transformers import DynamicCache

from protocol.errors import ModelUnavailable
from protocol.identity import digest
from services.model_runner.codecs.base import Array, Floats, Plane, from_floats, to_floats
from services.model_runner.codecs.basis import (
    BASIS_VERSION,
    KEYS,
    NEAR,
    SMALL,
    VALUES,
    BasisFile,
    GroupRow,
    LevelRow,
    TableRow,
    read_basis,
    write_basis,
)
from services.model_runner.codecs.exact_rows import SINK_TOKENS
from services.model_runner.codecs.ladder import decode_blocks, encode_blocks
from services.model_runner.codecs.rans import MOST_SYMBOLS, scaled_frequencies
from services.model_runner.codecs.transform import Transform, quantise, turn
from services.model_runner.engine import STORAGE_DTYPES, LayerState, ModelSpec
from services.model_runner.transformers_engine import TransformersEngine

Say = Callable[[str], None]

PREFIX_TOKENS, CONTINUATION_TOKENS = 768, 256
HELD_BACK = 3
"""Windows that steps are searched on; nothing else is made from them."""
GROUP_LAYERS = 10
"""Layers whose axes are found together: more compress better, and cost more to decode, and a larger file. Five made
13.4 of what ten make 14.6 at equal divergence, on four development texts."""
LEVELS = {NEAR: 0.0043, SMALL: 0.015}
"""Mean divergence, in nats a token, that a level may cause on the held-back windows. Chosen on seven development texts
of SmolLM2-135M (bench/snapshot/texts.py), read to 2,048 tokens, where it is half as much again: 0.0057 was 0.0098 there
and 1.2 % of perplexity, 0.017 was 0.026 and 3.5 %."""
_KEYS_PART = 0.6
"""What counts of the Fisher information of keys: the divergence that errors in them cause grows less than the square of
the gradient says. Chosen on the held-back windows."""
_SHRINK = 0.015
"""Share of the mean in each number's Fisher information: a few thousand tokens do not tell a small one."""
_DEAD = 0.3
"""Components whose deviation is below this many steps are dropped."""
_CLASSES_AN_OCTAVE = 4
_STORED = "bfloat16"
_TABLE_TOKENS = 3
"""Of so many tokens one goes into the tables: they count far fewer things than axes do."""
_SEARCHES = 7
"""Halvings of the range that a level's step is in."""


@dataclass(frozen=True)
class _Window:
    """A text's tokens, with what the model keeps of its beginning."""

    tokens: list[int]
    prefix_tokens: int
    planes: list[Plane]
    """Keys as the cache holds them, and values, of the prefix: as bfloat16, which takes half the memory."""
    log_probabilities: torch.Tensor
    """(continuation, vocabulary), after the exact cache."""


@dataclass
class _Sums:
    """Sums of squares of gradients, (width,) of a layer's keys turned back, and of its values."""

    squares: list[tuple[Array, Array]]
    windows: int = 0


def calibrate(
    engine: TransformersEngine,
    texts: Sequence[Sequence[int]],
    *,
    group_layers: int = GROUP_LAYERS,
    prefix_tokens: int = PREFIX_TOKENS,
    continuation_tokens: int = CONTINUATION_TOKENS,
    say: Say = lambda _line: None,
) -> bytes:
    """The basis of ``engine``'s model, as the bytes of a file (``basis.read_basis``); the caller signs it.

    Args:
        texts: token ids; each is cut into windows of prefix and continuation. At least four windows are needed, of as
            many kinds of text as there are; 6,000 tokens make a usable basis, 20,000 a good one.
        group_layers: layers that are looked at together.

    Raises ModelUnavailable when the texts are too short, or the model's keys are turned in a way that depends on the
    conversation's length.
    """
    if any(layer.kind == "recurrent" for layer in engine.spec.layers):
        raise ModelUnavailable(
            f"calibrating {engine.spec.name}: gradients are not taken through its recurrent layers",
            hint="use another rung",
            reason="recurrent layers",
        )
    size = prefix_tokens + continuation_tokens
    cut = [list(text[at : at + size]) for text in texts for at in range(0, len(text) - size + 1, size)]
    if len(cut) < HELD_BACK + 2:
        raise ModelUnavailable(
            f"calibrating {engine.spec.name}: the texts make {len(cut)} windows of {size:,} tokens, and "
            f"{HELD_BACK + 2} are needed",
            hint="give longer texts",
            field="texts",
            reason="too few tokens",
        )
    spec = engine.spec
    angles = rotations(engine)
    # From the middle of the list: the first and the last are often of one kind.
    back = {round((each + 1) * len(cut) / (HELD_BACK + 1)) for each in range(HELD_BACK)}
    sums = _Sums([(np.zeros((0,)), np.zeros((0,)))] * len(spec.layers))
    seen: list[_Window] = []
    held: list[_Window] = []
    for number, tokens in enumerate(cut):
        say(f"reading window {number + 1} of {len(cut)}")
        window, gradients = _read(engine, tokens, prefix_tokens, number)
        if number in back:
            held.append(window)
            continue
        # 50 MB a window of a large vocabulary: only those held back are compared with.
        seen.append(replace(window, log_probabilities=torch.empty(0)))
        _add(sums, gradients, angles, prefix_tokens)
    groups: list[GroupRow] = []
    deviations: list[Floats] = []
    components: list[Floats] = []
    for layers in grouped(spec, group_layers):
        for side in (KEYS, VALUES):
            say(f"axes of the {side} of layers {layers[0]} to {layers[-1]}")
            group, deviation, component = _axes(side, layers, seen, sums, angles)
            groups.append(group)
            deviations.append(deviation)
            components.append(component)
    distinct = sorted({tuple(float(angle) for angle in each) for each in angles})
    file = BasisFile(
        version=BASIS_VERSION,
        model=spec.name,
        digests=spec.digests,
        layers=[(layer.kv_heads, layer.head_dim) for layer in spec.layers],
        rotations=[list(each) for each in distinct],
        layer_rotations=[distinct.index(tuple(float(angle) for angle in each)) for each in angles],
        groups=groups,
        levels=[],
        texts=[digest(np.asarray(tokens, "<u4").tobytes()) for tokens in cut],
        tokens=sum(map(len, cut)),
    )
    largest = max(float(each.max()) for each in deviations)
    low, high = largest / 2**14, largest / 2**2
    levels = []
    for name, target in LEVELS.items():
        say(f"searching the step of the level {name}")
        levels.append(_search(engine, file, name, target, (low, high), deviations, components, held, say))
        # The next one may cost more, so its step is larger.
        low, high = levels[-1].step, levels[-1].step * 2**4
    return write_basis(_trimmed(file, levels))


def grouped(spec: ModelSpec, group_layers: int) -> list[list[int]]:
    """Neighbouring layers of one kind, as evenly as may be, at most ``group_layers`` together."""
    kinds: dict[tuple[str, int, int, int], list[int]] = {}
    for at, layer in enumerate(spec.layers):
        if layer.kv_heads:
            kinds.setdefault((layer.kind, layer.window_tokens, layer.kv_heads, layer.head_dim), []).append(at)
    found = []
    for layers in kinds.values():
        parts = math.ceil(len(layers) / group_layers)
        found += [[int(at) for at in part] for part in np.array_split(np.array(layers), parts)]
    return sorted(found)


def rotations(engine: TransformersEngine) -> list[Array]:
    """Of each layer: the angle that each pair of a key's dimensions is turned by with a position; empty where none is.

    Raises ModelUnavailable where the angles depend on the length.
    """
    decoder: Any = engine._model.get_decoder()
    rotary = getattr(decoder, "rotary_emb", None)
    none = np.zeros(0)
    if rotary is None:
        return [none for _ in engine.spec.layers]
    kinds = getattr(rotary, "rope_type", "default")
    for kind in set(kinds.values()) if isinstance(kinds, dict) else {kinds}:
        if "dynamic" in kind or kind == "longrope":
            raise ModelUnavailable(
                f"calibrating {engine.spec.name}: its keys are turned by angles that depend on the length ({kind})",
                hint="use another rung for this model",
                reason="unsupported rotary embedding",
            )
    found = []
    for at, layer in enumerate(engine.spec.layers):
        kind = getattr(decoder.layers[at].self_attn, "layer_type", None) if isinstance(kinds, dict) else None
        hidden = torch.zeros((1, 1, 1), dtype=torch.float32, device=engine.device)
        position = torch.ones((1, 1), dtype=torch.long, device=engine.device)
        with torch.inference_mode():
            cos, sin = rotary(hidden, position) if kind is None else rotary(hidden, position, kind)
        half = cos.shape[-1] // 2
        turned = np.arctan2(sin[0, 0, :half].double().cpu().numpy(), cos[0, 0, :half].double().cpu().numpy())
        found.append(turned if layer.kv_heads else none)
    return found


# --- what the model does ----------------------------------------------------------------------------------------------


def _read(
    engine: TransformersEngine, tokens: list[int], prefix_tokens: int, number: int
) -> tuple[_Window, list[tuple[Array, Array]]]:
    """A window, and the gradients by each layer's keys and values, as the cache holds them."""
    cache = engine.new_cache(prefix_tokens)
    engine.prefill(cache, tokens[:prefix_tokens])
    leaves = []
    for layer in cache.layers:
        leaves.append([tensor.detach().clone().requires_grad_(True) for tensor in layer.held()])
    planes = [Plane(*(_stored(leaf.detach().float().cpu().numpy()) for leaf in pair)) for pair in leaves]
    cache.close()
    logits = _continue(engine, leaves, tokens[prefix_tokens:], prefix_tokens)
    log_probabilities = torch.log_softmax(logits, -1)
    # Labels drawn by the model itself, the same on every run.
    generator = torch.Generator().manual_seed(number)
    labels = torch.multinomial(log_probabilities.detach().exp().cpu(), 1, generator=generator).to(logits.device)
    loss = -log_probabilities.gather(1, labels).sum()
    # By these alone: the weights' gradients would take as much memory again.
    found = torch.autograd.grad(loss, [leaf for pair in leaves for leaf in pair], allow_unused=True)
    flat = [
        np.zeros(tuple(leaf.shape), np.float32) if own is None else own.float().cpu().numpy()
        for own, leaf in zip(found, (leaf for pair in leaves for leaf in pair), strict=True)
    ]
    gradients = list(zip(flat[0::2], flat[1::2], strict=True))
    return _Window(tokens, prefix_tokens, planes, log_probabilities.detach()), gradients


def _continue(
    engine: TransformersEngine, layers: Sequence[Sequence[torch.Tensor]], tokens: list[int], seen_tokens: int
) -> torch.Tensor:
    """Logits (tokens, vocabulary), float32, after a cache of ``layers``, keys and values of (heads, tokens, size)."""
    cache = DynamicCache(
        ddp_cache_data=[(keys.unsqueeze(0), values.unsqueeze(0)) for keys, values in layers],
        config=engine._model.config,
    )
    for layer in cache.layers:
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = seen_tokens
    model: Any = engine._model
    logits: torch.Tensor = model(torch.tensor([tokens], device=model.device), past_key_values=cache).logits[0]
    return logits.float()


def _add(sums: _Sums, gradients: list[tuple[Array, Array]], angles: Sequence[Array], seen_tokens: int) -> None:
    for at, (keys, values) in enumerate(gradients):
        if not keys.size:
            continue
        # A rotation keeps lengths, so gradients turn as the keys do.
        turned = turn(keys.transpose(1, 0, 2), -_positions(keys, seen_tokens), angles[at])
        own = values.transpose(1, 0, 2)
        sinks = max(0, SINK_TOKENS - (seen_tokens - len(own)))
        turned, own = turned[sinks:], own[sinks:]
        found = tuple(np.square(each.reshape(len(each), -1)).sum(0, dtype=np.float64) for each in (turned, own))
        before = sums.squares[at]
        sums.squares[at] = (found[0], found[1]) if not before[0].size else (before[0] + found[0], before[1] + found[1])
    sums.windows += 1


def _positions(array: Array, seen_tokens: int) -> Array:
    """Of the tokens that a layer's (heads, tokens, size) holds: the last of ``seen_tokens``."""
    return np.arange(seen_tokens - array.shape[1], seen_tokens, dtype=np.float64)


# --- axes and tables --------------------------------------------------------------------------------------------------


def _numbers(side: str, layers: Sequence[int], window: _Window, angles: Sequence[Array]) -> Floats:
    """(tokens, width) of a window's prefix without sinks, keys turned back."""
    found = []
    for at in layers:
        array = window.planes[at].keys if side == KEYS else window.planes[at].values
        own = to_floats(array, _STORED).transpose(1, 0, 2)
        if side == KEYS:
            own = turn(own, -_positions(array, window.prefix_tokens), angles[at])
        sinks = max(0, SINK_TOKENS - (window.prefix_tokens - len(own)))
        found.append(own[sinks:].reshape(len(own) - sinks, -1))
    return np.concatenate(found, axis=1)


def _axes(
    side: str, layers: list[int], windows: Sequence[_Window], sums: _Sums, angles: Sequence[Array]
) -> tuple[GroupRow, Floats, Floats]:
    """A group with all its axes, the largest first; their deviations; and the components of some tokens."""
    numbers = np.concatenate([_numbers(side, layers, window, angles) for window in windows])
    which = 0 if side == KEYS else 1
    rows = len(numbers) // len(windows)
    fisher = np.concatenate([sums.squares[at][which] for at in layers]) / max(1, sums.windows * rows)
    fisher *= _KEYS_PART if side == KEYS else 1.0
    weights = np.sqrt(fisher + _SHRINK * fisher.mean() + 1e-12).astype(np.float32)
    mean = numbers.mean(0).astype(np.float16)
    numbers = (numbers - mean.astype(np.float32)) * weights
    size, axes = np.linalg.eigh(numbers.T @ numbers / len(numbers))
    axes = np.ascontiguousarray(axes[:, ::-1].T)
    scales = np.abs(axes).max(1) / 127
    whole = np.rint(axes / scales[:, None]).astype(np.int8)
    scales = (1 / np.linalg.norm(whole.astype(np.float32), axis=1)).astype(np.float32)
    deviations = np.sqrt(np.maximum(size[::-1], 0)).astype(np.float32)
    row = GroupRow(side, list(layers), len(whole), mean.tobytes(), weights.tobytes(), whole.tobytes(), scales.tobytes())
    return row, deviations, numbers[::_TABLE_TOKENS] @ (whole * scales[:, None]).T


def _level(
    name: str, step: float, sides: Sequence[str], deviations: Sequence[Floats], components: Sequence[Floats]
) -> LevelRow:
    """Classes and tables for one step."""
    octaves = [
        np.where(each > _DEAD * step, np.rint(_CLASSES_AN_OCTAVE * np.log2(np.maximum(each, 1e-30) / step)), -1000)
        for each in deviations
    ]
    keys = sorted({(side, int(at)) for side, each in zip(sides, octaves, strict=True) for at in each if at > -1000})
    classes = [np.zeros(len(each), np.uint8) for each in octaves]
    tables = []
    for number, (side, octave) in enumerate(keys[:254]):
        pooled = []
        for own, each, found, component in zip(sides, octaves, classes, components, strict=True):
            if own == side:
                found[each == octave] = number + 1
                pooled.append(component[:, each == octave].reshape(-1))
        tables.append(_table(np.concatenate(pooled) / np.float32(step), 2 ** (octave / _CLASSES_AN_OCTAVE)))
    return LevelRow(name, step, [each.tobytes() for each in classes], tables, 0.0, 0.0, 0.0)


def _table(numbers: Floats, deviation: float) -> TableRow:
    """Frequencies of a class's rounded numbers, and what each is best replaced by: the mean of what became it."""
    rounded = quantise(numbers)
    reach = int(min((MOST_SYMBOLS - 2) // 2, max(2, math.ceil(6 * deviation))))
    inside = np.abs(rounded) <= reach
    at = rounded[inside] + reach
    counts = np.bincount(at, minlength=2 * reach + 1).astype(np.float64)
    sums = np.bincount(at, weights=numbers[inside], minlength=2 * reach + 1)
    whole = np.arange(-reach, reach + 1)
    # A few made-up sightings at the whole number itself hold rare symbols' means in place, and Laplace's law their
    # frequencies.
    values = (sums + 4 * whole) / (counts + 4)
    prior = np.exp(-math.sqrt(2) * np.abs(whole) / max(deviation, 0.3))
    counts = counts + max(1.0, 0.002 * len(numbers)) * prior / prior.sum()
    escapes = float((~inside).sum()) + 0.01
    frequencies = scaled_frequencies(np.append(counts, escapes))
    return TableRow(reach, frequencies, [round(float(each), 4) for each in values] + [0.0])


def _search(
    engine: TransformersEngine,
    file: BasisFile,
    name: str,
    target: float,
    bounds: tuple[float, float],
    deviations: Sequence[Floats],
    components: Sequence[Floats],
    held: Sequence[_Window],
    say: Say,
) -> LevelRow:
    """The level with the largest step whose divergence on the held-back windows is at most ``target``."""
    sides = [group.side for group in file.groups]
    low, high = bounds
    best = _level(name, low, sides, deviations, components)
    for _ in range(_SEARCHES):
        step = math.sqrt(low * high)
        row = _level(name, step, sides, deviations, components)
        row = _measured(engine, file, row, held)
        say(f"{name}: step {step:.4g}, divergence {row.mean_kl:.4f}, top-1 {row.top1:.3f}, ratio {row.ratio:.1f}")
        if row.mean_kl <= target:
            low, best = step, row
        else:
            high = step
    return best if best.ratio else _measured(engine, file, best, held)


def _measured(engine: TransformersEngine, file: BasisFile, row: LevelRow, held: Sequence[_Window]) -> LevelRow:
    """``row`` with what it does to the held-back windows, whose 16-bit size is the baseline."""
    spec = replace(engine.spec, dtype=_STORED)
    codec = Transform(read_basis(write_basis(_trimmed(file, [row])), spec), row.name)
    divergence, same, count, raw, coded = 0.0, 0, 0, 0, 0
    for window in held:
        states = [
            LayerState(own.kind, spec.dtype, plane.keys, plane.values, window.prefix_tokens)
            for own, plane in zip(spec.layers, window.planes, strict=True)
        ]
        blocks = encode_blocks(codec, spec, states)
        decoded = decode_blocks(codec, spec, blocks, window.prefix_tokens)
        raw += sum(array.nbytes for state in states for array in state.planes)
        coded += sum(map(len, blocks))
        cache = [
            [torch.from_numpy(to_floats(array, spec.dtype)).to(engine.device, engine._model.dtype) for array in each]
            for each in ((state.keys, state.values) for state in decoded)
        ]
        with torch.inference_mode():
            logits = _continue(engine, cache, window.tokens[window.prefix_tokens :], window.prefix_tokens)
            found = torch.log_softmax(logits, -1)
        exact = window.log_probabilities
        divergence += float((exact.exp() * (exact - found)).sum())
        same += int((exact.argmax(-1) == found.argmax(-1)).sum())
        count += len(exact)
    return msgspec.structs.replace(row, mean_kl=divergence / count, top1=same / count, ratio=raw / coded)


def _stored(values: Floats) -> Array:
    found = np.empty(values.shape, STORAGE_DTYPES[_STORED])
    from_floats(np.array(values), _STORED, found)
    return found


def _trimmed(file: BasisFile, levels: list[LevelRow]) -> BasisFile:
    """``file`` with ``levels``, and without axes that none of them uses."""
    groups = []
    used = []
    for at, group in enumerate(file.groups):
        reached = [np.flatnonzero(np.frombuffer(level.classes[at], np.uint8)) for level in levels]
        count = max([1, *(int(each[-1]) + 1 for each in reached if each.size)])
        width = len(group.axes) // group.components
        axes, scales = group.axes[: count * width], group.scales[: 4 * count]
        groups.append(msgspec.structs.replace(group, components=count, axes=axes, scales=scales))
        used.append(count)
    rows = [
        msgspec.structs.replace(level, classes=[each[:count] for each, count in zip(level.classes, used, strict=True)])
        for level in levels
    ]
    return msgspec.structs.replace(file, groups=groups, levels=rows)
