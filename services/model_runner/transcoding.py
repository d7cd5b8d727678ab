"""Transcoding: another snapshot of one that is here, encoded otherwise. The first stays.

The source's KV is decoded, encoded anew, and tested against what was decoded: its certificate says against which
codec. The new snapshot names the source as its parent, and takes its provenance on. Token ids, messages, sampler, the
next token's logits and the data key are the source's.
"""

from __future__ import annotations

import time
from concurrent.futures import Future

import numpy as np

from edge.service import Context
from edge.snapshot_store import SnapshotStore
from protocol.layout import BLOCK_TOKENS, TOKENS, PartPlace
from protocol.messages import SnapshotSaved, SnapshotTranscode
from protocol.provenance import Kind, SignedStatement, add_statement
from protocol.sharing import Opened, open_snapshot
from services.model_runner import snapshot
from services.model_runner.blocks import RawPart, cut
from services.model_runner.codecs import basis_digest
from services.model_runner.engine import Engine
from services.model_runner.saving import Saving, said
from services.model_runner.worker import Worker


class Transcoding:
    """Answers asks to transcode; on the thread that saves."""

    def __init__(self, context: Context, worker: Worker, store: SnapshotStore, saving: Saving) -> None:
        self._context = context
        self._worker = worker
        self._store = store
        self._saving = saving

    def transcode(self, ask: SnapshotTranscode) -> Future[SnapshotSaved]:
        """Make another snapshot; the future ends when it is on the disk.

        It raises NotFound, SnapshotRefused where this node cannot decode the source, ModelError where no rung meets
        what is asked, and what opening a snapshot raises.
        """
        started_s = time.monotonic()
        return self._saving.later(lambda: self._transcode(ask, started_s), ask.run)

    def _transcode(self, ask: SnapshotTranscode, started_s: float) -> SnapshotSaved:
        signed = self._store.manifest(ask.snapshot)
        opened = open_snapshot(signed, ask.snapshot, self._context.identity, self._context.peers.keyring())
        engine = self._worker.between_tokens(lambda loaded: loaded.engine).result()
        copied = self._copied(engine, opened, ask)
        # Of two errors on top of each other only the second is measured, and it is said against what.
        shrunk = self._saving.shrink(engine, copied, ask.wishes, opened.manifest)

        def provenance(own: bytes) -> list[SignedStatement]:
            details = {"from": bytes.fromhex(ask.snapshot), **shrunk.statement}
            kind: Kind = "pruned" if shrunk.statement else "transcoded"
            return add_statement(self._context.identity, signed.provenance, own, kind, details)

        written = self._saving.write(
            shrunk.copied,
            shrunk.encoded,
            lambda manifest: self._saving.sign(manifest, opened.key, provenance),
            durable=ask.durable,
        )
        self._saving.announce(written)
        return said(written, shrunk.encoded, started_s)

    def _copied(self, engine: Engine, opened: Opened, ask: SnapshotTranscode) -> snapshot.Copied:
        """The source as if it had just been copied out of the engine."""
        manifest = opened.manifest
        refused = snapshot.refusal(engine, manifest, opened.private)
        if refused is not None:
            raise refused
        tokens_only = ask.wishes.codec == TOKENS.name
        parts: list[RawPart] = []
        if tokens_only:
            found = snapshot.read_tokens(engine, manifest, opened.private, "its KV is not wanted")
        else:
            basis = self._saving.find_basis(engine.spec, basis_digest(manifest.codec))
            reason = snapshot.why_not_exact(engine, manifest, lossy=True, basis=basis)
            if reason:
                raise snapshot.refused(manifest, "codec", f"its KV cannot be used on this node: {reason}")
            chunks = self._store.chunks(manifest)
            found = snapshot.read(engine, manifest, opened.private, opened.key, chunks, lossy=True, basis=basis)
            del chunks
            parts = cut(engine.spec, found.layers, manifest.cached_tokens)
            if found.logits is not None:
                place = PartPlace("logits", -(-manifest.cached_tokens // BLOCK_TOKENS) - 1)
                parts.append(RawPart(place, np.ascontiguousarray(found.logits, "<f4").view(np.uint8)))
        return snapshot.Copied(
            manifest.conversation,
            self._context.identity.node,
            engine.spec,
            engine.fingerprint,
            opened.key,
            found.tokens,
            found.sampler.to_state(),
            found.progress,
            parts,
            sum(part.raw.nbytes for part in parts),
            parent=bytes.fromhex(ask.snapshot),
            kept=() if tokens_only else manifest.kept,
            label=ask.label or manifest.label,
            tokens_only=tokens_only,
        )
