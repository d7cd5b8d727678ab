"""A snapshot's chunks taken in while they arrive: decrypted at once, decoded as soon as a block's part is whole.

So when the last chunk is here only its own block is left to do. Chunks may come in any order and on several threads;
what costs (AES, copying, decoding) runs outside Python's lock.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from protocol.errors import SnapshotRefused
from protocol.layout import CodecRef, Part, PartPlace
from protocol.manifest import SnapshotManifest
from protocol.sealing import MAX_PLAIN_BYTES, SEAL_BYTES, DataKey
from services.model_runner.blocks import Assembly, chunks_of_parts
from services.model_runner.codecs.base import Codec
from services.model_runner.engine import LayerState

Refused = Callable[[str, str], SnapshotRefused]
"""Makes the error of a field and a reason."""


class _Filling:
    """A part whose chunks come."""

    def __init__(self, place: PartPlace, part: Part, own: slice) -> None:
        self.place = place
        self.part = part
        self.first = own.start
        self.missing = set(range(own.start, own.stop))
        """Chunks that have not been taken in."""
        self.left = len(self.missing)
        """Chunks that have not been decrypted."""
        self.buffer: bytearray | None = None


class Intake:
    """Puts the layers of one snapshot together. ``snapshot.intake`` makes one, once all sizes have been checked.

    Args:
        addresses: of the private part.
        codec: decodes blocks.
        assembly: takes what was decoded.
        refused: makes errors that name the snapshot.
    """

    def __init__(
        self,
        manifest: SnapshotManifest,
        addresses: Sequence[bytes],
        key: DataKey,
        codec: Codec,
        assembly: Assembly,
        refused: Refused,
    ) -> None:
        self._codec_ref: CodecRef = manifest.codec
        self._addresses = addresses
        self._key = key
        self._codec = codec
        self._assembly = assembly
        self._refused = refused
        self._parts = [_Filling(*found) for found in chunks_of_parts(manifest)]
        self._firsts = [filling.first for filling in self._parts]
        self._largest = max((filling.part.encoded_bytes for filling in self._parts), default=0)
        self._free: list[bytearray] = []
        self._lock = threading.Lock()
        self._left = len(self._parts)
        self.logits: npt.NDArray[np.float32] | None = None
        """The next token's, where the snapshot has them and their part is whole."""

    @property
    def codec(self) -> Codec:
        """The decoder."""
        return self._codec

    @property
    def whole(self) -> bool:
        """Whether everything has been taken in and decoded."""
        return self._left == 0

    def put(self, index: int, chunk: bytes | bytearray | memoryview) -> None:
        """Take chunk ``index`` of the manifest, whose digest was checked; one that comes again does nothing.

        Raises SnapshotRefused, naming the block.
        """
        filling = self._parts[bisect_right(self._firsts, index) - 1]
        number = index - filling.first
        with self._lock:
            if index not in filling.missing:
                return
            filling.missing.discard(index)
            if filling.buffer is None:
                filling.buffer = self._free.pop() if self._free else bytearray(self._largest)
            buffer = filling.buffer
        data = memoryview(buffer)[: filling.part.encoded_bytes]
        offset = number * MAX_PLAIN_BYTES
        try:
            role = filling.place.role(self._addresses, self._codec_ref, number)
            self._key.open_into(role, chunk, data[offset : offset + len(chunk) - SEAL_BYTES])
            with self._lock:
                filling.left -= 1
                if filling.left:
                    return
            self._decode(filling.place, data)
        except SnapshotRefused as error:
            raise self._refused(f"blocks[{filling.place.block}].{filling.place.kind}", error.reason) from error
        data.release()
        with self._lock:
            filling.buffer = None
            self._free.append(buffer)
            self._left -= 1

    def _decode(self, place: PartPlace, data: memoryview) -> None:
        if place.kind == "logits":
            self.logits = np.frombuffer(data, "<f4").copy()
        else:
            self._assembly.decode(place, data, self._codec)

    def layers(self) -> list[LayerState]:
        """What was put together; everything must be in. Raises SnapshotRefused."""
        if not self.whole:
            raise self._refused("chunks", f"{self._left} parts are not whole")
        return self._assembly.layers()
