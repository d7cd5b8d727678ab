"""`mindstream snapshot calibrate`: make a model's basis with its own weights, sign it, and keep it.

Named by the command line, whose room lies below this one; needs torch.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edge.bus import Bus
from edge.config import ModelConfig
from edge.models import ensure
from protocol.basis_manifest import sign_basis
from protocol.errors import ModelUnavailable
from protocol.identity import Identity, Keyring, digest
from services.model_runner import engines
from services.model_runner.bases import keep_basis
from services.model_runner.basis_sharing import ask_for, fetch_basis
from services.model_runner.codecs.basis import file_of
from services.model_runner.digests import shared_digests

if TYPE_CHECKING:
    from services.model_runner.chat import ChatFormat
    from services.model_runner.transformers_engine import TransformersEngine

Say = Callable[[str], None]


class LevelMade(msgspec.Struct, frozen=True):
    """What a level of a basis does, on the texts that calibration held back."""

    name: str
    mean_kl: float
    top1: float
    ratio: float


class BasisMade(msgspec.Struct, frozen=True):
    """A basis that is here now."""

    path: Path
    model: str
    basis: str
    """BLAKE3 of the file, in hex."""
    size_bytes: int
    tokens: int
    levels: list[LevelMade]
    took_s: float


def make(settings: ModelConfig, identity: Identity, *, say: Say, cache_dir: Path | None = None) -> BasisMade:
    """Calibrate the model that ``settings`` name; some minutes.

    Raises ModelUnavailable when it is not here, torch is not installed, or its keys or layers cannot be treated so.
    """
    if any(importlib.util.find_spec(package) is None for package in ("torch", "transformers")):
        raise ModelUnavailable(
            f"calibrating {settings.name}: torch and transformers are not installed",
            hint="pip install 'mindstream[model]', or fetch it: mindstream snapshot calibrate --from NODE",
            reason="packages missing",
        )
    started_s = time.monotonic()
    files = ensure(settings.name, on_progress=say, folders=[Path(folder) for folder in settings.folders])
    say(f"loading {files.folder.name}")
    from torch.cuda import is_available

    from services.model_runner.chat import ChatFormat
    from services.model_runner.products import has_bf16_products
    from services.model_runner.transformers_engine import TransformersEngine

    cuda = settings.device.startswith("cuda") or (settings.device == "auto" and is_available())
    engine = TransformersEngine.load(
        files.folder,
        name=settings.name,
        device=settings.device,
        # Without bfloat16 units a CPU is twice as fast so, and what is found serves every dtype.
        dtype="auto" if cuda or has_bf16_products() else "float32",
        threads=settings.threads,
        cache_dir=cache_dir,
    )
    data = calibrated(engine, ChatFormat.load(files.folder), say=say)
    path = keep_basis(sign_basis(identity, engine.spec.name, engine.spec.digests, data), data)
    return _made(path, data, time.monotonic() - started_s)


def calibrated(
    engine: TransformersEngine, chat: ChatFormat, most_texts: int = 99, say: Say = lambda _line: None
) -> bytes:
    """The bytes of a basis from ``calibration_texts``; some minutes."""
    from services.model_runner.codecs.calibrate import calibrate
    from services.model_runner.codecs.texts import TEXT_TOKENS, calibration_texts

    texts = [chat.encode(text, special=False)[:TEXT_TOKENS] for text in calibration_texts()[:most_texts]]
    return calibrate(engine, texts, say=say)


def fetch(
    settings: ModelConfig,
    bus: Bus,
    blob_bus: Bus,
    keyring: Keyring,
    holder: str,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    say: Say,
) -> BasisMade:
    """The basis of the model that ``settings`` name, from the node ``holder``.

    Raises ModelUnavailable when the model is not here; and what ``basis_sharing.fetch_basis`` raises.
    """
    started_s = time.monotonic()
    folder = engines.choose(settings, on_progress=say).folder
    ask = ask_for(shared_digests(folder), settings.name)
    found = fetch_basis(bus, blob_bus, keyring, holder, ask, on_progress=on_progress)
    return _made(found.path, found.read(), time.monotonic() - started_s)


def _made(path: Path, data: bytes, took_s: float) -> BasisMade:
    file = file_of(data)
    levels = [LevelMade(row.name, row.mean_kl, row.top1, row.ratio) for row in file.levels]
    return BasisMade(path, file.model, digest(data).hex(), len(data), file.tokens, levels, round(took_s, 1))
