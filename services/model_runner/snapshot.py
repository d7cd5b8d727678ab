"""Snapshots: a generation state to a manifest and sealed chunks, and back, bit for bit.

Positions are cut into blocks (``blocks``), each encoded and sealed by itself. Nothing is pickled; sizes are checked
against the model, and against each other, before anything is allocated from them.

The token ids are always in the manifest, so a node whose numerics differ reads them again instead of using the KV.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from edge.spread import spread
from protocol.errors import InvalidPrompt, ModelError, SnapshotRefused
from protocol.layout import (
    BLOCK_TOKENS,
    PART_SLACK_BYTES,
    RAW,
    TOKENS,
    CodecRef,
    LayerLayout,
    Part,
    PartPlace,
    plain_bytes,
)
from protocol.manifest import (
    MANIFEST_VERSION,
    Certificate,
    ModelDigests,
    NumericsFingerprint,
    PrivatePart,
    SnapshotManifest,
    open_private,
    prefix_addresses,
    seal_private,
)
from protocol.sealing import DataKey
from protocol.variants import Variant
from services.model_runner.blocks import (
    KINDS,
    Assembly,
    Put,
    RawPart,
    blocks_of,
    cut,
    encode_part,
    seal_part,
    state_layouts,
)
from services.model_runner.codecs import codec as find_codec
from services.model_runner.codecs.base import Codec, block_layouts
from services.model_runner.codecs.basis import Basis
from services.model_runner.codecs.raw import Raw
from services.model_runner.engine import (
    NO_POSITIONS,
    STORAGE_DTYPES,
    Engine,
    KVCache,
    LayerState,
    ModelSpec,
    OnProgress,
    ShouldStop,
    check_layers,
)
from services.model_runner.generation import GenerationSettings, GenerationState
from services.model_runner.intake import Intake
from services.model_runner.positions import bitmaps_of, from_bitmaps, positions_of
from services.model_runner.sampling import Sampler
from services.model_runner.variants import Permit, take_in

Chunk = bytes | bytearray | memoryview
How = Literal["exact", "lossy", "variant", "recomputed"]


class Packed(NamedTuple):
    """A snapshot before it is signed."""

    manifest: SnapshotManifest
    chunks: list[bytearray]
    """Sealed, in the order of ``manifest.chunks``."""


class Unpacked(NamedTuple):
    """A resumed state."""

    state: GenerationState
    how: How
    """``exact``: the KV was restored bit for bit, and the next token is the one that would have come.
    ``lossy``: the KV is that of a codec which is not exact; the manifest's certificate says how close it is.
    ``variant``: it is another variant's of the model, under a certificate of the pair (variants.py).
    ``recomputed``: the tokens are to be read again by the next ``generate``, here, with this node's numerics."""
    reason: str
    """Why it was recomputed, or whose KV is used and how close it is; empty when its own KV was used."""
    logits: npt.NDArray[np.float32] | None = None
    """What the first step must give, where the snapshot says it."""


class _Progress(msgspec.Struct, forbid_unknown_fields=True):
    """What of the generation state has no field of its own in the manifest."""

    settings: GenerationSettings
    new_tokens: int
    finish_reason: str
    capacity_tokens: int
    extra: dict[str, Any]
    constrained_tokens: int = 0


class Copied(NamedTuple):
    """A generation state taken out of the engine: it may go on at once, and this can be sealed on any thread."""

    conversation: str
    creator: str
    spec: ModelSpec
    fingerprint: NumericsFingerprint
    key: DataKey
    tokens: list[int]
    sampler: dict[str, Any]
    progress: _Progress
    parts: list[RawPart]
    """Let go one by one while they are sealed."""
    size_bytes: int
    """Of all parts together."""
    parent: bytes = b""
    kept: Sequence[bytes] = ()
    """``Block.kept`` of every block of a pruned state; empty when all positions are held."""
    label: str = ""
    automatic: bool = False
    tokens_only: bool = False
    """Its KV was not copied: the snapshot is of its token ids."""
    sealed_before: Mapping[PartPlace, Part] = {}
    """Parts that were not copied again."""


