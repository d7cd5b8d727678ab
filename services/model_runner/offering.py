"""Offering: the holder's part of a handoff. What it could send of a conversation, and how long that would take it.

An offer has the conversation's token ids with it, as a snapshot without KV: so who asked can begin to read again at
once, or when the KV is slow to come, without another round trip, and even when this node is gone by then. Of a
snapshot it is offered what it could be transcoded to.
"""

from __future__ import annotations

import math
import time
from concurrent.futures import Future, ThreadPoolExecutor

from edge.service import Context
from edge.snapshot_store import SnapshotStore
from protocol.layout import TOKENS
from protocol.manifest import open_manifest, pack_signed
from protocol.messages import HandoffOffer, HandoffOfferAsk, OfferedRung
from protocol.sealing import DataKey
from protocol.sharing import share
from services.model_runner import snapshot
from services.model_runner.codecs import basis_digest
from services.model_runner.codecs.ladder import rungs
from services.model_runner.conversations import Conversation
from services.model_runner.cost_book import CostBook
from services.model_runner.engine import DTYPE_BYTES, ModelSpec
from services.model_runner.rounds import Loaded
from services.model_runner.saving import Saving
from services.model_runner.worker import Worker


class Offering:
    """Answers asks for offers."""

    def __init__(self, context: Context, worker: Worker, store: SnapshotStore, saving: Saving, costs: CostBook) -> None:
        self._context = context
        self._worker = worker
        self._store = store
        self._saving = saving
        self._costs = costs
        self._thread = ThreadPoolExecutor(1, "handoff offers")

    def stop(self) -> None:
        """Begin nothing more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def offer(self, ask: HandoffOfferAsk, asker: str, received_s: float) -> Future[HandoffOffer]:
        """What this node could send ``asker``, whose ask came at ``received_s``, of a conversation or a snapshot."""
        return self._thread.submit(self._offer, ask, asker, received_s)

    def _offer(self, ask: HandoffOfferAsk, asker: str, received_s: float) -> HandoffOffer:
        if ask.sealing_key:
            self._context.peers.learn_sealing_key(asker, ask.sealing_key)
        offer = self._of_snapshot(ask.snapshot) if ask.snapshot else self._of_conversation(ask, asker)
        offer.took_ms = (time.monotonic() - received_s) * 1000
        return offer

    def _of_conversation(self, ask: HandoffOfferAsk, asker: str) -> HandoffOffer:
        copied, ready = self._tokens_of(ask.conversation)
        spec, tokens = copied.spec, len(copied.tokens)
        manifest = snapshot.seal(copied, lambda _ref, _sealed: None)
        signed = self._saving.sign(manifest, copied.key)
        # A wrap for each node that is trusted here would be most of what crosses a slow link.
        sent = share(signed, asker, self._context.identity, self._context.peers.keyring()).sent
        kv_bytes = spec.kv_bytes_per_token * (tokens - 1) + spec.state_bytes
        # What has not been read here would have to be, before its KV could be sent.
        before_s = 0.0 if ready else self._costs.prefill.seconds(0, tokens - 1)
        return HandoffOffer(tokens, kv_bytes, self._rungs(spec, kv_bytes, before_s), 0.0, pack_signed(sent))

    def _of_snapshot(self, identifier: str) -> HandoffOffer:
        """What one could be transcoded to here; nothing where its KV cannot be decoded here."""
        signed = self._store.manifest(identifier)
        manifest = open_manifest(signed, self._context.peers.keyring())
        spec = self._worker.between_tokens(lambda loaded: loaded.engine.spec).result()
        tokens, kv_bytes = manifest.cached_tokens, spec.kv_bytes_per_token * manifest.kept_tokens + spec.state_bytes
        decode_s = self._costs.restore_s(manifest.codec.name, kv_bytes)
        if manifest.digests != spec.digests or manifest.kv_dtype != spec.dtype or manifest.codec.name == TOKENS.name:
            return HandoffOffer(tokens + 1, kv_bytes, [], 0.0)
        found, usual = self._rungs(spec, kv_bytes, decode_s), manifest.certificate
        if usual is not None:
            # Of two errors on top of each other no more is known than that they may add up.
            for rung in found:
                rung.exact = False
                rung.mean_kl += usual.mean_kl or 0.0
                rung.top1 = max(0.0, rung.top1 + (1.0 if usual.top1 is None else usual.top1) - 1.0)
        return HandoffOffer(
            tokens + 1,
            kv_bytes,
            [rung for rung in found if rung.codec != manifest.codec.name and rung.size_bytes < manifest.total_bytes],
            0.0,
        )

    def _rungs(self, spec: ModelSpec, kv_bytes: int, before_s: float) -> list[OfferedRung]:
        """Each rung that this node can encode by, ``before_s`` being needed first."""
        basis = self._saving.find_basis(spec, b"")
        found: dict[str, OfferedRung] = {}
        for codec, usual in rungs(basis):  # the smallest first: of a rung's levels the most faithful is offered
            ratio = usual.ratio * DTYPE_BYTES[spec.dtype] / 2 if usual is not None else 1.0
            save_s = self._costs.save_s(codec.name, kv_bytes) + before_s
            needed = basis_digest(codec.ref)
            found[codec.name] = OfferedRung(
                codec.name,
                codec.exact,
                int(kv_bytes / ratio),
                save_s * 1000 if save_s < math.inf else None,
                usual.mean_kl if usual is not None else 0.0,
                usual.top1 if usual is not None else 1.0,
                needed,
                basis.size_bytes if basis is not None and needed else 0,
            )
        return list(found.values())

    def _tokens_of(self, name: str) -> tuple[snapshot.Copied, bool]:
        """A conversation without its KV, and whether that is there, in memory or parked."""

        def copy(loaded: Loaded) -> tuple[Conversation, snapshot.Copied, bool]:
            conversation = loaded.conversations.get(name)
            parking = loaded.conversations.parking
            ready = conversation.state.prefilled or (parking is not None and parking.has(name))
            return conversation, self._saving.copy(loaded, conversation, tokens_only=True), ready

        conversation, copied, ready = self._worker.between_tokens(copy).result()
        if self._saving.must_change_key(copied):
            conversation.key = DataKey.generate()
            copied = copied._replace(key=conversation.key)
        return copied, ready
