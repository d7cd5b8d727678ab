"""Write the golden snapshots: ``python -m tests.golden.snapshots``.

``tests/golden/snapshots/`` is the snapshot folder of a node (``manifests``, ``chunks``) with the basis of its model
(``bases``) and ``index.json``: the node's private key, and of each snapshot its id and what must come out of it.
Readers in other languages may test themselves against it.

What was once written stays readable for ever, so a snapshot that is there is never changed: ``--grow NAME`` writes
today's beside it, as ``NAME.v2``; ``--rewrite NAME`` (or ``all``) is for what no release has carried yet.

The numbers are made up, by a hash and exact arithmetic, so that every machine makes the same ones; what is done with
them is what the model runner does.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from blake3 import blake3

from edge.snapshot_store import SnapshotStore
from protocol.identity import Identity, digest
from protocol.layout import CodecRef
from protocol.manifest import (
    Certificate,
    ModelDigests,
    NumericsFingerprint,
    SignedManifest,
    SnapshotManifest,
    open_private,
    seal_manifest,
    snapshot_id,
)
from protocol.provenance import Kind, SignedStatement, add_statement
from protocol.sealing import DataKey, wrap_key
from services.model_runner import snapshot
from services.model_runner.blocks import RawPart, cut
from services.model_runner.codecs import RUNGS, basis_digest
from services.model_runner.codecs.base import Codec, from_floats, to_floats
from services.model_runner.codecs.basis import (
    BASIS_VERSION,
    KEYS,
    NEAR,
    SMALL,
    VALUES,
    Basis,
    BasisFile,
    GroupRow,
    LevelRow,
    TableRow,
    read_basis,
    write_basis,
)
from services.model_runner.codecs.rans import scaled_frequencies
from services.model_runner.codecs.rotated4 import rotation
from services.model_runner.codecs.transform import Transform
from services.model_runner.engine import (
    STORAGE_DTYPES,
    Engine,
    KVCache,
    LayerSpec,
    LayerState,
    Logits,
    ModelSpec,
    StateSpec,
)
from services.model_runner.generation import GenerationSettings
from services.model_runner.positions import bitmaps_of, positions_of, prune
from services.model_runner.sampling import Sampler, SamplingSettings
from tests.golden.make import FOLDER as GOLDEN

FOLDER = GOLDEN / "snapshots"
TOMATO = Identity("tomato", bytes(range(32)))
SPROUT = Identity("sprout", bytes(range(1, 33)))
KEY = DataKey(bytes(range(96, 128)))
TIME_US = 1_795_000_000_000_000
CACHED_TOKENS = 270
"""Two blocks, the second of 14 tokens; the sliding layers hold 25 positions of the first and all of the second."""
WINDOW = 40

_FULL = LayerSpec("full", 2, 8)
_SLIDING = LayerSpec("sliding", 1, 12, WINDOW)
_RECURRENT = LayerSpec("recurrent", 0, 0, 0, (StateSpec((3, 8), "float32"), StateSpec((16,), "bfloat16")))


def _spec(name: str, layers: Sequence[LayerSpec], dtype: str = "bfloat16") -> ModelSpec:
    weights, tokenizer, config = (
        blake3(f"{name} {what}".encode()).digest() for what in ("weights", "tokenizer", "config")
    )
    return ModelSpec(
        name, tuple(layers), 64, 2048, frozenset({1}), dtype, "made up", ModelDigests(weights, tokenizer, config)
    )


MIXED = _spec("golden-mixed", [_FULL, _SLIDING, _FULL, _SLIDING])
RECURRENT = _spec("golden-recurrent", [_FULL, _RECURRENT])


def _fingerprint(spec: ModelSpec) -> NumericsFingerprint:
    schedule, mode = "multiples of 256", "deterministic"
    return NumericsFingerprint("transformers", "torch 2", "cpu", "avx2", spec.dtype, 2, schedule, mode)


def _in(spec: ModelSpec, dtype: str) -> ModelSpec:
    return _spec(f"{spec.name}-{dtype}", spec.layers, dtype)


@dataclass(frozen=True)
class Row:
    """One golden snapshot."""

    spec: ModelSpec
    codec: str
    cached_tokens: int = CACHED_TOKENS
    parent: str = ""
    """Name of another one."""
    pruned: bool = False
    label: str = ""
    logits: bool = False
    stable: bool = False
    """Whether its bytes are the same on every machine and with every version of the libraries: what compresses, or
    multiplies matrices, does not promise that."""


ROWS: dict[str, Row] = {
    "raw": Row(MIXED, "raw", label="before the frost", logits=True, stable=True),
    "tokens": Row(MIXED, "tokens", stable=True),
    "recurrent": Row(RECURRENT, "raw", stable=True),
    "lossless": Row(MIXED, "lossless", parent="raw"),
    "lossless-float32": Row(_in(MIXED, "float32"), "lossless", cached_tokens=50),
    "int8": Row(MIXED, "int8", parent="raw"),
    "int8-float16": Row(_in(MIXED, "float16"), "int8", cached_tokens=50),
    "rotated4": Row(MIXED, "rotated4", parent="raw"),
    "pruned": Row(MIXED, "int8", parent="raw", pruned=True),
    "transform": Row(MIXED, "transform", parent="raw"),
}
"""A parent stands before its children."""
TURNED = ("rotated4", "transform")
"""These multiply matrices, whose last bits differ from machine to machine: how close they come is known, no digest."""


# --- numbers ----------------------------------------------------------------------------------------------------------


def _noise(name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Bell-shaped, between -2 and 2, multiples of 1/256: float32 has them exactly."""
    count = int(np.prod(shape))
    bytes_ = np.frombuffer(blake3(name.encode()).digest(length=4 * count), np.uint8).reshape(-1, 4)
    found: npt.NDArray[np.float32] = ((bytes_.astype(np.int32).sum(axis=1) - 510) / 256).astype(np.float32)
    return found.reshape(shape)


