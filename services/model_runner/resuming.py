"""Resuming: a snapshot, from this node's disk or from the node that holds it, to a conversation that goes on here.

What is predicted to be the quickest way is taken (``weighing``): the KV by the rung that suits the link, or the token
ids, read again. The engine is asked first whether it can take the KV in, and only then are chunks fetched. They are
decrypted and decoded while later ones come (``landing``). Where either may be quicker, and when chunks come so slowly
that reading again would be, that goes on beside them, and the first to be done wins. Where the chunks do not hold what
they should, the tokens are read again as well, and the answer says why.
"""

from __future__ import annotations

import contextlib
import logging
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
from protocol.errors import MalformedMessage, MindstreamError, ModelError, SnapshotRefused
from protocol.manifest import SignedManifest
from protocol.messages import ModelResumed
from protocol.provenance import add_statement
from protocol.sharing import Opened
from services.model_runner import costs, first_step, snapshot
from services.model_runner.conversations import Conversation
from services.model_runner.cost_book import CostBook
from services.model_runner.engine import Engine, ModelSpec
from services.model_runner.first_step import FirstStep
from services.model_runner.handoff import Handoff, Unusable, since_ms
from services.model_runner.reading import Reading
from services.model_runner.rounds import Loaded
from services.model_runner.saving import FindBasis, extra_of, fidelity_of, read_extra
from services.model_runner.taking import AskHere, FetchBasis, Taken, Taking, no_basis
from services.model_runner.telling import Say
from services.model_runner.timeline import Timeline
from services.model_runner.variant_use import Variants
from services.model_runner.weighing import Weighing
from services.model_runner.worker import Worker

log = logging.getLogger(__name__)

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
        ask_here: has this node answer what it asks itself.
        find_basis: for the rung ``transform``.
        fetch_basis: from a holder, now: where a way is the quickest all the same.
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
        ask_here: AskHere,
        find_basis: FindBasis = lambda _spec, _wanted: None,
        fetch_basis: FetchBasis = no_basis,
        want_basis: Callable[[ModelSpec, str, bytes], None] = lambda _spec, _holder, _wanted: None,
        say_progress: Say = lambda _run, _said: None,
    ) -> None:
        self._context = context
        self._node = context.identity.node
        self._bus = bus
        self._worker = worker
        self._store = store
        self._book = book
        self._taking = Taking(
            context,
            bus,
            blob_bus,
            worker,
            store,
            book,
            stopping,
            mailbox,
            ask_here=ask_here,
            find_basis=find_basis,
            fetch_basis=fetch_basis,
            say_progress=say_progress,
        )
        self._weighing = Weighing(
            context, bus, worker, store, book, self._taking, variants, timeline, find_basis, want_basis
        )
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
        handoff = self._weighing.handoff(message)
        try:
            self._weighing.decide(handoff, lambda: self._begin_reading(handoff))
            with handoff.lock:
                if handoff.best.codec == costs.TOKENS:
                    return self._read_again(handoff, handoff.kv_refused or handoff.best.why_not)
                return self._load(handoff)
        finally:
            if handoff.reading is not None:
                handoff.reading.let_go()

    # --- carrying it out ------------------------------------------------------------------------------------

    def _load(self, handoff: Handoff) -> ModelResumed:
        """Take the KV; read again beside it where either may be first, and in its place when it fails."""
        if handoff.best.beside and not self._worker.running:
            self._begin_reading(handoff)
        elif handoff.reading is not None:
            handoff.reading.let_go()
            handoff.reading = None
        taking: Future[Taken] = self._ways.submit(self._taking.take, handoff)
        reason, used, may_read = "", False, handoff.ask.way == "auto"
        try:
            while True:
                running: list[Future[Any]] = [taking, *([handoff.reading.outcome] if handoff.reading else [])]
                wait([each for each in running if not each.done()], LOOK_EVERY_S, FIRST_COMPLETED)
                if taking.done() and not reason:
                    try:
                        answer = self._take_in(handoff, taking.result())
                        used = True
                        return answer
                    except MindstreamError as error:
                        reason = self._why_not_taken(handoff, error)
                    except Unusable as error:
                        reason = str(error)
                if handoff.reading is not None and handoff.reading.outcome.done():
                    try:
                        return self._read_first(handoff, handoff.reading, reason)
                    except ModelError as error:
                        if reason:
                            raise
                        # There may be no room for two caches: the KV is still on its way.
                        log.info("%s was not read again beside its KV: %s", handoff.name, error)
                        handoff.reading, may_read = None, False
                if handoff.reading is None and (reason or (may_read and handoff.should_read_too())):
                    self._begin_reading(handoff)
        finally:
            handoff.outrun.set()
            if not used:
                taking.add_done_callback(_let_go)

    def _begin_reading(self, handoff: Handoff) -> None:
        """Read its tokens again on another thread, unless that is being done."""
        if handoff.reading is None:
            manifest, private = handoff.opened.manifest, handoff.opened.private
            found = snapshot.read_tokens(handoff.engine, manifest, private, "reading again was quicker")
            handoff.reading = Reading(self._worker, found, self._ways)

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

    def _read_first(self, handoff: Handoff, reading: Reading, reason: str) -> ModelResumed:
        found = reading.outcome.result()
        if not reason:
            self._bus.counters.add("handoffs.read_first")
            reason = (
                f"reading again was quicker: of its KV {handoff.here_bytes / 1e6:,.1f} of "
                f"{(handoff.total_bytes or handoff.best.size_bytes) / 1e6:,.1f} MB were here by then"
            )
        return self._go_on_reading(handoff, reading, found._replace(reason=reason))

    def _read_again(self, handoff: Handoff, reason: str) -> ModelResumed:
        self._begin_reading(handoff)
        assert handoff.reading is not None
        found = handoff.reading.outcome.result()
        reason = reason or "reading again was predicted to be quicker"
        return self._go_on_reading(handoff, handoff.reading, found._replace(reason=reason))

    def _go_on_reading(self, handoff: Handoff, reading: Reading, found: snapshot.Unpacked) -> ModelResumed:
        handoff.phases.prefill_ms = reading.took_s * 1000
        self._worker.between_tokens(
            lambda loaded: self._hold(loaded, handoff, handoff.opened, handoff.identifier, found, reading)
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
            return self._hold(loaded, handoff, opened, identifier, resumed)

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
        reading: Reading | None = None,
    ) -> snapshot.Unpacked:
        """Make a conversation of it. On the worker's thread."""
        self._weighing.check_not_running(handoff.name)  # a run may have begun while the chunks were on their way
        messages, turn_start = extra_of(opened.manifest, opened.private)
        parent = bytes.fromhex(identifier)
        conversation = Conversation(
            handoff.name,
            resumed.state,
            messages,
            turn_start,
            key=opened.key,
            parent=parent,
            salient=read_extra(opened.manifest, opened.private).salient,
        )
        conversation.whole_chunks = reading.whole_chunks if reading is not None else []
        conversation.keep = handoff.ask.keep
        loaded.conversations.hold(conversation)
        if reading is not None:
            handoff.reading = None  # its cache is the conversation's
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
        weighed = handoff.ask.explain and (handoff.ask.way == "auto" or not handoff.named)
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
            options=handoff.said_options() if weighed else [],
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
