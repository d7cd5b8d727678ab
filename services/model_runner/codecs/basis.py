"""A model's basis: what the rung ``transform`` knows of it beforehand, as a file made by calibration.

The file is one msgpack map (``BasisFile``), fields in the order declared; its BLAKE3 names it in manifests. Nothing of
it depends on a conversation. Whoever passes it on signs it; a reader checks every size against the model first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from protocol.basis_manifest import MAX_BASIS_BYTES
from protocol.errors import SnapshotRefused
from protocol.identity import digest
from protocol.manifest import ModelDigests
from services.model_runner.codecs.base import Array, Bytes, Floats, refused
from services.model_runner.codecs.rans import Table
from services.model_runner.engine import ModelSpec

BASIS_VERSION = 1
KEYS, VALUES = "keys", "values"
NEAR, SMALL = "near", "small"
"""Levels that calibration makes: nearly lossless, and smaller at a difference that shows."""


class GroupRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Principal axes of some layers' keys or values together; ``width`` is the sum of their kv_heads × head_dim."""

    side: str
    """``keys`` or ``values``."""
    layers: list[int]
    components: int
    mean: bytes
    """float16 (width,)."""
    weights: bytes
    """float32 (width,): how much each number matters; components are those of (x − mean) · weights."""
    axes: bytes
    """int8 (components, width)."""
    scales: bytes
    """float32 (components,): what each row of ``axes`` is to be multiplied by, to be of length 1."""


class TableRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of one class of components: their symbols are the numbers −reach to reach, then the escape."""

    reach: int
    frequencies: list[int]
    values: list[float]
    """What a decoder puts for each symbol, in steps."""


class LevelRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How coarsely components are rounded."""

    name: str
    step: float
    classes: list[bytes]
    """Of each group: uint8 (components,): 0 for a component that is dropped, else 1 + the index of its table."""
    tables: list[TableRow]
    mean_kl: float
    """As measured on the texts that calibration held back."""
    top1: float
    ratio: float


class BasisFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    version: int
    model: str
    digests: ModelDigests
    layers: list[tuple[int, int]]
    """kv_heads and head_dim of each."""
    rotations: list[list[float]]
    """Angles that a key is turned by with each position, in radians: dimension i and i + n of n of them."""
    layer_rotations: list[int]
    """Of each layer: the index of its angles."""
    groups: list[GroupRow]
    levels: list[LevelRow]
    texts: list[bytes]
    """BLAKE3 of the texts it was made from."""
    tokens: int


@dataclass(frozen=True)
class Group:
    """A ``GroupRow`` as arrays."""

    side: str
    layers: tuple[int, ...]
    width: int
    mean: Floats
    weights: Floats
    axes: Floats
    """(components, width), rows of about length 1."""


@dataclass(frozen=True)
class Level:
    """A ``LevelRow`` as arrays."""

    row: LevelRow
    classes: tuple[Bytes, ...]
    tables: tuple[Table, ...]


@dataclass(frozen=True)
class Basis:
    """A basis that fits its model. Made by ``read_basis``."""

    file: BasisFile
    digest: bytes
    size_bytes: int
    groups: tuple[Group, ...]
    levels: dict[str, Level]
    angles: tuple[Array, ...]
    """Of each layer, float64; none for one whose keys are not turned."""


def write_basis(file: BasisFile) -> bytes:
    """The file's bytes."""
    return msgspec.msgpack.encode(file)


def read_basis(data: bytes, spec: ModelSpec) -> Basis:
    """The basis in ``data``, once it fits ``spec``'s layers.

    Raises SnapshotRefused, naming the field, when it is damaged, or of a model of another shape or tokenizer.
    """
    file = file_of(data)
    if file.digests.tokenizer != spec.digests.tokenizer:
        raise _refuse("digests.tokenizer", f"it is {file.model}'s, not {spec.name}'s")
    if file.layers != [(layer.kv_heads, layer.head_dim) for layer in spec.layers]:
        raise _refuse("layers", f"they are not those of {spec.name}")
    if len(file.layer_rotations) != len(spec.layers):
        raise _refuse("layer_rotations", f"{len(file.layer_rotations)} for {len(spec.layers)} layers")
    groups = tuple(_group(row, spec) for row in file.groups)
    _check_cover(file, groups, spec)
    levels = {row.name: _level(row, file.groups) for row in file.levels}
    return Basis(file, digest(data), len(data), groups, levels, _angles(file, spec))


