"""Measures a pair of variants of a model, and keeps the signed certificate: ``mindstream models pair``, and on request.

One variant is loaded at a time: the source reads the texts and is let go of, then the target is measured. The model
runner does it in a process of its own (``python -m services.model_runner.pairing ASK``, the ask as JSON), whose memory
is given back at its end.
"""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path

import msgspec

from edge.config import ModelConfig
from edge.hardware import describe
from edge.keys import Peers, load_or_create_identity
from edge.model_cards import PRECISIONS
from edge.model_pair import PairAsk, PairSaid
from protocol.errors import ConfigError, MindstreamError, ModelError
from protocol.identity import Identity
from protocol.variants import LayerEffect, Reuse, VariantCertificate, seal_variant
from services.model_runner import engines
from services.model_runner.codecs.ladder import Asked
from services.model_runner.engine import Engine
from services.model_runner.variant_store import FOLDER, VariantStore
from services.model_runner.variants import (
    MOST_TEXTS,
    PREFIX_TOKENS,
    TEST_TOKENS,
    Say,
    certify,
    sample,
    variant_of,
    windows_of,
)

CONFIGURED = "own"
"""Names the variant that is configured."""


def variant_settings(settings: ModelConfig, name: str) -> ModelConfig:
    """``settings`` for one variant of the model.

    Args:
        name: ``own`` (as configured), ``transformers``, a precision of a built model, or the folder of an adapter.

    Raises ConfigError for what is none of these.
    """
    if name == CONFIGURED:
        return settings
    plain = msgspec.structs.replace(settings, engine="transformers", precision="auto", adapter="")
    if name == "transformers":
        return plain
    if name in PRECISIONS:
        return msgspec.structs.replace(plain, engine="onnx", precision=name)
    if Path(name).expanduser().is_dir():
        return msgspec.structs.replace(plain, adapter=name)
    raise ConfigError(
        f"choosing a variant: {name!r} is neither {CONFIGURED}, transformers, a precision ({', '.join(PRECISIONS)}), "
        "nor the folder of an adapter",
        field="variant",
        reason="unknown variant",
    )


def make(
    settings: ModelConfig,
    source: str,
    target: str,
    identity: Identity,
    store: VariantStore,
    *,
    say: Say = lambda _line: None,
    cache_dir: Path | None = None,
) -> VariantCertificate:
    """Measure what KV of ``source`` does on ``target``, both named as for ``variant_settings``; sign it and keep it.

    Raises ConfigError, ModelUnavailable, ModelError and StorageError.
    """
    from services.model_runner.chat import ChatFormat
    from services.model_runner.codecs.texts import calibration_texts

    def load(name: str) -> tuple[Engine, engines.Chosen]:
        wanted = variant_settings(settings, name)
        chosen = engines.choose(wanted, hardware=describe(), on_progress=say)
        say(f"loading {name} from {chosen.folder.name}")
        return engines.load(chosen, wanted, cache_dir), chosen

    # Refused before anything is loaded, where that can be said.
    if variant_settings(settings, target) == variant_settings(settings, source):
        raise _one_variant(source, target, source)
    engine, chosen = load(source)
    chat = ChatFormat.load(chosen.folder)
    texts = [chat.encode(text, special=False) for text in calibration_texts()]
    longest = engine.spec.context_tokens - TEST_TOKENS
    windows = windows_of(texts, min(PREFIX_TOKENS, longest), TEST_TOKENS, MOST_TEXTS)
    sampled = sample(engine, windows, min(PREFIX_TOKENS, longest), say)
    del engine
    gc.collect()
    engine, _ = load(target)
    if sampled.variant == variant_of(engine):
        raise _one_variant(source, target, str(sampled.variant))
    certificate = certify(sampled, engine, identity.node, say)
    store.put(seal_variant(identity, certificate))
    return certificate


def _one_variant(source: str, target: str, variant: str) -> ModelError:
    return ModelError(
        f"measuring {source} on {target}: they are one variant, {variant}",
        hint="name two: precisions, engines, or adapters of the model",
        reason="one variant",
    )


class Made(msgspec.Struct):
    """A certificate, for people and scripts."""

    source: str
    target: str
    texts: int
    tested_tokens: int
    layers: list[LayerEffect]
    reuses: list[Reuse]
    verdict: str
    """What may be kept for the usual fidelity."""
    took_s: float


def measure(
    settings: ModelConfig,
    source: str,
    target: str,
    identity: Identity,
    peers: Peers,
    node_folder: Path,
    *,
    say: Say = lambda _line: None,
) -> Made:
    """``make``, for the command line. ``node_folder`` is the node's data folder."""
    started_s = time.monotonic()
    folder = node_folder / "model_runner"
    found = make(
        settings, source, target, identity, VariantStore(folder / FOLDER, peers.keyring), say=say, cache_dir=folder
    )
    best, count = found.least(Asked().most_kl, Asked().least_top1, len(found.layers)), len(found.layers)
    if best is None:
        verdict = "nothing may be kept"
    elif best.computed_layers:
        verdict = f"the first {best.computed_layers} of {count} layers are computed again, the others kept"
    elif best.recent_tokens:
        verdict = f"the last {best.recent_tokens} positions are computed again, the others kept"
    else:
        verdict = "all may be kept"
    return Made(
        str(found.source),
        str(found.target),
        found.texts,
        found.tested_tokens,
        found.layers,
        found.reuses,
        verdict,
        time.monotonic() - started_s,
    )


def main() -> int:
    """The child. Returns its exit code."""
    out = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is none of its lines

    def write(said: PairSaid) -> None:
        out.write(msgspec.json.encode(said).decode() + "\n")
        out.flush()

    ask = msgspec.json.decode(sys.argv[1], type=PairAsk)
    data_dir = Path(ask.data_dir)
    try:
        identity = load_or_create_identity(data_dir, ask.node)
        store = VariantStore(data_dir / "model_runner" / FOLDER, Peers(data_dir, identity).keyring)
        make(
            ask.model,
            ask.source,
            ask.target,
            identity,
            store,
            say=lambda line: write(PairSaid(doing=line)),
            cache_dir=data_dir / "model_runner",
        )
    except MindstreamError as error:
        write(PairSaid(refused=str(error)))
        return 1
    write(PairSaid(done=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
