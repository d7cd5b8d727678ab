"""Weighing: what there is to be had of a holder, how long each way would take, and which is taken.

What crosses the link before reading can begin is one short answer, the holder's offer, which has the token ids. A link
that is not known is probed; when the probe does not come at once, reading begins beside it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotDone
from typing import Any

import msgspec

from edge.bus import Bus
from edge.service import Context
from edge.snapshot_store import SnapshotStore
from protocol.codec import Received
from protocol.errors import BlobError, MindstreamError, ModelError
from protocol.manifest import snapshot_id, unpack_signed
from protocol.messages import (
    HandoffOffer,
    HandoffOfferAsk,
    LinkProbe,
    ModelResume,
    SnapshotTimeline,
    SnapshotTimelineAsk,
)
from protocol.sharing import Opened, open_snapshot
from services.model_runner import costs, snapshot
from services.model_runner.codecs import basis_digest
from services.model_runner.codecs.ladder import Asked
from services.model_runner.cost_book import CostBook
from services.model_runner.engine import Engine, ModelSpec
from services.model_runner.handoff import Handoff, since_ms
from services.model_runner.rounds import Loaded
from services.model_runner.saving import FindBasis
from services.model_runner.taking import MANIFEST_TTL_MS, Taking
from services.model_runner.timeline import Timeline, not_labelled
from services.model_runner.variant_use import Variants
from services.model_runner.variants import Permit
from services.model_runner.worker import Worker

log = logging.getLogger(__name__)

PROBE_WORTH_S = 0.3
"""A link that is not known is probed when reading again would take this long."""
PROBE_PATIENCE_S = 0.03
"""When a probe takes longer, reading begins beside it: then the link is slow, and it may well be what is decided."""
PROBE_BESIDE_SHARE = 0.1
"""Of the time of reading again, that a probe beside it may take by what is known of the link."""
SURE_COUNT = 1.0
"""A link whose rate rests on less than so many measurements (``costs.Estimate.count``) is probed beside reading."""
TRANSCODING_WORTH_S = 0.3
"""A holder is asked what it could transcode a snapshot to when fetching it as it is would take this long."""


class Weighing:
    """Finds out what there is, and decides.

    Args:
        taking: asks holders.
        book: what was measured of reading, links and codecs.
        variants: knows what KV of another variant of the model may be used.
        timeline: of the snapshots here, for labels.
        find_basis: for the rung ``transform``.
        want_basis: told of one that a snapshot of some holder needs and that is not here.
    """

    def __init__(
        self,
        context: Context,
        bus: Bus,
        worker: Worker,
        store: SnapshotStore,
        book: CostBook,
        taking: Taking,
        variants: Variants | None,
        timeline: Timeline,
        find_basis: FindBasis,
        want_basis: Callable[[ModelSpec, str, bytes], None],
    ) -> None:
        self._context = context
        self._node = context.identity.node
        self._bus = bus
        self._worker = worker
        self._store = store
        self._book = book
        self._taking = taking
        self._variants = variants
        self._timeline = timeline
        self._find_basis = find_basis
        self._want_basis = want_basis

    def handoff(self, message: Received) -> Handoff:
        """What the ask names, opened, and what there is to be had of it."""
        ask = self._completed(message)
        return self._by_snapshot(ask, message) if ask.snapshot else self._by_conversation(ask, message)

    def _completed(self, message: Received) -> ModelResume:
        """The ask with the snapshot that a label names, and what the configuration allows. Raises NotFound."""
        ask: ModelResume = message.data
        settings = self._context.config.snapshot
        if settings.resume_lossy and not ask.lossy:
            ask = msgspec.structs.replace(ask, lossy=True, most_kl=settings.most_kl, least_top1=settings.least_top1)
        conversation, labelled, label = ask.source.partition("@")
        if ask.snapshot or not labelled:
            return ask
        if ask.holder == self._node:
            return msgspec.structs.replace(ask, snapshot=self._timeline.labelled(conversation, label))
        there: SnapshotTimeline = self._taking.ask(
            ask.holder, SnapshotTimelineAsk(conversation), message, f"looking for {ask.source!r}"
        )
        found = [moment.snapshot for moment in there.moments if (moment.label, moment.conversation) == (label, "")]
        if not found:
            raise not_labelled(conversation, label, ask.holder)
        return msgspec.structs.replace(ask, snapshot=found[-1])

    # --- what there is --------------------------------------------------------------------------------------

    def _by_snapshot(self, ask: ModelResume, message: Received) -> Handoff:
        started_s = time.monotonic()
        signed = self._taking.manifest(ask.holder, ask.snapshot, message)
        opened = open_snapshot(signed, ask.snapshot, self._context.identity, self._context.peers.keyring())
        manifest = opened.manifest
        name = ask.conversation or manifest.conversation
        # The engine may still be loading: wait for it on its own thread before anything is fetched.
        engine = self._worker.between_tokens(lambda loaded: self._examine(loaded, opened, name)).result()
        variant, why_no_variant = self._permit(engine, opened, ask)
        needed = basis_digest(manifest.codec)
        basis = self._find_basis(engine.spec, needed)
        if needed and basis is None and ask.holder != self._node:
            self._want_basis(engine.spec, ask.holder, needed)  # for the next one: this one's tokens are read
        reason = snapshot.why_not_exact(engine, manifest, lossy=ask.lossy, basis=basis, variant=variant)
        reason += why_no_variant
        local = ask.holder == self._node
        missing_bytes = sum(ref.size_bytes for ref in manifest.chunks if local or not self._store.has(ref))
        found = manifest.certificate
        rung = costs.RungOffer(
            manifest.codec.name,
            found is None,
            missing_bytes,
            0.0,
            0.0 if found is None or found.mean_kl is None else found.mean_kl,
            1.0 if found is None or found.top1 is None else found.top1,
        )
        handoff = Handoff(
            ask,
            message,
            started_s,
            opened,
            ask.snapshot,
            signed,
            name,
            engine,
            reason,
            _kv_bytes(engine, opened),
            [rung],
            variant,
        )
        handoff.phases.ask_ms = since_ms(started_s)
        return handoff

    def _by_conversation(self, ask: ModelResume, message: Received) -> Handoff:
        started_s = time.monotonic()
        doing = f"handing {ask.source!r} over"
        if not ask.source:
            raise ModelError(
                "resuming: neither a snapshot nor a conversation of the holder is named",
                hint="name one of them",
                field="source",
                reason="nothing named",
            )
        offer: HandoffOffer = self._taking.ask(
            ask.holder, HandoffOfferAsk(ask.source, self._context.identity.sealing_key), message, doing
        )
        way_s = time.monotonic() - started_s - offer.took_ms / 1000
        if not offer.packed:
            raise BlobError(f"{doing}: {ask.holder} sent no token ids", field="packed", reason="no token ids")
        signed = unpack_signed(offer.packed)
        self._note_latency(ask.holder, way_s, len(offer.packed))
        identifier = snapshot_id(signed)
        opened = open_snapshot(signed, identifier, self._context.identity, self._context.peers.keyring())
        name = ask.conversation or opened.manifest.conversation
        engine = self._worker.between_tokens(lambda loaded: self._examine(loaded, opened, name)).result()
        variant, why_no_variant = self._permit(engine, opened, ask)
        reason = "" if variant else snapshot.other_numerics(engine, opened.manifest) + why_no_variant
        kv_bytes = _kv_bytes(engine, opened)
        handoff = Handoff(
            ask, message, started_s, opened, identifier, signed, name, engine, reason, kv_bytes, _rungs(offer), variant
        )
        handoff.phases.ask_ms = since_ms(started_s)
        return handoff

    def _permit(self, engine: Engine, opened: Opened, ask: ModelResume) -> tuple[Permit | None, str]:
        """Whether KV of another variant may be used; else why not, to be said behind what the other one is."""
        if not snapshot.other_numerics(engine, opened.manifest) or self._variants is None or ask.way == "tokens":
            return None, ""
        if not ask.lossy:
            return None, ", and KV of another variant is not exact"
        found = self._variants.permit(engine, opened.manifest, ask.holder, Asked(ask.most_kl, ask.least_top1))
        return (None, f"; {found}") if isinstance(found, str) else (found, "")

    def _note_latency(self, holder: str, way_s: float, size_bytes: int) -> None:
        byte = self._book.link(holder).byte
        moving_s = byte.likely * size_bytes if byte.known else 0.0
        self._book.asked(holder, max(1e-4, way_s - moving_s))

    def _examine(self, loaded: Loaded, opened: Opened, name: str) -> Engine:
        """The engine, once it is known that it can go on with the conversation at all. Raises SnapshotRefused."""
        refused = snapshot.refusal(loaded.engine, opened.manifest, opened.private)
        if refused is not None:
            raise refused
        self.check_not_running(name)
        return loaded.engine

    def check_not_running(self, name: str) -> None:
        """Raises ModelError when a conversation of that name is being answered here."""
        if name in self._worker.running:
            raise ModelError(
                f"resuming conversation {name!r}: one of that name is being answered here",
                hint="wait for its end, cancel it, or give the resumed one another name",
                field="conversation",
                reason="busy",
            )

    # --- deciding -------------------------------------------------------------------------------------------

    def decide(self, handoff: Handoff, begin_reading: Callable[[], None]) -> None:
        """Fill in the options, and the best of them. ``begin_reading`` is called, once, when that is worth it before
        it is decided."""
        ask = handoff.ask
        handoff.prefill_s = self._book.prefill.seconds(0, handoff.tokens - 1)
        far = ask.way == "auto" and ask.holder != self._node and not handoff.kv_refused
        worth = far and handoff.prefill_s > PROBE_WORTH_S
        byte = self._book.link(ask.holder).byte
        if worth and not byte.known:
            self._probe(handoff, begin_reading)
        self._choose(handoff)
        if worth and byte.known and byte.count < SURE_COUNT and handoff.best.codec == costs.TOKENS:
            self._probe_beside(handoff)
        if far and handoff.named and handoff.options[1].likely_s > TRANSCODING_WORTH_S:
            self._ask_for_transcoding(handoff)
        handoff.decided_s = time.monotonic()

    def _choose(self, handoff: Handoff) -> None:
        ask = handoff.ask
        spec = handoff.engine.spec
        needed = {rung.basis for rung in handoff.rungs if rung.basis}
        here = costs.Here(
            now_us=time.time_ns() // 1000,
            prefill=self._book.prefill,
            link=self._book.link(ask.holder),
            decode=self._book.restore,
            local=ask.holder == self._node,
            bases=frozenset(basis for basis in needed if self._find_basis(spec, basis) is not None),
            read_tokens=handoff.read_tokens,
        )
        handoff.options = costs.predict(
            handoff.tokens,
            handoff.kv_bytes,
            handoff.rungs,
            here,
            kv_refused=handoff.kv_refused,
            computed_share=handoff.variant.share(handoff.engine, handoff.tokens - 1) if handoff.variant else 0,
        )
        wanted = costs.Wanted(ask.lossy, ask.most_kl, ask.least_top1)
        handoff.best = costs.choose(handoff.options, handoff.rungs, wanted, way=ask.way)

    def _probe(self, handoff: Handoff, begin_reading: Callable[[], None]) -> None:
        """Ask for bytes, for more of them as long as they come at once."""
        holder = handoff.ask.holder
        left_s = costs.PROBE_SHARE * handoff.prefill_s
        size_bytes = costs.probe_bytes(handoff.prefill_s)
        while size_bytes:
            started_s = time.monotonic()
            try:
                coming = self._bus.ask_later(holder, LinkProbe(size_bytes), ttl_ms=MANIFEST_TTL_MS)
                try:
                    coming.result(PROBE_PATIENCE_S)
                except NotDone:
                    begin_reading()
                    coming.result()
            except MindstreamError as error:
                log.info("the link to %s is not known: %s", holder, error)
                return
            took_s = time.monotonic() - started_s
            self._book.fetched(holder, size_bytes, took_s)
            handoff.phases.ask_ms += took_s * 1000
            left_s -= took_s
            latency = self._book.link(holder).latency
            size_bytes = costs.larger_probe_bytes(size_bytes, took_s, latency.likely if latency.known else 0.0, left_s)

    def _probe_beside(self, handoff: Handoff) -> None:
        """While it is read again: else a link that was probed at a bad moment would be held to be slow for ever."""
        holder, started_s = handoff.ask.holder, time.monotonic()
        byte = self._book.link(holder).byte
        # Nobody waits for it, so it may be large.
        size_bytes = int(min(costs.MOST_PROBE_BYTES, max(2_048, PROBE_BESIDE_SHARE * handoff.prefill_s / byte.likely)))

        def note(coming: Future[Any]) -> None:
            if not coming.cancelled() and coming.exception() is None:
                self._book.fetched(holder, size_bytes, time.monotonic() - started_s)

        try:
            self._bus.ask_later(holder, LinkProbe(size_bytes), ttl_ms=MANIFEST_TTL_MS).add_done_callback(note)
        except MindstreamError as error:
            log.info("the link to %s is not probed again: %s", holder, error)

    def _ask_for_transcoding(self, handoff: Handoff) -> None:
        """Weigh what the holder could transcode a snapshot to, beside the snapshot as it is."""
        ask, started_s = handoff.ask, time.monotonic()
        asked = HandoffOfferAsk("", self._context.identity.sealing_key, ask.snapshot)
        try:
            offer: HandoffOffer = self._taking.ask(ask.holder, asked, handoff.message, "asking for other encodings")
        except MindstreamError as error:
            log.info("%s offers no other encoding of %s: %s", ask.holder, ask.snapshot[:12], error)
            return
        finally:
            handoff.phases.ask_ms += since_ms(started_s)
        known = {rung.codec for rung in handoff.rungs}
        handoff.rungs += [rung for rung in _rungs(offer) if rung.codec not in known]
        self._choose(handoff)


def _rungs(offer: HandoffOffer) -> list[costs.RungOffer]:
    return [
        costs.RungOffer(
            each.codec,
            each.exact,
            each.size_bytes,
            math.inf if each.save_ms is None else each.save_ms / 1000,
            each.mean_kl,
            each.top1,
            each.basis,
            each.basis_bytes,
        )
        for each in offer.rungs
    ]


def _kv_bytes(engine: Engine, opened: Opened) -> int:
    return engine.spec.kv_bytes_per_token * opened.manifest.cached_tokens + engine.spec.state_bytes
