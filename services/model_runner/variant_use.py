"""Certificates of variants on the bus: looked for when a snapshot is of another variant, given to who asks, and
measured on request."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from edge.bus import Bus
from edge.config import ModelConfig
from edge.model_pair import PairAsk, make_in_child
from edge.service import Context
from protocol.errors import MindstreamError, NotFound
from protocol.manifest import SnapshotManifest
from protocol.messages import ModelCertified, ModelCertify, VariantCertificateAsk
from protocol.variants import SignedVariantCertificate, Variant, VariantCertificate
from services.model_runner.codecs.ladder import Asked
from services.model_runner.engine import Engine
from services.model_runner.pairing import CONFIGURED
from services.model_runner.variant_store import FOLDER, VariantStore
from services.model_runner.variants import Permit, permit, variant_of
from services.model_runner.worker import Worker

log = logging.getLogger(__name__)

ASK_TTL_MS = 3_000
"""A resume waits no longer for a holder's certificate: then the tokens are read again."""
ASK_AGAIN_S = 600.0
"""A holder that had no certificate of a pair is asked for it again after this long."""


class Variants:
    """What this node knows of variants of its model.

    Args:
        settings: of the model.
    """

    def __init__(self, context: Context, bus: Bus, worker: Worker, settings: ModelConfig) -> None:
        self._context = context
        self._bus = bus
        self._worker = worker
        self._settings = settings
        self.store = VariantStore(context.data_dir / FOLDER, context.peers.keyring)
        self._threads = ThreadPoolExecutor(1, "variant pair")
        self._lock = threading.Lock()
        self._had_none: dict[tuple[str, Variant, Variant], float] = {}

    def stop(self) -> None:
        """Measure nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def permit(self, engine: Engine, manifest: SnapshotManifest, holder: str, asked: Asked) -> Permit | str:
        """Whether the KV of ``manifest`` may be used by ``engine``: how, or why not.

        May ask ``holder`` for its certificate of the pair: not on the worker's thread.
        """
        source, target = Variant.of(manifest.digests, manifest.fingerprint), variant_of(engine)
        if source == target:
            return "other numerics of the same variant"
        if source.digests.tokenizer != target.digests.tokenizer:
            return "another tokenizer"
        certificate = self.store.find(source, target) or self._from_holder(holder, source, target)
        return permit(certificate, source, engine, asked, manifest.cached_tokens)

    def _from_holder(self, holder: str, source: Variant, target: Variant) -> VariantCertificate | None:
        if holder == self._context.identity.node:
            return None
        key = (holder, source, target)
        with self._lock:
            if time.monotonic() < self._had_none.get(key, 0.0):
                return None
        try:
            signed: SignedVariantCertificate = self._bus.ask(
                holder, VariantCertificateAsk(source, target), ttl_ms=ASK_TTL_MS
            )
            found = self.store.put(signed)
            if (found.source, found.target) == (source, target):
                return found
            log.warning("%s sent the certificate of another pair", holder)
        except MindstreamError as error:
            log.info("no certificate of %s on %s from %s: %s", source, target, holder, error)
        with self._lock:
            self._had_none[key] = time.monotonic() + ASK_AGAIN_S
        return None

    def give(self, ask: VariantCertificateAsk) -> SignedVariantCertificate:
        """That of a pair. Raises NotFound."""
        return self.store.signed(ask.source, ask.target)

    def certify(self, ask: ModelCertify) -> Future[ModelCertified]:
        """Measure what KV of the variant that is named does on this node's model."""
        return self._threads.submit(self._certify, ask)

    def _certify(self, ask: ModelCertify) -> ModelCertified:
        started_s = time.monotonic()
        engine = self._worker.between_tokens(lambda loaded: loaded.engine).result()
        before = {(each.source, each.created_us) for each in self.store.all()}
        data_dir = Path(self._context.data_dir).parent
        node = self._context.identity.node
        make_in_child(PairAsk(node, str(data_dir), self._settings, ask.source, CONFIGURED), log.info)
        target = variant_of(engine)
        for found in self.store.all():
            if found.target == target and (found.source, found.created_us) not in before:
                return certified(found, (time.monotonic() - started_s) * 1000)
        raise NotFound(
            f"measuring {ask.source}: the child kept no certificate for the model that runs here, {target}",
            hint="the configuration has changed since the model was loaded: start the model runner again",
            field="source",
            reason="no certificate",
        )


def certified(found: VariantCertificate, took_ms: float, asked: Asked | None = None) -> ModelCertified:
    """What is said of a certificate; ``asked`` is ``Asked()`` by default."""
    wanted = asked or Asked()
    best = found.least(wanted.most_kl, wanted.least_top1, len(found.layers))
    return ModelCertified(
        source=str(found.source),
        target=str(found.target),
        computed_layers=None if best is None else best.computed_layers,
        recent_tokens=0 if best is None else best.recent_tokens,
        layers=len(found.layers),
        mean_kl=(best or found.reuses[0]).mean_kl,
        worst_kl=(best or found.reuses[0]).worst_kl,
        top1=(best or found.reuses[0]).top1,
        took_ms=took_ms,
    )
