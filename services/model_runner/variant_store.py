"""The variant certificates that this node holds: a file a pair, signed, checked again whenever it is read."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

import msgspec

from edge.files import storage_errors, write_atomically
from protocol.errors import MindstreamError, NotFound
from protocol.identity import Keyring
from protocol.variants import SignedVariantCertificate, Variant, VariantCertificate, open_variant, pair_name

log = logging.getLogger(__name__)

FOLDER = "variants"
"""Under the model runner's data folder."""
_MOST_BYTES = 1024 * 1024


class VariantStore:
    """Certificates in a folder.

    Args:
        folder: made with the first certificate.
        keyring: whose certificates count, asked each time.
    """

    def __init__(self, folder: Path, keyring: Callable[[], Keyring]) -> None:
        self._folder = folder
        self._keyring = keyring

    def put(self, signed: SignedVariantCertificate) -> VariantCertificate:
        """Keep it, in place of any other of its pair. Raises as ``open_variant``, and StorageError."""
        found = open_variant(signed, self._keyring())
        with storage_errors(f"making {self._folder}"):
            self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path(found.source, found.target), msgspec.msgpack.encode(signed))
        return found

    def find(self, source: Variant, target: Variant) -> VariantCertificate | None:
        """That of the pair; None when there is none that counts, which the log says."""
        found = self._open(self._path(source, target))
        return found[1] if found is not None and (found[1].source, found[1].target) == (source, target) else None

    def signed(self, source: Variant, target: Variant) -> SignedVariantCertificate:
        """As others may have it. Raises NotFound."""
        found = self._open(self._path(source, target))
        if found is None or (found[1].source, found[1].target) != (source, target):
            raise NotFound(
                f"looking for a certificate of {source} on {target}: this node has none",
                hint="there: mindstream models pair",
                field="source",
                reason="no certificate",
            )
        return found[0]

    def all(self) -> list[VariantCertificate]:
        """Every one that counts, the newest first."""
        found = [self._open(path) for path in self._folder.glob("[0-9a-f]*")] if self._folder.is_dir() else []
        return sorted((each[1] for each in found if each is not None), key=lambda each: -each.created_us)

    def _path(self, source: Variant, target: Variant) -> Path:
        return self._folder / pair_name(source, target)

    def _open(self, path: Path) -> tuple[SignedVariantCertificate, VariantCertificate] | None:
        body = b""
        with storage_errors(f"reading {path}"), contextlib.suppress(FileNotFoundError), path.open("rb") as stream:
            body = stream.read(_MOST_BYTES)
        if not body:
            return None
        try:
            signed = msgspec.msgpack.decode(body, type=SignedVariantCertificate)
            return signed, open_variant(signed, self._keyring())
        except (msgspec.MsgspecError, MindstreamError) as error:
            log.warning("the variant certificate %s does not count: %s", path.name[:12], error)
            return None
