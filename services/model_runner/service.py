"""The model runner: conversations with a local model, and snapshots of them that other nodes go on from.

It hears asks to generate, cancel, save and resume, and pulls of the snapshots and built models it holds. It says tokens
as they are generated, the end of each run, and the snapshots it has saved. All work on the model is the worker's;
fetching a snapshot from another node has a thread of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from edge.blobs import BlobSender, Held
from edge.bus import Deferred
from edge.db import open_database
from edge.mailbox import Mailbox
from edge.model_registry import default_cache_folder
from edge.model_share import BuiltShelf
from edge.models import Hold
from edge.power import Meter, find_meter, visible_gpu
from edge.service import Context, Service, hears
from edge.snapshot_store import SnapshotStore
from edge.thermal import Thermometer
from protocol.codec import Received
from protocol.errors import (
    MindstreamError,
    from_wire,
)
from protocol.manifest import SignedManifest, SnapshotManifest, open_manifest
from protocol.messages import (
    BlobPull,
    BlobPulling,
    GroupKeyAsk,
    GroupKeys,
    HandoffOfferAsk,
    LinkProbe,
    LinkProbed,
    ModelBasisAsk,
    ModelBuiltAsk,
    ModelCancel,
    ModelCancelled,
    ModelCertify,
    ModelEmbed,
    ModelGenerate,
    ModelResume,
    ModelSnapshot,
    ModelStep,
    PoolEntriesAsk,
    PoolHave,
    PoolWitness,
    RunDone,
    RunToken,
    SnapshotManifestAsk,
    SnapshotProgress,
    SnapshotSaved,
    SnapshotTimeline,
    SnapshotTimelineAsk,
    SnapshotTranscode,
    VariantCertificateAsk,
)
from protocol.sharing import share
from protocol.variants import SignedVariantCertificate
from services.model_runner import engines
from services.model_runner.answers import Run
from services.model_runner.bases import find_basis
from services.model_runner.basis_sharing import BasisFetcher, BasisShelf
from services.model_runner.checkpoints import Checkpoints
from services.model_runner.codecs.basis import Basis
from services.model_runner.conversations import CONVERSATIONS, Conversations, Evicted
from services.model_runner.cost_book import CostBook
from services.model_runner.embedding import Embeddings
from services.model_runner.engine import Engine, ModelSpec
from services.model_runner.heat import HeatWatch
from services.model_runner.memory import MIB, free_memory, kv_budget
from services.model_runner.offering import Offering
from services.model_runner.parking import Parking
from services.model_runner.pool import Pool
from services.model_runner.resuming import Resuming
from services.model_runner.rounds import Loaded, Rounds
from services.model_runner.saving import Saving
from services.model_runner.saying import Sayer
from services.model_runner.stepping import Stepping
from services.model_runner.timeline import Timeline
from services.model_runner.transcoding import Transcoding
from services.model_runner.variant_use import Variants
from services.model_runner.worker import Worker

log = logging.getLogger(__name__)

EVICTED: dict[Evicted, str] = {
    "parked": "its KV cache is parked on the disk",
    "tokens": "its next turn reads its tokens again",
    "gone": "it was not to be kept, and is gone",
}
ANSWERING_SHOWN = 8
"""Conversations that are being answered, named in the state."""


class ModelRunner(Service):
    """One node's model."""

    name = "model_runner"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.blob_bus = self.open_bus("blob")

        self._chosen: engines.Chosen | None = None

    def setup(self) -> None:
        self.db = open_database(self.context.data_dir / "conversations.db", schema=CONVERSATIONS)
        self.store = SnapshotStore(self.context.data_dir / "snapshots")
        self._read_manifest = lru_cache(maxsize=16)(self._open_stored)
        self.shelf = BuiltShelf(default_cache_folder(), self.context.identity)
        keyring = self.context.peers.keyring
        self.basis_shelf = BasisShelf(self.context.identity, keyring)
        self.basis_fetcher = BasisFetcher(self.bus, self.blob_bus, keyring, self.stopping)
        self.mailbox = Mailbox(self.config.bus.mailbox_mib * MIB, self.bus.counters)
        self.sender = BlobSender(self.store, self.blob_bus, self._read_manifest, self._held, self.mailbox)
        self.sayer = Sayer(lambda: self.bus.counters.add("dropped.token"))
        self.heat = HeatWatch(Thermometer(), self._heat_changed)
        self.worker = Worker(self._load, self._say_token, self._report, lambda: self.heat.throttled)
        self.embeddings = Embeddings(self.config.model)
        self.timeline = Timeline(self.store, self.context.identity, self.context.peers)
        self.saving = Saving(
            self.context,
            self.bus,
            self.worker,
            self.store,
            find_basis=self.basis_of,
            key_was_shared=self.timeline.key_was_shared,
            say_progress=self.say_progress,
        )
        self.checkpoints = Checkpoints(
            self.config.snapshot, self.context.identity, self.saving, self.timeline, self.store, self._report
        )
        self.transcoding = Transcoding(self.context, self.worker, self.store, self.saving)
        self.costs = CostBook(self.context.data_dir / "costs.msgpack")
        self.variants = Variants(self.context, self.bus, self.worker, self.config.model)
        self.resuming = Resuming(
            self.context,
            self.bus,
            self.blob_bus,
            self.worker,
            self.store,
            self.costs,
            self.stopping,
            self.mailbox,
            self.variants,
            timeline=self.timeline,
            ask_here=self._ask_here,
            find_basis=self.basis_of,
            fetch_basis=self.basis_fetcher.fetch,
            want_basis=self.basis_fetcher.want,
            say_progress=self.say_progress,
        )
        self.pool = Pool(
            self.context,
            self.bus,
            self.blob_bus,
            self.context.data_dir / "pool",
            self.config.node.folder(),
            self.costs,
            self.mailbox,
            idle=lambda: not self.worker.running,
            stopping=self.stopping,
        )
        self.offering = Offering(self.context, self.worker, self.store, self.saving, self.costs)
        self.stepping = Stepping(self.worker, self._report)
        self._digesters = ThreadPoolExecutor(1, "built model digester")
        self._readers = ThreadPoolExecutor(1, "timeline reader")

    def started(self) -> None:
        self.blob_bus.start(timeout_s=None)
        self.worker.start()
        self.pool.start()
        self.saving.start()
        if self.config.model.back_off_when_throttled:
            self.heat.start()

    def teardown(self) -> None:
        self.heat.stop()
        self.worker.stop()
        self.pool.stop()
        self.sayer.stop()
        self.embeddings.stop()
        self.resuming.stop()
        self.offering.stop()
        self.basis_fetcher.stop()
        self.saving.stop()
        self.stepping.stop()
        self.variants.stop()
        self._digesters.shutdown(wait=False, cancel_futures=True)
        self._readers.shutdown(wait=False, cancel_futures=True)
        self.sender.stop()
        self.mailbox.close()
        self.blob_bus.stop()
        self.costs.save()
        self.db.close()

    def tick(self) -> None:
        self.stepping.tick()

    def reconnected(self) -> None:
        self.pool.reconnected()

    def condition(self) -> tuple[str, str]:
        if self.worker.loaded is not None:
            return "ready", ""
        if self.worker.unavailable is not None:
            return "degraded", str(self.worker.unavailable)
        return "init", f"loading {self.config.model.name}"

    def stuck(self) -> str:
        ended = self.worker.died or self.sayer.died
        return super().stuck() or ("the model worker has ended" if ended else "")

    def details(self) -> dict[str, Any]:
        loaded, rounds = self.worker.loaded, self.worker.rounds
        embedding = {"embedding": self.embeddings.name} if self.embeddings.name else {}
        if loaded is None or rounds is None:
            return {"model": self.config.model.name, **embedding}
        usage, answering = rounds.last_usage, rounds.answering
        spec, numerics = loaded.engine.spec, loaded.engine.fingerprint
        return {
            "model": spec.name,
            "engine": numerics.engine,
            "engine_reason": self._chosen.reason if self._chosen else "",
            **({"precision": self._chosen.precision} if self._chosen and self._chosen.precision else {}),
            **({"adapter": Path(self.config.model.adapter).name} if self.config.model.adapter else {}),
            "device": numerics.device,
            "device_reason": loaded.device_reason,
            "dtype": spec.dtype,
            "dtype_reason": spec.dtype_reason,
            **embedding,
            **({"basis": basis.digest.hex()} if (basis := self.basis_of(spec)) is not None else {}),
            "queued": self.worker.queued,
            "running": len(answering),
            "batch_mean": round(rounds.totals.batch_mean, 2),
            **self._memory_details(loaded, rounds),
            "energy_sensor": loaded.meter.sensor or f"not measured: {loaded.meter.reason}",
            **self._heat_details(),
            **({"answering": answering[:ANSWERING_SHOWN]} if answering else {}),
            **({"tokens_per_s": round(usage.tokens_per_s, 1)} if usage else {}),
        }

    def basis_of(self, spec: ModelSpec, wanted: bytes = b"") -> Basis | None:
        """The model's basis for the codec transform, as far as trusted nodes signed it: see ``find_basis``."""
        return find_basis(spec, wanted, keyring=self.context.peers.keyring())

    def _heat_details(self) -> dict[str, Any]:
        heat = self.heat.last
        return {
            "throttled": self.heat.throttled,
            **({"throttled_reason": "; ".join(heat.reasons)} if self.heat.throttled and heat.reasons else {}),
            # In steps: each change of these details is said on the bus.
            **({"hottest_c": 5 * round(heat.hottest_c / 5)} if heat.hottest_c is not None else {}),
        }

    def _memory_details(self, loaded: Loaded, rounds: Rounds) -> dict[str, Any]:
        parking = loaded.conversations.parking
        parked, parked_bytes = parking.totals if parking is not None else (0, 0)
        return {
            "kv_used_mib": round(rounds.room.used_bytes / MIB, 1),
            "kv_budget_mib": round(loaded.kv_budget_bytes / MIB, 1),
            "kv_budget_reason": loaded.budget_reason,
            "parked": parked,
            "parked_mib": round(parked_bytes / MIB, 1),
            "restored": rounds.totals.restored,
            "shared_tokens": rounds.totals.shared_tokens,
            "pooled_tokens": rounds.totals.pooled_tokens,
            **self.pool.details(),
        }

    def _load(self) -> Loaded:
        """Choose an engine and load the model; what computes is imported here and not before.

        Raises ModelUnavailable.
        """
        settings = self.config.model
        chosen = engines.choose(settings, on_progress=log.info)
        log.info("%s on the %s engine from %s: %s", settings.name, chosen.engine, chosen.folder, chosen.reason)
        self._model_hold = Hold(chosen.folder)  # until this process ends
        self._chosen = chosen
        from services.model_runner.chat import ChatFormat

        engine = engines.load(chosen, settings, self.context.data_dir)
        self.pool.attach(engine)
        context = min(settings.max_context_tokens or engine.spec.context_tokens, engine.spec.context_tokens)
        conversations = Conversations(
            self.db,
            engine,
            in_memory=settings.conversations_in_memory,
            now_us=lambda: time.time_ns() // 1000,
            on_evict=self._evicted,
            parking=self._parking(engine),
        )
        budget = kv_budget(settings.kv_memory_mib, *free_memory(engine.fingerprint.device))
        log.info("KV caches may take %.0f MiB: %s", budget.size_bytes / MIB, budget.reason)
        chat = ChatFormat.load(chosen.folder)
        self.costs.probe_reading(engine)
        threading.Thread(target=self.costs.probe_codecs, args=(engine.spec,), name="codec probe", daemon=True).start()
        return Loaded(
            engine,
            chat,
            conversations,
            context,
            chosen.device.reason,
            max_batch=settings.max_batch,
            kv_budget_bytes=budget.size_bytes,
            budget_reason=budget.reason,
            meter=self._meter(engine, chosen.device.value),
            watch=self.checkpoints.watch,
            on_chunk=self.costs.read,
            pool=self.pool,
        )

    def _meter(self, engine: Engine, device: str) -> Meter:
        """What measures the energy of ``engine``'s device."""
        _, _, index = device.partition(":")
        meter = find_meter(gpu=None if engine.fingerprint.device == "cpu" else visible_gpu(int(index or 0)))
        log.info("energy: %s", meter.sensor or f"not measured: {meter.reason}")
        return meter

    def _parking(self, engine: Engine) -> Parking:
        def dropped(name: str, reason: str) -> None:
            self._report(
                "dropped.parked", f"the parked KV cache of {name} is gone, its tokens are read again: {reason}"
            )

        folder, most_bytes = self.context.data_dir / "parked", self.config.model.parked_mib * MIB
        return Parking(folder, engine, identity=self.context.identity, most_bytes=most_bytes, on_drop=dropped)

    def _evicted(self, name: str, left: Evicted) -> None:
        self._report(f"evicted.{left}", f"conversation {name} left the memory; {EVICTED[left]}")

    def _heat_changed(self, throttled: bool, why: str) -> None:
        """On the watch's thread, once a change."""
        if throttled:
            self._report("throttled.begun", f"this device is slowed down: background work gets a tenth of it: {why}")
        else:
            self._report("resumed.background", "it is slowed down no longer: background work goes on as before")
        self.worker.wake()

    def _report(self, counter: str, text: str) -> None:
        """Count what happened to a run or a conversation, and say it; on any thread."""
        self.bus.counters.add(counter)
        if text:
            severity = "info" if counter.startswith(("evicted", "resumed")) else "warning"
            # Publishing may have to wait for the broker, and the engine must not.
            self.sayer.say(lambda: self.bus.events.report(counter.replace(".", "-"), severity, text), droppable=False)

    # --- answering ------------------------------------------------------------------------------------------

    @hears(ModelGenerate)
    def generate(self, message: Received) -> Deferred:
        """Queue a run; answered at its end, its tokens being said meanwhile."""
        answer = Deferred()
        loaded = self.worker.loaded
        if message.data.json_schema and loaded is not None:
            loaded.grammars.warm(message.data.json_schema)
        identifier = message.data.run or message.id
        run = Run(
            identifier,
            f"{message.node}/{message.id}",
            message.data,
            Future(),
            asker=message.source,
            expires_s=message.received_s + message.ttl_ms / 1000,
        )
        run.done.add_done_callback(lambda done: self._end_of_run(identifier, done, answer))
        self.worker.submit(run)
        return answer

    @hears(ModelCancel)
    def cancel(self, message: Received) -> ModelCancelled:
        """Stop a run after its current token; or a save or a transcode, of which nothing is kept."""
        run = message.data.run
        return ModelCancelled(found=self.worker.cancel(run) or self.saving.cancel(run))

    def _say_token(self, run: str, token: RunToken) -> None:
        """On the worker's thread."""
        self.sayer.say(lambda: self._publish_token(run, token), droppable=True)

    def _publish_token(self, run: str, token: RunToken) -> None:
        try:
            self.bus.say(token, run=run, timeout_s=2.0)
        except MindstreamError as error:
            # The whole text stands in the run's end.
            self.bus.counters.add("dropped.token")
            log.warning("a token of run %s could not be said: %s", run, error)

    def say_progress(self, run: str, said: SnapshotProgress) -> None:
        """Of a save or a fetch; on any thread."""
        self.sayer.say(lambda: self._publish_progress(run, said), droppable=True)

    def _publish_progress(self, run: str, said: SnapshotProgress) -> None:
        with contextlib.suppress(MindstreamError):
            self.bus.say(said, run=run, timeout_s=2.0)

    def _end_of_run(self, identifier: str, done: Future[RunDone], answer: Deferred) -> None:
        """On the worker's thread: the end is said after the run's tokens."""
        self.sayer.say(lambda: self._publish_end(identifier, done, answer), droppable=False)

    def _publish_end(self, identifier: str, done: Future[RunDone], answer: Deferred) -> None:
        error = done.exception()
        if error is not None:
            answer.set_exception(error)
            return
        result = done.result()
        self.bus.counters.add(f"runs.{result.finish_reason}")
        try:
            self.bus.say(result, run=identifier, timeout_s=2.0)
        except MindstreamError as said:
            self.bus.counters.add("dropped.done")
            log.warning("the end of run %s could not be said: %s", identifier, said)
        if result.error is not None:
            answer.set_exception(from_wire(result.error))
        else:
            answer.set_result(result)

    @hears(ModelEmbed)
    def embed(self, message: Received) -> Deferred:
        """Make vectors of texts, on a thread of its own: no token waits for it."""
        return _deferred(self.embeddings.embed(message.data))

    # --- snapshots ------------------------------------------------------------------------------------------

    @hears(ModelSnapshot)
    def save(self, message: Received) -> Deferred:
        """Save a conversation, between two tokens if it is being answered; answered when it is on disk."""
        return _deferred(self._ask_here(message.data))

    def _ask_here(self, ask: Any) -> Future[Any]:
        """What handing over asks of a holder, asked of this node."""
        if isinstance(ask, HandoffOfferAsk):
            return self.offering.offer(ask, self.context.identity.node, time.monotonic())
        if isinstance(ask, SnapshotTimelineAsk):
            return self._points(ask)
        saving = self.saving.save(ask)
        saving.add_done_callback(self._note_saved)
        return saving

    def _note_saved(self, saving: Future[SnapshotSaved]) -> None:
        """How long it took, for handoffs to come; a self-test is no part of those."""
        loaded = self.worker.loaded
        if loaded is None or saving.cancelled() or saving.exception() is not None:
            return
        saved = saving.result()
        if not (saved.kept_tokens or (saved.fidelity is not None and saved.fidelity.measured)):
            kv_bytes = loaded.engine.spec.kv_bytes_per_token * (saved.tokens - 1)
            self.costs.saved(saved.codec, kv_bytes, saved.took_ms / 1000)

    @hears(SnapshotTranscode)
    def transcode(self, message: Received) -> Deferred:
        """Make another snapshot of one that is here; answered when it is on disk."""
        return _deferred(self.transcoding.transcode(message.data))

    @hears(SnapshotTimelineAsk)
    def points(self, message: Received) -> Deferred:
        """The points that a conversation can return to, on a thread of its own: it reads the disk, and waits for no
        save."""
        return _deferred(self._points(message.data))

    def _points(self, ask: SnapshotTimelineAsk) -> Future[SnapshotTimeline]:
        def read() -> SnapshotTimeline:
            if self.worker.loaded is None:
                return self.timeline.ask(ask.conversation, None)
            live = self.worker.between_tokens(lambda loaded: loaded.conversations.live(ask.conversation)).result()
            parent = live.parent.hex() if live is not None else ""
            return self.timeline.ask(ask.conversation, self.worker.loaded.chat.decode, parent)

        return self._readers.submit(read)

    @hears(ModelResume)
    def resume(self, message: Received) -> Deferred:
        """Fetch a snapshot and make a conversation of it; answered when its next token can be generated."""
        if self.worker.unavailable is not None:
            raise self.worker.unavailable.with_traceback(None)
        return _deferred(self.resuming.resume(message))

    @hears(ModelStep)
    def step(self, message: Received) -> Deferred:
        """Move a conversation by hand, between two tokens of the others; answered with what could come next."""
        return _deferred(self.stepping.step(message.data))

    @hears(HandoffOfferAsk)
    def offer(self, message: Received) -> Deferred:
        """What this node could send of a conversation, and its token ids."""
        return _deferred(self.offering.offer(message.data, message.node, message.received_s))

    @hears(LinkProbe)
    def probe(self, message: Received) -> LinkProbed:
        """Random bytes, which no link compresses: how fast they come says how fast a snapshot would."""
        return LinkProbed(os.urandom(message.data.size_bytes))

    @hears(SnapshotManifestAsk)
    def manifest(self, message: Received) -> SignedManifest:
        """The signed manifest of a snapshot that this node holds, its key wrapped for the asker where that may be."""
        ask: SnapshotManifestAsk = message.data
        if ask.sealing_key:
            self.context.peers.learn_sealing_key(message.node, ask.sealing_key)
        with self.store.writing():
            signed = self.store.manifest(ask.snapshot)
            shared = share(signed, message.node, self.context.identity, self.context.peers.keyring())
            if shared.kept is not None:
                self.store.put_manifest(shared.kept)
        return shared.sent

    @hears(ModelBuiltAsk)
    def built(self, message: Received) -> Deferred:
        """The signed manifest of a built model in this node's cache, on a thread of its own: its files may be read."""
        ask: ModelBuiltAsk = message.data
        return _deferred(self._digesters.submit(self.shelf.manifest, ask.name, ask.precision, ask.provider))

    @hears(ModelBasisAsk)
    def basis(self, message: Received) -> Deferred:
        """The signed manifest of a basis in this node's cache, on that thread too."""
        return _deferred(self._digesters.submit(self.basis_shelf.manifest, message.data))

    @hears(VariantCertificateAsk)
    def variant(self, message: Received) -> SignedVariantCertificate:
        """This node's certificate of what KV of one variant does on another."""
        return self.variants.give(message.data)

    @hears(ModelCertify)
    def certify(self, message: Received) -> Deferred:
        """Measure what KV of another variant does on this node's model; minutes, in a process of its own."""
        return _deferred(self.variants.certify(message.data))

    @hears(BlobPull)
    def pull(self, message: Received) -> BlobPulling:
        """Send chunks of a snapshot, a built model or a basis that this node holds."""
        return self.sender.pull(message)

    # --- the pool -------------------------------------------------------------------------------------------

    @hears(PoolHave)
    def pool_have(self, message: Received) -> None:
        """Note which blocks another node holds."""
        self.pool.peers.hear(message)

    @hears(PoolWitness)
    def pool_witness(self, message: Received) -> None:
        """Note whether another node agrees with an entry."""
        self.pool.hear_witness(message)

    @hears(GroupKeyAsk)
    def group_key(self, message: Received) -> GroupKeys:
        """The site's group key, for a node that this one trusts."""
        return self.pool.peers.grant(message)

    @hears(PoolEntriesAsk)
    def pool_entries(self, message: Received) -> Deferred:
        """Entries that this node holds; their chunks are then pulled."""
        return _deferred(self.pool.answer_entries(message))

    def _held(self, identifier: str) -> Held | None:
        """What is pulled from this node beside snapshots."""
        bundle = self.pool.peers.bundle(identifier)
        return bundle or self.shelf.held(identifier) or self.basis_shelf.held(identifier)

    def _open_stored(self, identifier: str) -> SnapshotManifest:
        return open_manifest(self.store.manifest(identifier), self.context.peers.keyring())


def _deferred(work: Future[Any]) -> Deferred:
    """The outcome of ``work`` as an answer."""
    answer = Deferred()

    def copy(done: Future[Any]) -> None:
        error = done.exception()
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(done.result())

    work.add_done_callback(copy)
    return answer