class Sealed(NamedTuple):
    """Parts that stand in an earlier snapshot of one cache. A cache is only ever appended to, so its whole blocks of
    full layers are the same in every later one."""

    cache: KVCache
    key_id: bytes
    codec: CodecRef
    parts: Mapping[PartPlace, Part]

    def of(self, cache: KVCache, key: DataKey, codec: CodecRef) -> Mapping[PartPlace, Part]:
        """Those that a snapshot of ``cache`` may take over; none when it is another cache, key or codec."""
        same = self.cache is cache and self.key_id == key.id and self.codec == codec
        return self.parts if same else {}

    @classmethod
    def after(cls, cache: KVCache, manifest: SnapshotManifest) -> Sealed:
        """What ``manifest`` has of ``cache``."""
        whole = {
            place: part
            for place, part in manifest.parts()
            if place.kind == "full" and manifest.blocks[place.block].tokens == BLOCK_TOKENS
        }
        return cls(cache, manifest.key_id, manifest.codec, whole)


def copy(
    engine: Engine,
    state: GenerationState,
    *,
    conversation: str,
    creator: str,
    key: DataKey,
    extra: dict[str, Any] | None = None,
    logits: npt.NDArray[np.float32] | None = None,
    parent: bytes = b"",
    label: str = "",
    automatic: bool = False,
    tokens_only: bool = False,
    sealed_before: Mapping[PartPlace, Part] | None = None,
) -> Copied:
    """Copy ``state``; the worker's part of ``pack``, which see.

    Args:
        parent, label, automatic: as in the manifest.
        tokens_only: its KV is not wanted.
        sealed_before: of ``Sealed.of``: these parts are not copied.
    """
    if not state.prefilled and not tokens_only:
        raise ModelError(
            f"saving {conversation}: {state.cache.length:,} of its {len(state.tokens) - 1:,} positions have been read",
            hint="let the prompt be read first: save after its first token, or cancel the run between two tokens",
            reason="prefill not finished",
        )
    cached = len(state.tokens) - 1
    layers = [] if tokens_only else engine.export_layers(state.cache)
    before = sealed_before or {}
    parts = [] if tokens_only else cut(engine.spec, layers, cached, before)
    if logits is not None and not tokens_only:
        plane = np.ascontiguousarray(logits, dtype="<f4").view(np.uint8)
        parts.append(RawPart(PartPlace("logits", -(-cached // BLOCK_TOKENS) - 1), plane))
    progress = _Progress(
        settings=state.settings,
        new_tokens=state.new_tokens,
        finish_reason=state.finish_reason,
        capacity_tokens=state.cache.capacity_tokens,
        extra=extra or {},
        constrained_tokens=state.constrained_tokens,
    )
    return Copied(
        conversation,
        creator,
        engine.spec,
        engine.fingerprint,
        key,
        list(state.tokens),
        state.sampler.to_state(),
        progress,
        parts,
        sum(part.raw.nbytes for part in parts),
        parent,
        bitmaps_of(positions_of(layers), cached) if layers else (),
        label,
        automatic,
        tokens_only,
        before,
    )


def with_layers(copied: Copied, layers: Sequence[LayerState]) -> Copied:
    """The same state with a cache that was pruned (``positions.prune``) in place of its own."""
    cached = len(copied.tokens) - 1
    logits = [part for part in copied.parts if part.place.kind == "logits"]
    parts = [*cut(copied.spec, layers, cached), *logits]
    size = sum(part.raw.nbytes for part in parts)
    return copied._replace(
        parts=parts, size_bytes=size, kept=bitmaps_of(positions_of(layers), cached), sealed_before={}
    )


def layers_of(copied: Copied) -> list[LayerState]:
    """A copied cache as whole layers, copied once more: for the self-test of a codec (``codecs.ladder.choose``), before
    it is sealed."""
    assembly = Assembly(copied.spec, len(copied.tokens) - 1, copied.kept)
    for part in copied.parts:
        if part.place.kind != "logits":
            assembly.decode(part.place, part.raw.data, Raw())
    return assembly.layers()


def seal(
    copied: Copied,
    put: Put,
    codec: Codec | None = None,
    certificate: Certificate | None = None,
    encoded: Mapping[PartPlace, memoryview] | None = None,
) -> SnapshotManifest:
    """Encode and seal a copied state: every chunk is handed to ``put`` as it is made, and its part let go. Once only.

    ``codec`` is ``raw`` when none is given; ``certificate`` says how faithful one is that is not exact, or a state that
    was pruned; ``encoded`` is what it made of the parts, where that has been done before. Parts ``sealed_before`` must
    be of the same codec.
    """
    codec = codec or Raw()
    ref = TOKENS if copied.tokens_only else codec.ref
    spec, key = copied.spec, copied.key
    cached = len(copied.tokens) - 1
    tokens = np.asarray(copied.tokens, dtype="<u4").tobytes()
    addresses = prefix_addresses(spec.digests, tokens, cached, copied.kept)
    blocks = block_layouts(spec, cached, copied.kept)
    if copied.kept and certificate is None:
        certificate = Certificate(0, None, None, [])
    parts: list[tuple[PartPlace, Part]] = list(copied.sealed_before.items())
    copied.parts.reverse()
    while copied.parts:
        part = copied.parts.pop()
        data = encode_part(codec, spec, part, blocks) if encoded is None else encoded[part.place]
        parts.append((part.place, seal_part(key, part.place, data, addresses, ref, put)))
    whole = {place.kind: part for place, part in parts}
    private = PrivatePart(
        addresses=b"".join(addresses), sampler=copied.sampler, state=msgspec.to_builtins(copied.progress), tokens=tokens
    )
    return SnapshotManifest(
        version=MANIFEST_VERSION,
        model=spec.name,
        digests=spec.digests,
        creator=copied.creator,
        created_us=time.time_ns() // 1000,
        conversation=copied.conversation,
        fingerprint=copied.fingerprint,
        kv_dtype=spec.dtype,
        layers=_layouts(spec, cached, copied.kept),
        states=state_layouts(spec),
        codec=ref,
        cached_tokens=cached,
        blocks=blocks_of(cached, parts, copied.kept),
        recurrent=whole.get("recurrent"),
        logits=whole.get("logits"),
        key_id=key.id,
        sealed=seal_private(key, private),
        total_bytes=sum(chunk.size_bytes for _, part in parts for chunk in part.chunks()),
        parent=copied.parent,
        certificate=certificate,
        label=copied.label,
        automatic=copied.automatic,
    )


def pack(
    engine: Engine,
    state: GenerationState,
    *,
    conversation: str,
    creator: str,
    key: DataKey,
    extra: dict[str, Any] | None = None,
    logits: npt.NDArray[np.float32] | None = None,
    codec: Codec | None = None,
) -> Packed:
    """Copy ``state`` into sealed chunks and describe it; the state may go on at once.

    Args:
        conversation: its name.
        creator: the node whose key will sign.
        key: that it is sealed with; blocks are shared by the snapshots of one key.
        extra: what the caller keeps with the state (its messages), plain msgpack types; given back by ``extra_of``.
        logits: what reading the pending token gives, float32 of shape (vocab_size,), to be kept with it.
        codec: that its blocks are encoded with; ``raw`` when none is given.

    Raises ModelError while the prompt has not been read to its end.
    """
    copied = copy(engine, state, conversation=conversation, creator=creator, key=key, extra=extra, logits=logits)
    chunks: list[bytearray] = []
    return Packed(seal(copied, lambda _, chunk: chunks.append(chunk), codec), chunks)


def refusal(engine: Engine, manifest: SnapshotManifest, private: PrivatePart) -> SnapshotRefused | None:
    """Why ``engine`` cannot resume this conversation at all, or None. Asked before any chunk is fetched."""
    spec = engine.spec
    if manifest.digests.tokenizer != spec.digests.tokenizer:
        return refused(
            manifest,
            "digests.tokenizer",
            f"its token ids are of {manifest.model}, another tokenizer than {spec.name}'s",
        )
    try:
        _read_state(engine, manifest, private)
    except SnapshotRefused as error:
        return error
    return None


def other_numerics(engine: Engine, manifest: SnapshotManifest) -> str:
    """What of the weights, configuration or numerics is another one here; empty when all is the same."""
    own: ModelDigests | NumericsFingerprint
    theirs: ModelDigests | NumericsFingerprint
    for own, theirs in ((engine.spec.digests, manifest.digests), (engine.fingerprint, manifest.fingerprint)):
        for name in own.__struct_fields__:
            here, there = getattr(own, name), getattr(theirs, name)
            if here != there:
                return f"other {name}: {_brief(there)} there, {_brief(here)} here"
    return ""


def why_not_exact(
    engine: Engine,
    manifest: SnapshotManifest,
    *,
    lossy: bool = False,
    basis: Basis | None = None,
    variant: Permit | None = None,
) -> str:
    """Why the KV of a snapshot must not be used here, so that its tokens are read again; empty when it may be.

    Bit-equality is promised between equal weights, configurations and fingerprints alone.

    Args:
        lossy: whether one will do that was pruned, or a codec that is not exact; how close it is its certificate says.
        basis: of the model that computed it, for a codec that needs one.
        variant: permits KV of the variant that it names, whatever else differs (``variants.permit``).
    """
    permitted = variant is not None and variant.variant == Variant.of(manifest.digests, manifest.fingerprint)
    if not permitted and (reason := other_numerics(engine, manifest)):
        return reason
    if manifest.codec.name == TOKENS.name:
        return "it holds token ids alone"
    try:
        exact = find_codec(manifest.codec, basis).exact
    except SnapshotRefused as error:
        return f"codec {manifest.codec.name[:80]!r} of version {manifest.codec.version}: {error.reason}"
    if manifest.kept and not (lossy and engine.explicit_positions):
        return "it was pruned, so it is not exact" if engine.explicit_positions else NO_POSITIONS
    if manifest.kept and variant is not None and (variant.computed_layers or variant.recent_tokens):
        return "it was pruned: nothing can be computed again beside fewer positions"
    if lossy or (exact and manifest.certificate is None):
        return ""
    return f"codec {manifest.codec.name} is not exact" if not exact else "it was made of KV that was not exact"


class Read(NamedTuple):
    """A snapshot's content, decrypted and checked: the engine has still to take it in."""

    tokens: list[int]
    sampler: Sampler
    progress: _Progress
    layers: list[LayerState]
    """Empty when the tokens are to be read again."""
    logits: npt.NDArray[np.float32] | None
    reason: str
    """Why the tokens are to be read again; empty when the layers are used."""
    exact: bool = True
    """Whether the layers are so bit for bit."""
    variant: Permit | None = None
    """By which the layers are used, where another variant of the model computed them."""
    cache: KVCache | None = None
    """That the layers are views of, where they were decoded into it."""


def read(
    engine: Engine,
    manifest: SnapshotManifest,
    private: PrivatePart,
    key: DataKey,
    chunks: Sequence[Chunk],
    *,
    from_tokens: str = "",
    lossy: bool = False,
    basis: Basis | None = None,
    variant: Permit | None = None,
) -> Read:
    """Decrypt what ``seal`` sealed; on any thread, the engine is only asked what it is.

    ``chunks`` must have been verified against the manifest's digests (``protocol.manifest.verify_chunk``). They may
    be left out (an empty sequence) when ``why_not_exact`` gave a reason, or ``from_tokens`` gives one. Nothing is
    allocated before the layouts match the model and the sizes match the layouts. ``lossy``, ``basis`` and ``variant``
    are ``why_not_exact``'s.

    Raises SnapshotRefused, naming the field.
    """
    error = refusal(engine, manifest, private)
    if error is not None:
        raise error
    reason = from_tokens or why_not_exact(engine, manifest, lossy=lossy, basis=basis, variant=variant)
    if reason:
        return read_tokens(engine, manifest, private, reason)
    _read_state(engine, manifest, private)
    if [len(chunk) for chunk in chunks] != [ref.size_bytes for ref in manifest.chunks]:
        raise refused(
            manifest, "chunks", f"{len(chunks)} given, or of other sizes than the manifest's {len(manifest.chunks)}"
        )
    taken = intake(engine, manifest, private, key, basis, variant)
    spread(lambda index: taken.put(index, chunks[index]), range(len(chunks)))
    return read_taken(engine, manifest, private, taken, variant)


def read_tokens(engine: Engine, manifest: SnapshotManifest, private: PrivatePart, reason: str) -> Read:
    """A state whose tokens are to be read again, because of ``reason``. Raises SnapshotRefused."""
    return Read(*_read_state(engine, manifest, private), [], None, reason)


def read_taken(
    engine: Engine,
    manifest: SnapshotManifest,
    private: PrivatePart,
    taken: Intake,
    variant: Permit | None = None,
    cache: KVCache | None = None,
) -> Read:
    """The state whose chunks ``taken`` has taken in, all of them. Raises SnapshotRefused.

    ``cache`` is the one whose layers it wrote them into, if it did (``Engine.open_cache``).
    """
    layers = taken.layers()
    check_layers(_spec_there(engine, manifest, variant), layers)
    # Another variant's logits are no check of the first step here.
    logits = taken.logits if variant is None else None
    exact = taken.codec.exact and manifest.certificate is None and not manifest.kept
    return Read(*_read_state(engine, manifest, private), layers, logits, "", exact, variant, cache)


def _spec_there(engine: Engine, manifest: SnapshotManifest, variant: Permit | None) -> ModelSpec:
    """The engine's model, its KV in the dtype of a permitted variant's."""
    if variant is None or manifest.kv_dtype not in STORAGE_DTYPES:
        return engine.spec
    return replace(engine.spec, dtype=manifest.kv_dtype)


def capacity_of(engine: Engine, manifest: SnapshotManifest, private: PrivatePart) -> int:
    """Positions that the cache of a resumed state may ever hold. Raises SnapshotRefused."""
    return min(_progress(manifest, private).capacity_tokens, engine.spec.context_tokens)


def restore(engine: Engine, found: Read) -> Unpacked:
    """The state that was read, in a cache of its own; the worker's part of ``unpack``. Raises as ``import_layers``."""
    progress = found.progress
    capacity = min(progress.capacity_tokens, engine.spec.context_tokens)
    if found.cache is not None:
        cache = found.cache
        cache.written()
    elif found.reason:
        cache = engine.new_cache(capacity)
    elif found.variant is not None:
        variant = found.variant
        cache = take_in(
            engine, found.layers, found.tokens[:-1], capacity, variant.computed_layers, variant.recent_tokens
        )
    else:
        cache = engine.import_layers(found.layers, capacity)
    state = GenerationState(
        tokens=found.tokens,
        cache=cache,
        sampler=found.sampler,
        settings=progress.settings,
        new_tokens=progress.new_tokens,
        finish_reason=progress.finish_reason,
        constrained_tokens=progress.constrained_tokens,
    )
    if found.variant is not None and not found.reason:
        return Unpacked(state, "variant", found.variant.reason, found.logits)
    how: How = "recomputed" if found.reason else "exact" if found.exact else "lossy"
    return Unpacked(state, how, found.reason, found.logits)


def unpack(engine: Engine, manifest: SnapshotManifest, key: DataKey, chunks: Sequence[Chunk]) -> Unpacked:
    """The state that ``pack`` described: ``read``, which see, and ``restore``. Raises SnapshotRefused."""
    return restore(engine, read(engine, manifest, open_private(manifest, key), key, chunks))


def recompute(
    engine: Engine,
    state: GenerationState,
    should_stop: ShouldStop | None = None,
    on_progress: OnProgress | None = None,
) -> int:
    """Read the tokens of a ``recomputed`` state now, so that it can be saved again. Returns how many were read."""
    missing = state.tokens[state.cache.length : -1]
    return engine.prefill(state.cache, missing, should_stop, on_progress) if missing else 0


def extra_of(manifest: SnapshotManifest, private: PrivatePart) -> dict[str, Any]:
    """What the caller of ``pack`` kept with the state. Raises SnapshotRefused when it is damaged."""
    return _progress(manifest, private).extra


def _read_state(
    engine: Engine, manifest: SnapshotManifest, private: PrivatePart
) -> tuple[list[int], Sampler, _Progress]:
    """Everything but the KV, checked against the model."""
    spec = engine.spec
    if manifest.cached_tokens < 0 or len(private.tokens) != 4 * (manifest.cached_tokens + 1):
        raise refused(manifest, "tokens", "their number does not match cached_tokens")
    tokens: list[int] = np.frombuffer(private.tokens, dtype="<u4").tolist()
    progress = _progress(manifest, private)
    if not max(1, manifest.cached_tokens) <= min(progress.capacity_tokens, spec.context_tokens):
        raise refused(
            manifest,
            "cached_tokens",
            f"{manifest.cached_tokens:,} positions, its capacity is {progress.capacity_tokens:,} and the model's "
            f"context {spec.context_tokens:,}",
        )
    for name in ("new_tokens", "constrained_tokens"):
        count = getattr(progress, name)
        if not 0 <= count <= len(tokens):
            raise refused(manifest, f"state.{name}", f"{count} of {len(tokens)} tokens")
    if max(tokens) >= spec.vocab_size:
        raise refused(manifest, "tokens", f"token {max(tokens)} is not in the vocabulary of {spec.vocab_size:,}")
    return tokens, Sampler.from_state(private.sampler), progress


def _progress(manifest: SnapshotManifest, private: PrivatePart) -> _Progress:
    try:
        return msgspec.convert(private.state, _Progress)
    except (msgspec.ValidationError, InvalidPrompt) as error:
        raise refused(manifest, "state", str(error)) from error


def intake(
    engine: Engine,
    manifest: SnapshotManifest,
    private: PrivatePart,
    key: DataKey,
    basis: Basis | None = None,
    variant: Permit | None = None,
    layers: list[LayerState] | None = None,
) -> Intake:
    """What takes in the chunks of a snapshot that ``why_not_exact`` has nothing against, one by one, as they come.

    They are decoded into ``layers`` where these are given (``Engine.open_cache``).

    The layouts match the model, and the sizes the layouts, before anything is allocated. Raises SnapshotRefused.
    """
    spec = _spec_there(engine, manifest, variant)
    layouts = _layouts(spec, manifest.cached_tokens, manifest.kept)
    if manifest.kv_dtype != spec.dtype:
        raise refused(manifest, "kv_dtype", f"{manifest.kv_dtype}, the model runs in {spec.dtype}")
    if manifest.layers != layouts:
        raise refused(
            manifest, "layers", f"they are not those of {spec.name} after {manifest.cached_tokens:,} positions"
        )
    if manifest.states != state_layouts(spec):
        raise refused(manifest, "states", f"they are not those of {spec.name}")
    for place, part in manifest.parts():
        expected = 4 * spec.vocab_size if place.kind == "logits" else plain_bytes(manifest, place)
        # What another codec than `raw` makes of a block says in itself whether it is whole.
        coded = manifest.codec.name != RAW.name and place.kind in KINDS
        if part.encoded_bytes > expected + PART_SLACK_BYTES if coded else part.encoded_bytes != expected:
            field = f"blocks[{place.block}].{place.kind}"
            raise refused(manifest, field, f"{part.encoded_bytes:,} bytes, its layers take {expected:,}")
    return Intake(
        manifest,
        private.address_list(),
        key,
        find_codec(manifest.codec, basis),
        Assembly(spec, manifest.cached_tokens, manifest.kept, layers=layers),
        lambda field, reason: refused(manifest, field, reason),
    )


def _layouts(spec: ModelSpec, seen_tokens: int, kept: Sequence[bytes]) -> list[LayerLayout]:
    """The layers of ``spec`` after ``seen_tokens`` positions, of which blocks have ``kept`` those."""
    positions = from_bitmaps(kept, seen_tokens)
    return [
        LayerLayout(
            kind=layer.kind,
            kv_heads=layer.kv_heads,
            head_dim=layer.head_dim,
            tokens=(
                len(positions) if positions is not None and layer.kind == "full" else layer.held_tokens(seen_tokens)
            ),
            seen_tokens=seen_tokens,
            window_tokens=layer.window_tokens,
        )
        for layer in spec.layers
    ]


def refused(manifest: SnapshotManifest, field: str, reason: str) -> SnapshotRefused:
    """The error of a snapshot that cannot be used, naming the field."""
    return SnapshotRefused(
        f"resuming the snapshot of {manifest.conversation[:80]!r} by {manifest.creator[:80]!r}: {field}: {reason}",
        hint="resume it on a node that runs the same model",
        field=field,
        reason=reason,
    )


def _brief(value: object) -> str:
    return value.hex()[:12] if isinstance(value, bytes) else str(value)
