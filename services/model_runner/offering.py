"""Offering: the holder's part of a handoff. What it could send of a conversation, and how long that would take it.

An offer has the conversation's token ids with it, as a snapshot without KV: so who asked can begin to read again at
once, or when the KV is slow to come, without another round trip, and even when this node is gone by then.
"""

from __future__ import annotations

import math
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor

from edge.service import Context
from protocol.codec import Received
from protocol.messages import HandoffOffer, HandoffOfferAsk, LinkProbe, LinkProbed, OfferedRung
from services.model_runner.codecs.ladder import rungs
from services.model_runner.cost_book import CostBook
from services.model_runner.saving import Saving
from services.model_runner.worker import Worker

DTYPE_RATIO = {"bfloat16": 1.0, "float16": 1.0, "float32": 2.0}
"""A rung's usual ratio is against 16 bits a number."""


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

    @staticmethod
    def probe(ask: LinkProbe) -> LinkProbed:
        """Random bytes, which no link compresses."""
        return LinkProbed(os.urandom(ask.size_bytes))

    def _offer(self, message: Received) -> HandoffOffer:
        ask: HandoffOfferAsk = message.data
        if ask.sealing_key:
            self._context.peers.learn_sealing_key(message.node, ask.sealing_key)
        signed, spec, tokens, prefilled = self._saving.tokens_alone(ask.conversation)
        kv_bytes = spec.kv_bytes_per_token * (tokens - 1) + spec.state_bytes
        found = []
        # What has not been read here would have to be, before its KV could be sent.
        reading_s = 0.0 if prefilled else self._costs.prefill.seconds(0, tokens - 1)
        for codec, usual in rungs():
            ratio = usual.ratio * DTYPE_RATIO[spec.dtype] if usual is not None else 1.0
            save_s = self._costs.save_s(codec.name, kv_bytes) + reading_s
            found.append(
                OfferedRung(
                    codec.name,
                    codec.exact,
                    int(kv_bytes / ratio),
                    save_s * 1000 if save_s < math.inf else None,
                    usual.mean_kl if usual is not None else 0.0,
                    usual.top1 if usual is not None else 1.0,
                )
            )
        took_ms = (time.monotonic() - message.received_s) * 1000
        return HandoffOffer(tokens, kv_bytes, found, took_ms, signed)
