"""Resuming: a snapshot, from this node's disk or from the node that holds it, to a conversation that goes on here.

What is predicted to be the quickest way is taken (``costs``): the KV by the rung that suits the link, or the token
ids, read again. The engine is asked first whether it can take the KV in, and only then are chunks fetched. They are
decrypted and decoded while later ones come (``landing``). When they come so slowly that reading again would be quicker,
that is begun beside them, and the first to be done wins. Where the chunks do not hold what they should, the tokens are
read again as well, and the answer says why.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import msgspec

from edge.bus import Bus
from edge.mailbox import Mailbox
from edge.service import Context
from edge.snapshot_store import SnapshotStore
from protocol.codec import Received
from protocol.errors import BlobError, MalformedMessage, MindstreamError, ModelError, SnapshotRefused
from protocol.manifest import SignedManifest, snapshot_id
from protocol.messages import (
    HandoffOffer,
    HandoffOfferAsk,
    LinkProbe,
    ModelResume,
    ModelResumed,
    SnapshotTimeline,
    SnapshotTimelineAsk,
)
from protocol.provenance import add_statement
from protocol.sharing import Opened, open_snapshot
from services.model_runner import costs, first_step, snapshot
from services.model_runner.codecs import basis_digest
from services.model_runner.codecs.ladder import Asked
from services.model_runner.conversations import Conversation
from services.model_runner.cost_book import CostBook
from services.model_runner.engine import Engine, ModelSpec
from services.model_runner.first_step import FirstStep
from services.model_runner.handoff import Handoff, Unusable, since_ms
from services.model_runner.reading import Reading
from services.model_runner.rounds import Loaded
from services.model_runner.saving import FindBasis, extra_of, fidelity_of
from services.model_runner.taking import Taken, Taking
from services.model_runner.telling import Say
from services.model_runner.timeline import Timeline, not_labelled
from services.model_runner.variant_use import Variants
from services.model_runner.variants import Permit
from services.model_runner.worker import Worker

log = logging.getLogger(__name__)

PROBE_WORTH_S = 0.3
"""A link that is not known is probed when reading again would take this long."""
LOOK_EVERY_S = 0.02
"""So often it is looked whether what was decided still holds."""


class Resuming:
    """Answers asks to resume.

    Args:
        blob_bus: a connection of its own for chunks, so that tokens do not wait behind them.
        book: what was measured of reading, links and codecs.
        stopping: asked now and then while chunks come; True ends that.
        mailbox: of this host, for chunks of its other nodes.
        variants: knows what KV of another variant of the model may be used.
        timeline: of the snapshots here, for labels.
        find_basis: for the rung ``transform``.
        want_basis: told of one that a snapshot of some holder needs and that is not here.
        say_progress: called with an ask's run and how far it is; it must not take long.
    """

    def __init__(
        self,
        context: Context,
        bus: Bus,
        blob_bus: Bus,
        worker: Worker,
        store: SnapshotStore,
        book: CostBook,
        stopping: Callable[[], bool],
        mailbox: Mailbox | None = None,
        variants: Variants | None = None,
        *,
        timeline: Timeline,
        find_basis: FindBasis = lambda _spec, _wanted: None,
        want_basis: Callable[[ModelSpec, str, bytes], None] = lambda _spec, _holder, _wanted: None,
        say_progress: Say = lambda _run, _said: None,
    ) -> None:
        self._context = context
        self._node = context.identity.node
        self._bus = bus
        self._worker = worker
        self._store = store
        self._book = book
        self._variants = variants
        self._timeline = timeline
        self._find_basis = find_basis
        self._want_basis = want_basis
        self._taking = Taking(context, bus, blob_bus, worker, store, book, stopping, mailbox, find_basis, say_progress)
        self._threads = ThreadPoolExecutor(2, "snapshot fetcher")
        self._ways = ThreadPoolExecutor(4, "ways of resuming")
        self._keeper = ThreadPoolExecutor(1, "snapshot keeper")

    def stop(self) -> None:
        """Begin nothing more; what has landed is synced."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._ways.shutdown(wait=False, cancel_futures=True)
        self._taking.stop()
        self._keeper.shutdown(wait=True)

    def resume(self, message: Received) -> Future[ModelResumed]:
        """Fetch a snapshot and make a conversation of it; the future ends when its next token can be generated."""
        return self._threads.submit(self._resume, message)

    def _resume(self, message: Received) -> ModelResumed:
        ask = self._completed(message)
        handoff = self._by_snapshot(ask, message) if ask.snapshot else self._by_conversation(ask, message)
        self._decide(handoff)
        with handoff.lock:
            if handoff.best.codec == costs.TOKENS:
                return self._read_again(handoff, handoff.kv_refused or handoff.best.why_not)
            return self._load(handoff)

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
        signed = offer.signed
        if signed is None:
            raise BlobError(f"{doing}: {ask.holder} sent no token ids", field="signed", reason="no token ids")
        self._note_latency(ask.holder, way_s, len(signed.manifest))
        identifier = snapshot_id(signed)
        opened = open_snapshot(signed, identifier, self._context.identity, self._context.peers.keyring())
        name = ask.conversation or opened.manifest.conversation
        engine = self._worker.between_tokens(lambda loaded: self._examine(loaded, opened, name)).result()
        rungs = [
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
        variant, why_no_variant = self._permit(engine, opened, ask)
        reason = "" if variant else snapshot.other_numerics(engine, opened.manifest) + why_no_variant
        kv_bytes = _kv_bytes(engine, opened)
        handoff = Handoff(
            ask, message, started_s, opened, identifier, signed, name, engine, reason, kv_bytes, rungs, variant
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
        self._check_not_running(name)
        return loaded.engine

    def _check_not_running(self, name: str) -> None:
        if name in self._worker.running:
            raise ModelError(
                f"resuming conversation {name!r}: one of that name is being answered here",
                hint="wait for its end, cancel it, or give the resumed one another name",
                field="conversation",
                reason="busy",
            )

    # --- deciding -------------------------------------------------------------------------------------------

    def _decide(self, handoff: Handoff) -> None:
        """Fill in the options, and the best of them."""
        ask = handoff.ask
        handoff.prefill_s = self._book.prefill.seconds(0, handoff.tokens - 1)
        local = ask.holder == self._node
        worth = not handoff.kv_refused and ask.way == "auto" and handoff.prefill_s > PROBE_WORTH_S
        if worth and not local and not self._book.link(ask.holder).byte.known:
            self._probe(handoff)
        here = costs.Here(
            now_us=time.time_ns() // 1000,
            prefill=self._book.prefill,
            link=self._book.link(ask.holder),
            decode=self._book.restore,
            local=local,
        )
        handoff.options = costs.predict(
            handoff.tokens,
            handoff.kv_bytes,
            handoff.rungs,
            here,
            kv_refused=handoff.kv_refused,
            computed_share=handoff.variant.share(handoff.engine, handoff.tokens - 1) if handoff.variant else 0,
        )
        for option, rung in zip(handoff.options[1:], handoff.rungs, strict=True):
            if rung.basis and self._find_basis(handoff.engine.spec, rung.basis) is None:
                option.why_not = option.why_not or "its basis is not here"
        wanted = costs.Wanted(ask.lossy, ask.most_kl, ask.least_top1)
        handoff.best = costs.choose(handoff.options, handoff.rungs, wanted, way=ask.way)
        handoff.decided_s = time.monotonic()

    def _probe(self, handoff: Handoff) -> None:
        holder = handoff.ask.holder
        size_bytes = costs.probe_bytes(handoff.prefill_s)
        started_s = time.monotonic()
        try:
            self._taking.ask(holder, LinkProbe(size_bytes), handoff.message, f"probing the link to {holder}")
        except MindstreamError as error:
            log.info("the link to %s is not known: %s", holder, error)
            return
        self._book.fetched(holder, size_bytes, time.monotonic() - started_s)
        handoff.phases.ask_ms += since_ms(started_s)

    # --- carrying it out ------------------------------------------------------------------------------------

    def _load(self, handoff: Handoff) -> ModelResumed:
        """Take the KV; read again beside it when it is slower than was predicted, and in its place when it fails."""
        taking: Future[Taken] = self._ways.submit(self._taking.take, handoff)
        reading: Reading | None = None
        read: Future[snapshot.Unpacked | None] | None = None
        reason, used = "", False
        try:
            while True:
                running: list[Future[Any]] = [each for each in (taking, read) if each is not None and not each.done()]
                wait(running, LOOK_EVERY_S, FIRST_COMPLETED)
                if taking.done() and not reason:
                    try:
                        answer = self._take_in(handoff, taking.result())
                        used = True
                        return answer
                    except MindstreamError as error:
                        reason = self._why_not_taken(handoff, error)
                    except Unusable as error:
                        reason = str(error)
                if reading is not None and read is not None and read.done() and (found := read.result()) is not None:
                    return self._read_first(handoff, reading, found, reason)
                if read is None and (reason or (handoff.ask.way == "auto" and handoff.should_read_too())):
                    reading = self._reading(handoff, reason or "its KV came slower than was predicted")
                    read = self._ways.submit(reading.run)
        finally:
            handoff.outrun.set()
            if reading is not None:
                reading.stop()
            if not used:
                taking.add_done_callback(_let_go)

    def _why_not_taken(self, handoff: Handoff, error: MindstreamError) -> str:
        """What is said of KV that could not be taken; raises ``error`` where it is to be tried again instead."""
        if isinstance(error, SnapshotRefused):
            self._bus.counters.add("refused.snapshot_kv")
            self._bus.events.report("refused-snapshot-kv", "warning", str(error))
            return f"{error.field}: {error.reason}"
        if handoff.ask.way != "auto":
            raise error
        self._bus.counters.add("failed.handoff_kv")
        self._bus.events.report("handoff-kv-failed", "warning", f"{handoff.name} is read again: {error}")
        return f"its KV could not be had: {error.reason or error.message}"

    def _reading(self, handoff: Handoff, reason: str) -> Reading:
        manifest, private = handoff.opened.manifest, handoff.opened.private
        return Reading(self._worker, snapshot.read_tokens(handoff.engine, manifest, private, reason))

    def _read_first(self, handoff: Handoff, reading: Reading, found: snapshot.Unpacked, reason: str) -> ModelResumed:
        if not reason:
            self._bus.counters.add("handoffs.read_first")
            reason = (
                f"its KV came slower than was predicted, {handoff.here_bytes / 1e6:,.1f} of "
                f"{(handoff.total_bytes or handoff.best.size_bytes) / 1e6:,.1f} MB: reading again was quicker"
            )
        return self._go_on_reading(handoff, reading, found._replace(reason=reason))

    def _read_again(self, handoff: Handoff, reason: str) -> ModelResumed:
        reading = self._reading(handoff, reason or "reading again was predicted to be quicker")
        found = reading.run()
        assert found is not None
        return self._go_on_reading(handoff, reading, found)

    def _go_on_reading(self, handoff: Handoff, reading: Reading, found: snapshot.Unpacked) -> ModelResumed:
        handoff.phases.prefill_ms = reading.took_s * 1000
        self._worker.between_tokens(
            lambda loaded: self._hold(loaded, handoff, handoff.opened, handoff.identifier, found, reading.whole_chunks)
        ).result()
        if not handoff.named:
            # Nobody has it but this node: what the conversation comes from.
            self._keeper.submit(self._keep, handoff, handoff.signed, handoff.identifier, None, handoff.lock.pop_all())
        return self._answer(handoff, found, handoff.identifier, "tokens")

    def _take_in(self, handoff: Handoff, taken: Taken) -> ModelResumed:
        started_s = time.monotonic()
        opened, identifier, signed, read, landing = taken

        def restore(loaded: Loaded) -> snapshot.Unpacked:
            resumed = snapshot.restore(loaded.engine, read)
            return self._hold(loaded, handoff, opened, identifier, resumed, [])

        try:
            found = self._worker.between_tokens(restore).result()
        except BaseException:
            if read.cache is not None:
                read.cache.close()
            raise
        handoff.phases.decode_ms += since_ms(started_s)
        manifest = opened.manifest
        self._book.restored(manifest.codec.name, handoff.kv_bytes, handoff.phases.decode_ms / 1000)
        if handoff.ask.holder != self._node:
            self._keeper.submit(self._keep, handoff, signed, identifier, landing, handoff.lock.pop_all())
        return self._answer(handoff, found, identifier, manifest.codec.name, taken)

    def _hold(
        self,
        loaded: Loaded,
        handoff: Handoff,
        opened: Opened,
        identifier: str,
        resumed: snapshot.Unpacked,
        whole_chunks: list[bytes],
    ) -> snapshot.Unpacked:
        """Make a conversation of it. On the worker's thread."""
        self._check_not_running(handoff.name)  # a run may have begun while the chunks were on their way
        messages, turn_start = extra_of(opened.manifest, opened.private)
        parent = bytes.fromhex(identifier)
        conversation = Conversation(handoff.name, resumed.state, messages, turn_start, key=opened.key, parent=parent)
        conversation.whole_chunks = whole_chunks
        conversation.keep = handoff.ask.keep
        loaded.conversations.hold(conversation)
        if conversation.keep:
            loaded.conversations.save(conversation)
        handoff.first_step = self._first_step(loaded.engine, resumed, handoff.name)
        return resumed

    def _first_step(self, engine: Engine, resumed: snapshot.Unpacked, name: str) -> FirstStep | None:
        """The next step against the snapshot's own logits; on the worker's thread. What is promised and not kept is
        counted and said."""
        try:
            first = first_step.check(engine, resumed)
        except ModelError as error:
            log.info("the first step of %s was not compared: %s", name, error)
            return None
        if first is not None and resumed.how == "exact" and first.logits != "equal":
            self._bus.counters.add("differs.first_step")
            self._bus.events.report(
                "first-step-differs",
                "warning",
                f"{name} was resumed bit for bit, and yet its next step is not that of the node that saved it: KL "
                f"{first.kl:.2g} nats, {first.logits}",
            )
        return first

    def _answer(
        self, handoff: Handoff, found: snapshot.Unpacked, identifier: str, way: str, taken: Taken | None = None
    ) -> ModelResumed:
        phases = handoff.phases
        beside = handoff.options and (handoff.ask.way == "auto" or not handoff.named)
        return ModelResumed(
            conversation=handoff.name,
            how=found.how,
            reason=found.reason,
            tokens=handoff.tokens if taken is None else taken.opened.manifest.cached_tokens + 1,
            size_bytes=handoff.fetched_bytes + len((taken.signed if taken else handoff.signed).manifest),
            transfer_ms=phases.ask_ms + phases.save_ms + phases.transfer_ms,
            restore_ms=phases.decode_ms + phases.prefill_ms,
            snapshot=identifier,
            way=way,
            options=handoff.said_options() if beside else [],
            phases=phases,
            logits=handoff.first_step.logits if handoff.first_step else "",
            logits_kl=handoff.first_step.kl if handoff.first_step else None,
            fidelity=fidelity_of(taken.opened.manifest) if taken is not None else None,
        )

    # --- after the answer -----------------------------------------------------------------------------------

    def _keep(
        self, handoff: Handoff, signed: SignedManifest, identifier: str, landing: Any, lock: contextlib.ExitStack
    ) -> None:
        """Put what was fetched into the store for good: its chunks synced, then its manifest."""
        try:
            with lock:
                if landing is not None:
                    landing.sync()
                if handoff.ask.holder != self._node:
                    self._store.put_manifest(self._moved(signed, identifier, handoff.ask.holder))
        except MindstreamError as error:
            self._bus.counters.add("failed.snapshot_kept")
            self._bus.events.report(
                "snapshot-not-kept", "warning", f"snapshot {identifier[:12]} goes on here, but is not kept: {error}"
            )
        self._book.save_now_and_then()

    def _moved(self, signed: SignedManifest, identifier: str, holder: str) -> SignedManifest:
        """As this node keeps it: with what the node here says of its way."""
        try:
            chain = add_statement(
                self._context.identity, signed.provenance, bytes.fromhex(identifier), "moved", {"from": holder}
            )
        except MalformedMessage as error:
            self._bus.counters.add("dropped.statement")
            log.warning("snapshot %s: %s", identifier[:12], error)
            return signed
        return msgspec.structs.replace(signed, provenance=chain)


def _let_go(taking: Future[Taken]) -> None:
    """Close a cache that was put together and not taken in."""
    if not taking.cancelled() and taking.exception() is None:
        cache = taking.result().found.cache
        if cache is not None:
            cache.close()


def _kv_bytes(engine: Engine, opened: Opened) -> int:
    return engine.spec.kv_bytes_per_token * opened.manifest.cached_tokens + engine.spec.state_bytes