def _stored(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    found = np.empty(values.shape, STORAGE_DTYPES[dtype])
    from_floats(values.copy(), dtype, found)
    return found


def layers_of(row: Row) -> list[LayerState]:
    """Its keys, values and states, before they are encoded: channels of several sizes, positions that go together."""
    found = []
    for at, layer in enumerate(row.spec.layers):
        shape = (layer.kv_heads, row.cached_tokens, layer.head_dim)
        channel = np.exp2(np.arange(layer.head_dim, dtype=np.float32) % 5 - 2)
        held = layer.held_tokens(row.cached_tokens)
        sides = []
        for side in (KEYS, VALUES):
            whole = _noise(f"{row.spec.name} {side}", shape) + _noise(f"{row.spec.name} {at} {side}", shape) / 4
            whole += _noise(f"mean {at} {side}", (layer.kv_heads, 1, layer.head_dim))
            sides.append(_stored((whole * channel)[:, row.cached_tokens - held :].astype(np.float32), row.spec.dtype))
        states = tuple(_stored(_noise(f"state {at} {each.shape}", each.shape), each.dtype) for each in layer.states)
        found.append(LayerState(layer.kind, row.spec.dtype, sides[0], sides[1], row.cached_tokens, states))
    if not row.pruned:
        return found
    kept = [at for at in range(row.cached_tokens) if at < 3 or at >= row.cached_tokens - 20 or at % 7 == 3]
    return prune(found, np.array(kept, np.int64))


def kv_digest(layers: Sequence[LayerState]) -> str:
    """BLAKE3 of all arrays as float32, little-endian, C order: of each layer keys, values, states."""
    hasher = blake3()
    for layer in layers:
        for array in layer.planes:
            dtype = "float32" if array.dtype == "<f4" else layer.dtype
            hasher.update(np.ascontiguousarray(to_floats(array, dtype), "<f4").tobytes())
    return hasher.hexdigest()


def errors(decoded: Sequence[LayerState], exact: Sequence[LayerState]) -> dict[str, float]:
    """‖decoded − exact‖ / ‖exact‖ of all keys, and of all values."""
    found = {}
    for side in (KEYS, VALUES):
        one, other = (
            np.concatenate([to_floats(getattr(layer, side), layer.dtype).ravel() for layer in each])
            for each in (decoded, exact)
        )
        found[side] = round(float(np.linalg.norm(one - other) / np.linalg.norm(other)), 4)
    return found


def basis_bytes() -> bytes:
    """The basis of ``MIXED``: the axes of a rotation, nearly all of them kept."""
    angles = [[float(f"{10_000.0 ** (-at / count):.9g}") for at in range(count)] for count in (4, 5)]
    groups, classes = [], {NEAR: [], SMALL: []}  # type: tuple[list[GroupRow], dict[str, list[bytes]]]
    for side in (KEYS, VALUES):
        for kind, layers in (("full", [0, 2]), ("sliding", [1, 3])):
            width = sum(MIXED.layers[at].kv_heads * MIXED.layers[at].head_dim for at in layers)
            axes = np.rint(rotation(width).T * np.float32(127 / np.abs(rotation(width)).max())).astype(np.int8)
            scales = (1 / np.sqrt((axes.astype(np.float64) ** 2).sum(axis=1))).astype("<f4")
            mean = _noise(f"basis {kind} {side}", (width,)) / 4
            weights = np.exp2(np.arange(width) % 3 - 1)
            groups.append(
                GroupRow(
                    side,
                    layers,
                    width,
                    mean.astype("<f2").tobytes(),
                    weights.astype("<f4").tobytes(),
                    axes.tobytes(),
                    scales.tobytes(),
                )
            )
            for level, dropped in ((NEAR, 16), (SMALL, 4)):
                own = [0 if at % dropped == dropped - 1 else 1 + at % 2 for at in range(width)]
                classes[level].append(bytes(own))
    tables = [_table(4), _table(9)]
    levels = [
        LevelRow(level, step, classes[level], tables, 0.01, 0.95, 4.0) for level, step in ((NEAR, 1.0), (SMALL, 3.0))
    ]
    file = BasisFile(
        version=BASIS_VERSION,
        model=MIXED.name,
        digests=MIXED.digests,
        layers=[(layer.kv_heads, layer.head_dim) for layer in MIXED.layers],
        rotations=angles,
        layer_rotations=[0, 1, 0, 1],
        groups=groups,
        levels=levels,
        texts=[blake3(b"none").digest()],
        tokens=0,
    )
    return write_basis(file)


def _table(reach: int) -> TableRow:
    counts = [2.0 ** -(abs(at) / 2) for at in range(-reach, reach + 1)]
    values = [float(at) - (at > 0) / 16 + (at < 0) / 16 for at in range(-reach, reach + 1)]
    return TableRow(reach, scaled_frequencies(np.array([*counts, 0.05])), [*values, 0.0])


# --- snapshots --------------------------------------------------------------------------------------------------------


def codec_of(row: Row, basis: Basis) -> Codec:
    """Its rung; ``raw`` where it has no KV."""
    return Transform(basis, NEAR) if row.codec == Transform.name else RUNGS.get(row.codec, RUNGS["raw"])()


def tokens_of(row: Row) -> list[int]:
    """Its token ids, the pending one last."""
    return [(7 * at + at // 50) % row.spec.vocab_size for at in range(row.cached_tokens + 1)]


class Made(NamedTuple):
    """A snapshot, to be put into a store."""

    signed: SignedManifest
    manifest: SnapshotManifest
    chunks: list[bytes]


def make(name: str, basis: Basis, parents: Mapping[str, str], chain: Sequence[SignedStatement] = ()) -> Made:
    """One of ``ROWS`` as it is written today. ``parents`` are ids, and ``chain`` is the parent's provenance."""
    row = ROWS[name]
    layers = layers_of(row)
    parts = [] if row.codec == "tokens" else cut(row.spec, layers, row.cached_tokens)
    if row.logits:
        place = parts[-1].place._replace(kind="logits")
        parts.append(RawPart(place, _noise("logits", (row.spec.vocab_size,)).astype("<f4").view(np.uint8)))
    codec = codec_of(row, basis)
    copied = snapshot.Copied(
        conversation="garden",
        creator=TOMATO.node,
        spec=row.spec,
        fingerprint=_fingerprint(row.spec),
        key=KEY,
        tokens=tokens_of(row),
        sampler=Sampler(SamplingSettings(temperature=0.5, top_k=40, seed=11), 3).to_state(),
        progress=snapshot._Progress(
            settings=GenerationSettings(max_new_tokens=32),
            new_tokens=3,
            finish_reason="",
            capacity_tokens=512,
            extra={"messages": [{"role": "user", "content": "When do tomatoes go out?"}], "turn_start": 20},
        ),
        parts=parts,
        size_bytes=0,
        parent=bytes.fromhex(parents.get(row.parent, "")),
        kept=bitmaps_of(positions_of(layers), row.cached_tokens),
        label=row.label,
        tokens_only=row.codec == "tokens",
    )
    certificate = None
    if not codec.exact or row.pruned:
        certificate = Certificate(
            128, 0.0125, 0.96875, ["mean_kl", "top1"], encode_ms=12.5, decode_ms=8.0, test_ms=90.0
        )
    chunks: list[bytes] = []
    manifest = snapshot.seal(copied, lambda _, chunk: chunks.append(bytes(chunk)), codec, certificate)
    manifest = msgspec.structs.replace(manifest, created_us=TIME_US)
    signed = seal_manifest(TOMATO, manifest)
    signed.wraps = [
        wrap_key(
            TOMATO,
            KEY,
            reader.node,
            reader.sealing.public_key,
            created_us=TIME_US,
            ephemeral_secret=blake3(f"{name} for {reader.node}".encode()).digest(),
        )
        for reader in (TOMATO, SPROUT)
    ]
    kind: Kind = "created" if not row.parent else "pruned" if row.pruned else "transcoded"
    details = {"from": bytes.fromhex(parents[row.parent]), "codec": row.codec} if row.parent else {}
    signed.provenance = add_statement(TOMATO, chain, digest(signed.manifest), kind, details, time_us=TIME_US)
    return Made(signed, manifest, chunks)


def make_all(basis: Basis) -> dict[str, Made]:
    """All of them, as they are written today."""
    found: dict[str, Made] = {}
    for name, row in ROWS.items():
        chain = found[row.parent].signed.provenance if row.parent else ()
        ids = {each: snapshot_id(made.signed) for each, made in found.items()}
        found[name] = make(name, basis, ids, chain)
    return found


# --- files ------------------------------------------------------------------------------------------------------------


def index() -> dict[str, Any]:
    """``index.json``; of a folder that is empty one without snapshots."""
    path = FOLDER / "index.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return found
    return {
        "node": TOMATO.node,
        "private_key": TOMATO.seed.hex(),
        "fingerprint": TOMATO.fingerprint,
        "data_key": KEY.secret.hex(),
        "bases": {},
        "snapshots": {},
    }


def basis_of(ref: CodecRef, today: bytes = b"") -> Basis | None:
    """The basis that a manifest names, as it was written, or ``today``'s; None where it needs none."""
    named = basis_digest(ref)
    if not named:
        return None
    return read_basis(today if digest(today) == named else (FOLDER / "bases" / named.hex()).read_bytes(), MIXED)


def newest(name: str, known: Mapping[str, Any]) -> str:
    """The name of the last version of one of ``ROWS``; empty where there is none."""
    found = [each for each in known if each == name or each.startswith(f"{name}.v")]
    return max(found, key=lambda each: int(each.partition(".v")[2] or 1), default="")


def _described(name: str, made: Made, found: snapshot.Read) -> dict[str, Any]:
    """Its row of ``index.json``."""
    row = ROWS[name]
    says: dict[str, Any] = {
        "snapshot": snapshot_id(made.signed),
        "codec": row.codec,
        "dtype": row.spec.dtype,
        "tokens": row.cached_tokens + 1,
        "tokens_blake3": digest(np.array(found.tokens, "<u4").tobytes()).hex(),
        "kept_tokens": made.manifest.kept_tokens,
    }
    if found.layers and row.codec not in TURNED:
        says["kv_blake3"] = kv_digest(found.layers)
    if found.layers and not found.exact:
        says["errors"] = errors(found.layers, layers_of(row))
    if found.logits is not None:
        says["logits_blake3"] = digest(found.logits.astype("<f4").tobytes()).hex()
    return says


class Reader(Engine):
    """Says which model it is, and that is all that reading a snapshot asks of an engine: it computes nothing."""

    explicit_positions = True

    def __init__(self, name: str) -> None:
        self.spec = ROWS[name].spec
        self.fingerprint = _fingerprint(self.spec)

    def new_cache(self, capacity_tokens: int) -> KVCache:
        raise NotImplementedError(capacity_tokens)

    def prefill(self, *_given: object, **_named: object) -> int:
        raise NotImplementedError

    def step(self, *_given: object) -> Logits:
        raise NotImplementedError

    def export_layers(self, cache: KVCache) -> list[LayerState]:
        raise NotImplementedError(cache)

    def import_layers(self, layers: Sequence[LayerState], capacity_tokens: int) -> KVCache:
        raise NotImplementedError(layers, capacity_tokens)


def read(name: str, manifest: SnapshotManifest, chunks: Sequence[bytes], basis: Basis | None) -> snapshot.Read:
    """A snapshot's content as the model runner reads it. ``name`` is one of ``ROWS``."""
    return snapshot.read(Reader(name), manifest, open_private(manifest, KEY), KEY, chunks, lossy=True, basis=basis)


def _write(rewritten: set[str], grown: set[str]) -> int:
    """Put what is new into the folder, and what is named."""
    FOLDER.mkdir(exist_ok=True)
    store, known, today = SnapshotStore(FOLDER), index(), basis_bytes()
    made, refused = make_all(read_basis(today, MIXED)), []
    for name, each in made.items():
        last, written = newest(name, known["snapshots"]), name
        same = last and known["snapshots"][last]["snapshot"] == snapshot_id(each.signed)
        if last and name in rewritten:
            written = last
        elif same or (last and not ROWS[name].stable and name not in grown):
            continue
        elif last and name in grown:
            written = f"{name}.v{int(last.partition('.v')[2] or 1) + 1}"
        elif last:
            refused.append(name)
            continue
        store.save(each.signed, each.manifest.chunks, each.chunks)
        basis = basis_of(each.manifest.codec, today)
        if basis is not None:
            (FOLDER / "bases").mkdir(exist_ok=True)
            (FOLDER / "bases" / basis.digest.hex()).write_bytes(today)
        known["snapshots"][written] = _described(name, each, read(name, each.manifest, each.chunks, basis))
        print(f"tests/golden/snapshots: {written} written")
    (FOLDER / "index.json").write_text(json.dumps(known, indent=2) + "\n", "utf-8")
    _sweep(store, {each["snapshot"] for each in known["snapshots"].values()})
    if refused:
        print(
            f"today's bytes differ and were not written: {', '.join(refused)}\n"
            "A field was added: --grow NAME. No release has carried it: --rewrite NAME. Else the code is wrong.",
            file=sys.stderr,
        )
    return 1 if refused else 0


def _sweep(store: SnapshotStore, named: set[str]) -> None:
    """Remove what no snapshot has that the index names, and what a store keeps for its own use."""
    for identifier in set(store.identifiers()) - named:
        store.remove(identifier)
    manifests = [msgspec.msgpack.decode(store.manifest(each).manifest, type=SnapshotManifest) for each in named]
    bases = {each.codec.params["basis"].hex() for each in manifests if "basis" in each.codec.params}
    for path in (FOLDER / "bases").glob("*"):
        if path.name not in bases:
            path.unlink()
    (FOLDER / ".lock").unlink(missing_ok=True)
    shutil.rmtree(FOLDER / "arriving", ignore_errors=True)


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 1 when a snapshot that is there would have to change and was not named."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden.snapshots", description="Write the golden snapshots.")
    parser.add_argument("--grow", metavar="NAME", action="append", default=[], help="Add today's beside the old one.")
    parser.add_argument(
        "--rewrite", metavar="NAME", action="append", default=[], help="Overwrite what was never released; or all."
    )
    options = parser.parse_args(arguments)
    rewritten = set(ROWS) if "all" in options.rewrite else set(options.rewrite)
    return _write(rewritten, set(options.grow))


if __name__ == "__main__":
    sys.exit(main())
