"""Fetching a built model from another node, over the bus: for a node that cannot build, being without torch.

The holder's model runner sends a signed manifest, and then chunks as it sends a snapshot's (edge/blobs.py). They are
written into a folder whose name begins with a dot, each once it is verified; stopped half-way, the next fetch goes on
from there. The folder becomes a built model when every file, the card and the graph are what they should be.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from edge.blobs import BlobReceiver
from edge.bus import Bus
from edge.download import RESERVE_BYTES
from edge.files import storage_errors
from edge.mailbox import Mailbox
from edge.model_cards import (
    ANOTHER_VERSION,
    BUILD,
    CARD_NAME,
    GRAPH_NAME,
    Built,
    Card,
    built_name,
    check_built_files,
    is_built_name,
    read_card,
)
from edge.model_registry import KnownModel, Licence, ModelFile, known_models
from edge.models import Progress, model_lock, publish, sha256_of
from edge.process import free_bytes
from protocol.built_manifest import BuiltManifest, SignedBuiltManifest, built_id, chunk_places, open_built
from protocol.errors import (
    BadSignature,
    BlobError,
    ConfigError,
    MindstreamError,
    ModelUnavailable,
    NotFound,
    StorageError,
)
from protocol.identity import Keyring
from protocol.layout import ChunkRef
from protocol.manifest import verify_chunk
from protocol.messages import ModelBuiltAsk

GRAPH_MODULE = "services.model_runner.onnx_graph"
"""Reads a graph; named, as its room lies above this one."""
MANIFEST_TTL_MS = 300_000
"""The holder may have to read the files first: a second for each GB, and more from a card."""
TRANSFER_TIMEOUT_S = 6 * 3600.0


class Fetched(msgspec.Struct, frozen=True):
    """A built model that is here now."""

    folder: Path
    card: Card
    fetched_bytes: int
    """That crossed the bus this time: 0 when it was here."""


class PartialModel:
    """A built model's files as far as they are here. See edge.blobs.ChunkTarget.

    Args:
        folder: made when absent; files that the manifest does not name are removed from it.

    Raises StorageError.
    """

    def __init__(self, folder: Path, manifest: BuiltManifest) -> None:
        places = chunk_places(manifest)
        self.chunks = [ref for ref, _, _ in places]
        self._folder = folder
        self._sizes = {file.name: file.size_bytes for file in manifest.files}
        # One chunk may stand in several places: all of them are written, and all must be right.
        self._places: dict[bytes, list[tuple[str, int]]] = {}
        for ref, name, offset in places:
            self._places.setdefault(ref.digest, []).append((name, offset))
        with storage_errors(f"making {folder}"):
            folder.mkdir(exist_ok=True)
            for path in folder.iterdir():
                if path.name not in self._sizes or path.is_symlink() or not path.is_file():
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        wrong = {ref.digest for ref, name, offset in places if not self._is_right(ref, name, offset)}
        self._here = self._places.keys() - wrong

    @property
    def here_bytes(self) -> int:
        """What needs not be fetched."""
        return sum(ref.size_bytes for ref in self.chunks if self.has(ref))

    def has(self, ref: ChunkRef) -> bool:
        """Whether a chunk is here, verified."""
        return ref.digest in self._here

    def put_chunk(self, ref: ChunkRef, data: bytes | memoryview) -> None:
        """Write a chunk that was verified. Raises StorageError."""
        for name, offset in self._places[ref.digest]:
            path = self._folder / name
            with storage_errors(f"writing {path}"), _opened(path) as descriptor:
                view, at = memoryview(data), offset
                while view:
                    written = os.pwrite(descriptor, view, at)
                    view, at = view[written:], at + written
        self._here.add(ref.digest)

    def finish(self) -> None:
        """Give every file its size: one from an earlier fetch may be longer, an empty one not there."""
        for name, size_bytes in self._sizes.items():
            with storage_errors(f"writing {self._folder / name}"), _opened(self._folder / name) as descriptor:
                os.ftruncate(descriptor, size_bytes)

    def _is_right(self, ref: ChunkRef, name: str, offset: int) -> bool:
        try:
            with (self._folder / name).open("rb") as stream:
                stream.seek(offset)
                verify_chunk(ref, stream.read(ref.size_bytes), index=0)
        except (OSError, BadSignature):
            return False
        return True


def fetch(
    bus: Bus,
    keyring: Keyring,
    holder: str,
    name: str,
    precision: str = "int8",
    provider: str = "",
    *,
    cache: Path,
    on_progress: Callable[[int, int], None] | None = None,
    say: Progress = lambda _line: None,
    mailbox: Mailbox | None = None,
) -> Fetched:
    """The built model of ``name`` from the node ``holder``, unless it is here and whole.

    Args:
        bus: for asks and chunks.
        keyring: whose signature counts.
        precision, provider: as for edge.model_build.build.
        cache: where built models are kept.
        on_progress: called with (bytes here, bytes in all) after each chunk.
        say: told in a line what is being done.
        mailbox: of this host, where ``holder`` may be as well.

    Raises ConfigError; NotFound when ``holder`` has none such; TrustError, MalformedMessage or, for another build,
    ModelUnavailable before anything is written; BlobError for a transfer that was cut (what came is kept) or files that
    do not fit the card; StorageError; AskExpired.
    """
    provider = provider or ("cuda" if precision == "fp16" else "cpu")
    try:
        wanted = msgspec.convert({"name": name, "precision": precision, "provider": provider}, ModelBuiltAsk)
    except msgspec.ValidationError as error:
        raise ConfigError(f"fetching {name[:80]!r} as {precision}-{provider}: {error}", reason=str(error)) from None
    signed: SignedBuiltManifest = bus.ask(holder, wanted, ttl_ms=MANIFEST_TTL_MS)
    manifest = open_built(signed, keyring)
    check_manifest(manifest, holder, wanted)
    size_mb = manifest.total_bytes / 1e6
    say(f"{manifest.folder} of {holder}: {len(manifest.files)} files, {size_mb:,.1f} MB, signed by {holder}")
    target = cache / manifest.folder
    with storage_errors(f"fetching {manifest.folder} into {cache}"):
        cache.mkdir(parents=True, exist_ok=True)
        with model_lock(cache, name, lambda: say(f"waiting: another process is at work on {name}")):
            if (target / CARD_NAME).exists():
                built = Built(target, read_card(target))
                check_built_files(built, cache)
                return Fetched(target, built.card, 0)
            partial = cache / f".{manifest.folder}.fetch"
            fetched_bytes = _fetch_chunks(bus, holder, built_id(signed), manifest, partial, on_progress, say, mailbox)
            try:
                card = check_whole(partial, manifest, wanted)
                shutil.rmtree(target, ignore_errors=True)  # without a card: of a process that was killed
                files = [ModelFile(file.name, file.size_bytes, file.sha256.hex()) for file in manifest.files]
                publish(partial, target, _row(card, holder), made="built", files=tuple(files))
            except MindstreamError:
                # Each chunk is what was signed: fetched again, it would be as wrong.
                shutil.rmtree(partial, ignore_errors=True)
                raise
    return Fetched(target, card, fetched_bytes)


def check_manifest(manifest: BuiltManifest, holder: str, wanted: ModelBuiltAsk) -> None:
    """Raise ModelUnavailable, or BadSignature, unless a manifest is of what was asked for, by whom it was asked."""
    asked = f"fetching {wanted.name} as {wanted.precision}-{wanted.provider} from {holder}"
    if manifest.creator != holder:
        raise BadSignature(
            f"{asked}: the manifest is signed by {manifest.creator[:80]}",
            hint=f"name that node with --from, if it is the one you mean: --from {manifest.creator[:63]}",
            field="creator",
            reason="another signer",
        )
    if manifest.build != BUILD:
        raise ModelUnavailable(
            f"{asked}: it was built by build {manifest.build} of Mindstream's builder, this version runs build {BUILD}",
            hint="bring both nodes to one version of Mindstream, and build it again there",
            field="build",
            reason=ANOTHER_VERSION,
        )
    fits = manifest.folder.endswith(f"-{wanted.precision}-{wanted.provider}-b{BUILD}")
    if manifest.model != wanted.name or not fits or not is_built_name(manifest.folder, wanted.name):
        raise ModelUnavailable(
            f"{asked}: it sent {manifest.folder[:120]!r} of the model {manifest.model[:80]!r}", reason="another model"
        )
    sums = {file.name: file.sha256 for file in manifest.files}
    if sums.get(CARD_NAME) != manifest.card or GRAPH_NAME not in sums:
        raise ModelUnavailable(f"{asked}: its files lack {CARD_NAME} or {GRAPH_NAME}", reason="no built model")


def check_whole(partial: Path, manifest: BuiltManifest, wanted: ModelBuiltAsk) -> Card:
    """The card, once every file is the manifest's and the card's, and the graph can be read.

    Raises BlobError or ModelUnavailable.
    """

    def wrong(why: str) -> BlobError:
        return BlobError(
            f"checking {manifest.folder} from {manifest.creator}: {why}",
            hint=f"on {manifest.creator}: mindstream models verify {wanted.name}",
            reason="damaged",
        )

    for file in manifest.files:
        path = partial / file.name
        if path.stat().st_size != file.size_bytes or sha256_of(path) != file.sha256.hex():
            raise wrong(f"{file.name} is not what its SHA-256 says")
    card = read_card(partial)
    own = (card.model, card.precision, card.provider)
    if own != (wanted.name, wanted.precision, wanted.provider) or manifest.folder != built_name(
        card.model, card.source.identity, card.precision, card.provider, card.build
    ):
        raise wrong(f"its card is of {card.model[:80]!r} as {card.variant[:80]}")
    of_card = {(file.name, file.size_bytes, file.sha256) for file in card.files}
    if of_card != {
        (each.name, each.size_bytes, each.sha256.hex()) for each in manifest.files if each.name != CARD_NAME
    }:
        raise wrong("its card names other files")
    if not importlib.import_module(GRAPH_MODULE).attention_nodes(partial / GRAPH_NAME):
        raise wrong(f"{GRAPH_NAME} has no layer that keeps keys and values")
    return card


def _fetch_chunks(
    bus: Bus,
    holder: str,
    identifier: str,
    manifest: BuiltManifest,
    partial: Path,
    on_progress: Callable[[int, int], None] | None,
    say: Progress,
    mailbox: Mailbox | None,
) -> int:
    target = _with_room(partial, manifest)
    if here_bytes := target.here_bytes:
        say(f"{here_bytes / 1e6:,.1f} MB of it are here from an earlier fetch")
    again = f"mindstream models build {manifest.model} there, or look at it with mindstream models verify"
    receiver = BlobReceiver(bus, bus, target, on_progress, what="built model", mend=again, mailbox=mailbox)
    try:
        fetched_bytes = receiver.pull(holder, identifier, target, timeout_s=TRANSFER_TIMEOUT_S)
    except NotFound as error:
        raise BlobError(
            f"fetching {manifest.folder}: {holder} was started again meanwhile, or does not hold it any more",
            hint="what came is kept: the same command goes on",
            reason="holder started again",
        ) from error
    target.finish()
    return fetched_bytes


def _with_room(partial: Path, manifest: BuiltManifest) -> PartialModel:
    """What is here of it, once there is room for the rest. Raises StorageError."""
    cache = partial.parent
    # What was written counts as used already, verified or not: it is written over.
    there = sum(path.stat().st_blocks * 512 for path in partial.glob("*") if path.is_file())
    needed, free = max(0, manifest.total_bytes - there) + RESERVE_BYTES, free_bytes(cache)
    if free < needed:
        raise StorageError(
            f"fetching {manifest.folder} into {cache}: {free / 1e6:,.0f} MB are free there, {needed / 1e6:,.0f} MB are "
            "needed",
            hint="free some space, or set XDG_CACHE_HOME to a folder on a larger disk",
            reason="disk full",
        )
    return PartialModel(partial, manifest)


def _row(card: Card, holder: str) -> KnownModel:
    """A row for the model: the project's own if it is of the same weights, else what the card says."""
    for model in known_models():
        if model.name == card.model and model.files[0].sha256 == card.source.identity:
            return model
    of_identity = [file for file in card.source.files if file.sha256 == card.source.identity]
    return KnownModel(
        name=card.model,
        about=f"fetched from node {holder}, which built it",
        kind="language",
        format="safetensors",
        # The source itself is not here; where the card does not list what names it, its digest alone is known.
        files=tuple(of_identity) or (ModelFile("source-weights", 0, card.source.identity),),
        upstream=card.source.upstream,
        licence=Licence(card.source.licence),
    )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A descriptor to write to; made when absent. Raises OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