def file_of(data: bytes) -> BasisFile:
    """The file in ``data``, not checked against any model. Raises SnapshotRefused."""
    if len(data) > MAX_BASIS_BYTES:
        raise _refuse("size", f"{len(data):,} bytes, limit {MAX_BASIS_BYTES:,}")
    try:
        file = msgspec.msgpack.decode(data, type=BasisFile)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _refuse("file", str(error)) from None
    if file.version != BASIS_VERSION:
        raise _refuse("version", f"{file.version}, this version reads {BASIS_VERSION}")
    return file


def _refuse(field: str, reason: str) -> SnapshotRefused:
    error = refused("transform", f"basis.{field}", reason)
    error.message = error.message.replace("decoding a block", "reading the basis", 1)
    error.hint = "calibrate the model again, or fetch its basis from another node"
    return error


def _group(row: GroupRow, spec: ModelSpec) -> Group:
    if row.side not in (KEYS, VALUES) or not row.layers or not all(0 <= at < len(spec.layers) for at in row.layers):
        raise _refuse("groups", f"{row.side[:20]} of layers {row.layers[:8]}")
    width = sum(spec.layers[at].kv_heads * spec.layers[at].head_dim for at in row.layers)
    count = row.components
    if not 0 < count <= width:
        raise _refuse("groups.components", f"{count} of {width}")
    mean = _numbers("mean", row.mean, "<f2", width)
    weights = _numbers("weights", row.weights, "<f4", width)
    scales = _numbers("scales", row.scales, "<f4", count)
    axes = _numbers("axes", row.axes, "i1", count * width).reshape(count, width)
    if not (weights > 0).all():
        raise _refuse("groups.weights", "one is not above 0")
    return Group(row.side, tuple(row.layers), width, mean, weights, axes * scales[:, None])


def _numbers(field: str, data: bytes, dtype: str, count: int) -> Floats:
    if len(data) != count * np.dtype(dtype).itemsize:
        raise _refuse(f"groups.{field}", f"{len(data):,} bytes for {count:,} numbers")
    found = np.frombuffer(data, dtype).astype(np.float32)
    if not np.isfinite(found).all():
        raise _refuse(f"groups.{field}", "one is no finite number")
    return found


def _check_cover(file: BasisFile, groups: Sequence[Group], spec: ModelSpec) -> None:
    wanted = [at for at, layer in enumerate(spec.layers) if layer.kv_heads]
    for side in (KEYS, VALUES):
        if sorted(at for group in groups if group.side == side for at in group.layers) != wanted:
            raise _refuse("groups", f"they do not hold each layer's {side} once")
    for group in groups:
        # They are handled as one: equally many tokens, heads of one size, turned alike.
        if len({(spec.layers[at], file.layer_rotations[at]) for at in group.layers}) > 1:
            raise _refuse("groups", "layers of several kinds are together")


def _level(row: LevelRow, groups: Sequence[GroupRow]) -> Level:
    if not 0 < row.step < 1e30:
        raise _refuse("levels.step", str(row.step))
    if [len(each) for each in row.classes] != [group.components for group in groups]:
        raise _refuse("levels.classes", "they are not those of the groups")
    classes = tuple(np.frombuffer(each, np.uint8) for each in row.classes)
    if any(each.size and int(each.max()) > len(row.tables) for each in classes):
        raise _refuse("levels.classes", f"beyond {len(row.tables)} tables")
    try:
        tables = tuple(Table.of(table.frequencies, table.values) for table in row.tables)
    except (ValueError, OverflowError) as error:
        raise _refuse("levels.tables", str(error)) from None
    for table, found in zip(row.tables, tables, strict=True):
        if len(found.values) != 2 * table.reach + 2 or not np.isfinite(found.values).all():
            raise _refuse("levels.tables", f"{len(found.values)} symbols for a reach of {table.reach}")
    return Level(row, classes, tables)


def _angles(file: BasisFile, spec: ModelSpec) -> tuple[Array, ...]:
    found = []
    for at, layer in zip(file.layer_rotations, spec.layers, strict=True):
        if not 0 <= at < len(file.rotations) or 2 * len(file.rotations[at]) > layer.head_dim:
            if layer.kv_heads:
                raise _refuse("layer_rotations", "one is not of the model's shape")
            found.append(np.zeros(0))
            continue
        found.append(np.array(file.rotations[at], np.float64))
        if not np.isfinite(found[-1]).all():
            raise _refuse("rotations", "one is no finite number")
    return tuple(found)
