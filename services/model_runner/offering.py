"""Offering: the holder's part of a handoff. What it could send of a conversation, and how long that would take it.

An offer has the conversation's token ids with it, as a snapshot without KV: so who asked can begin to read again at
once, or when the KV is slow to come, without another round trip, and even when this node is gone by then.
"""

from __future__ import annotations

import math
import time
from concurrent.futures import Future, ThreadPoolExecutor

from edge.service import Context
from protocol.codec import Received
from protocol.messages import HandoffOffer, HandoffOfferAsk, OfferedRung
from protocol.sealing import DataKey
from services.model_runner import snapshot
from services.model_runner.codecs import basis_digest
from services.model_runner.codecs.ladder import rungs
from services.model_runner.conversations import Conversation
from services.model_runner.cost_book import CostBook
from services.model_runner.engine import DTYPE_BYTES
from services.model_runner.rounds import Loaded
from services.model_runner.saving import Saving
from services.model_runner.worker import Worker


class Offering:
    """Answers asks for offers."""

    def __init__(self, context: Context, worker: Worker, saving: Saving, costs: CostBook) -> None:
        self._context = context
        self._worker = worker
        self._saving = saving
        self._costs = costs
        self._thread = ThreadPoolExecutor(1, "handoff offers")

    def stop(self) -> None:
        """Begin nothing more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def offer(self, message: Received) -> Future[HandoffOffer]:
        """What this node could send of a conversation."""
        return self._thread.submit(self._offer, message)

    def _offer(self, message: Received) -> HandoffOffer:
        ask: HandoffOfferAsk = message.data
        if ask.sealing_key:
            self._context.peers.learn_sealing_key(message.node, ask.sealing_key)
        copied, ready = self._tokens_of(ask.conversation)
        spec, tokens = copied.spec, len(copied.tokens)
        manifest = snapshot.seal(copied, lambda _ref, _sealed: None)
        signed = self._saving.sign(manifest, copied.key)
        basis = self._saving.find_basis(spec, b"")
        kv_bytes = spec.kv_bytes_per_token * (tokens - 1) + spec.state_bytes
        # What has not been read here would have to be, before its KV could be sent.
        reading_s = 0.0 if ready else self._costs.prefill.seconds(0, tokens - 1)
        found: dict[str, OfferedRung] = {}
        for codec, usual in rungs(basis):  # the smallest first: of a rung's levels the most faithful is offered
            ratio = usual.ratio * DTYPE_BYTES[spec.dtype] / 2 if usual is not None else 1.0
            save_s = self._costs.save_s(codec.name, kv_bytes) + reading_s
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
        took_ms = (time.monotonic() - message.received_s) * 1000
        return HandoffOffer(tokens, kv_bytes, list(found.values()), took_ms, signed)

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
