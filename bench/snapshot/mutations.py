"""Snapshots changed by chance and by intent, as a reader gets them: every one must be refused before there is room made
for it.

Of every codec, whole and pruned, with and without what is optional; and the other signed bytes of snapshots: a basis'
manifest, an entry of the pool, a variant's certificate, a grant of the group key.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
import numpy as np

from bench.mutations import Mutator, Reader, Sent, SignedBytes
from bench.report import Figures, Progress
from bench.snapshot.frame import Bench, read_state
from bench.snapshot.texts import measured_texts
from protocol.basis_manifest import SignedBasis, open_basis, sign_basis
from protocol.errors import SnapshotRefused
from protocol.group_key import GroupKey, SignedGrant, grant_key, read_grants
from protocol.identity import Identity, Keyring, digest
from protocol.layout import BLOCK_TOKENS, CodecRef
from protocol.manifest import Certificate, PrivatePart, SnapshotManifest, prefix_addresses, seal_manifest, snapshot_id
from protocol.pool import SignedPoolEntry, open_entry, sign_entry
from protocol.provenance import add_statement
from protocol.sealing import DataKey, wrap_key
from protocol.variants import (
    LayerEffect,
    Reuse,
    SignedVariantCertificate,
    Variant,
    VariantCertificate,
    open_variant,
    seal_variant,
)
from services.model_runner import pool_blocks, snapshot
from services.model_runner.codecs import RUNGS
from services.model_runner.codecs.base import Codec
from services.model_runner.codecs.basis import Basis, write_basis
from services.model_runner.codecs.raw import Raw
from services.model_runner.codecs.transform import Transform
from services.model_runner.engine import Engine
from services.model_runner.generation import GenerationState
from services.model_runner.positions import prune

MUTATIONS = 12_000
MUTATED_TOKENS = 300
"""Two blocks, of which the last is short."""

S = TypeVar("S")


class _Later(Raw):
    """Of a version that is not known here."""

    @property
    def ref(self) -> CodecRef:
        return CodecRef("raw", 999, {})


def part(bench: Bench) -> Figures:
    """Of real snapshots of the model."""
    corpus = bench.chat.encode("\n\n".join(measured_texts().values()), special=False)
    state = read_state(bench.engine, corpus[: MUTATED_TOKENS + 1])
    longer = read_state(bench.engine, [*state.tokens, *state.tokens[:20]])
    # Where it is at hand: to calibrate takes minutes.
    basis = bench.basis if bench.basis_file.is_file() else None
    try:
        subjects, mb = _Site(bench.engine, basis).subjects(state, longer)
    finally:
        state.cache.close()
        longer.cache.close()
    return _measure(subjects, mb, 300 if bench.quick else MUTATIONS, bench.progress)


class _Site:
    """Tomato, who saves; sprout, who reads; mars, for whom it is not."""

    def __init__(self, engine: Engine, basis: Basis | None) -> None:
        self.engine = engine
        self.basis = basis
        self.tomato, self.sprout, self.mars = (Identity.generate(name) for name in ("tomato", "sprout", "mars"))
        self.keyring = Keyring({each.node: each.fingerprint for each in (self.tomato, self.sprout)})
        self.key = DataKey.generate()
        self.reader = Reader(self.sprout, self.keyring, self._fits)

    def _fits(self, manifest: SnapshotManifest, private: PrivatePart) -> None:
        refused = snapshot.refusal(self.engine, manifest, private)
        if refused is not None:
            raise refused
        reason = snapshot.why_not_exact(self.engine, manifest, lossy=True, basis=self.basis)
        if reason:
            raise SnapshotRefused("taking its KV in", reason=reason)

    def sent(
        self,
        state: GenerationState,
        key: DataKey | None = None,
        codec: Codec | None = None,
        certificate: Certificate | None = None,
        logits: bool = False,
        **changes: Any,
    ) -> Sent:
        """A snapshot of ``state`` as sprout gets it; ``changes`` are of what was copied out of the engine."""
        key = key or self.key
        spec = self.engine.spec
        row = np.zeros(spec.vocab_size, np.float32) if logits else None
        copied = snapshot.copy(
            self.engine, state, conversation="bench", creator="tomato", key=key, logits=row, parent=bytes(32)
        )._replace(**changes)
        chunks: list[bytes] = []
        manifest = snapshot.seal(copied, lambda _, chunk: chunks.append(bytes(chunk)), codec, certificate)
        signed = seal_manifest(self.tomato, manifest)
        signed.wraps = [wrap_key(self.tomato, key, "sprout", self.sprout.sealing.public_key)]
        signed.provenance = add_statement(self.tomato, [], digest(signed.manifest), "created")
        return Sent(snapshot_id(signed), msgspec.msgpack.encode(signed), chunks)

    def subjects(
        self, state: GenerationState, longer: GenerationState
    ) -> tuple[dict[str, Mutator | SignedBytes], float]:
        """What is mutated, and how many megabytes a whole one has."""
        genuine = self.sent(state)
        others = [self.sent(longer), self.sent(state, DataKey.generate())]
        kinds = {"raw": genuine, "logits": self.sent(state, logits=True)}
        certificate = Certificate(128, 0.01, 0.96, ["mean_kl"])
        for name, rung in RUNGS.items():
            kinds[name] = self.sent(state, codec=rung(), certificate=None if rung().exact else certificate)
        if self.basis is not None:
            for level in self.basis.levels:
                codec = Transform(self.basis, level)
                kinds[f"transform {level}"] = self.sent(state, codec=codec, certificate=certificate)
        kinds["pruned"] = self._pruned(state, certificate)
        for each in (*kinds.values(), *others):
            self.reader.take(each)  # it is for their changes that they are refused
        wraps = [wrap_key(self.tomato, self.key, "mars", self.mars.sealing.public_key)]
        foreign = self._foreign(state)
        found: dict[str, Mutator | SignedBytes] = {
            name: Mutator(each, others, self.reader, self.tomato, wraps, foreign) for name, each in kinds.items()
        }
        # Its KV is none to be taken in: who reads it is asked for its token ids alone.
        tokens = self.sent(state, tokens_only=True, parts=[], label="a label")
        reader = Reader(self.sprout, self.keyring)
        reader.take(tokens)
        found["tokens"] = Mutator(tokens, others, reader, self.tomato, wraps)
        return found | self._signed(state), sum(map(len, genuine.chunks)) / 1e6

    def _pruned(self, state: GenerationState, certificate: Certificate) -> Sent:
        cached = state.cache.length
        kept = np.sort(np.random.default_rng(0).choice(cached, cached // 2, replace=False))
        cache = self.engine.import_layers(prune(self.engine.export_layers(state.cache), kept), cached + 8)
        try:
            return self.sent(replace(state, cache=cache), certificate=certificate)
        finally:
            cache.close()

    def _foreign(self, state: GenerationState) -> list[Sent]:
        """Genuine ones that this engine cannot take in."""
        spec, numerics = self.engine.spec, self.engine.fingerprint
        other = bytes(range(32))
        return [
            *(
                self.sent(state, spec=replace(spec, digests=msgspec.structs.replace(spec.digests, **digests)))
                for digests in ({"weights": other}, {"tokenizer": other}, {"config": other}, {"adapters": (other,)})
            ),
            self.sent(state, fingerprint=msgspec.structs.replace(numerics, threads=numerics.threads + 1)),
            self.sent(state, fingerprint=msgspec.structs.replace(numerics, engine_version="another")),
            self.sent(state, codec=_Later()),
        ]

    def _signed(self, state: GenerationState) -> dict[str, Mutator | SignedBytes]:
        """The other signed bytes."""
        spec, numerics, keyring = self.engine.spec, self.engine.fingerprint, self.keyring
        data = write_basis(self.basis.file) if self.basis is not None else bytes(100_000)
        variant = Variant.of(spec.digests, numerics)
        effects = [LayerEffect(0.01, 0.99) for _ in spec.layers]
        reuses = [Reuse(0, 0.1, 0.2, 0.9), Reuse(1, 0.01, 0.02, 0.98)]
        certificate = VariantCertificate(
            time.time_ns() // 1000, "tomato", effects, spec.name, 512, reuses, variant, variant, 128, 2
        )
        group = GroupKey.generate("tomato")
        tokens = np.asarray(state.tokens, "<u4").tobytes()
        address, root = prefix_addresses(spec.digests, tokens, BLOCK_TOKENS)
        assert root != address
        layers = self.engine.export_layers(state.cache)
        block = [layer.prefix(each, BLOCK_TOKENS) for layer, each in zip(layers, spec.layers, strict=True)]
        found: dict[str, Mutator | SignedBytes] = {
            "basis": _signed_bytes(
                sign_basis(self.tomato, spec.name, spec.digests, data), lambda each: open_basis(each, keyring)
            ),
            "variant": _signed_bytes(seal_variant(self.tomato, certificate), lambda each: open_variant(each, keyring)),
            "group key": _signed_bytes(
                grant_key(self.tomato, group, "sprout", self.sprout.sealing.public_key),
                lambda each: read_grants([each], "tomato", self.sprout, keyring),
            ),
        }
        if all(layer is not None for layer in block):
            raw = pool_blocks.cut_block(spec, [layer for layer in block if layer is not None], 0)
            place = pool_blocks.Place(0, address, b"")
            entry, _ = pool_blocks.seal_block(
                spec, numerics, raw, place, key=group, creator="tomato", created_us=1, cost_ms=1, codec=Raw()
            )
            found["pool entry"] = _signed_bytes(sign_entry(self.tomato, entry), lambda each: open_entry(each, keyring))
        return found


def _signed_bytes(
    signed: SignedBasis | SignedVariantCertificate | SignedGrant | SignedPoolEntry, read: Callable[[Any], object]
) -> SignedBytes:
    kind = type(signed)
    return SignedBytes(msgspec.msgpack.encode(signed), lambda wire: read(msgspec.msgpack.decode(wire, type=kind)))


def _measure(subjects: dict[str, Mutator | SignedBytes], mb: float, count: int, progress: Progress) -> Figures:
    """How many of ``count`` mutations are refused, and the most memory that one took."""
    each_count = -(-count // len(subjects))
    refused = total = with_tokens = peak_bytes = 0
    tracemalloc.start()
    try:
        for name, subject in subjects.items():
            outcomes = [subject.outcome(seed) for seed in range(each_count)]
            own = sum(each.refused for each in outcomes)
            own_peak = max(each.peak_bytes for each in outcomes)
            tokens = sum(each.refused and each.tokens is not None for each in outcomes)
            said = f", {tokens:,} can be read again from their tokens" if isinstance(subject, Mutator) else ""
            progress(f"{name}: {own:,} of {each_count:,} mutations refused, at most {own_peak / 1e3:.0f} kB{said}")
            refused, total = refused + own, total + each_count
            with_tokens, peak_bytes = with_tokens + tokens, max(peak_bytes, own_peak)
    finally:
        tracemalloc.stop()
    return {
        "mutations": total,
        "mutations_refused": refused,
        "mutations_with_tokens": with_tokens,
        "mutation_peak_kb": round(peak_bytes / 1e3, 1),
        "mutated_kinds": ", ".join(subjects),
        "mutated_snapshot_mb": round(mb, 2),
    }
