"""Digests of what a model's numbers depend on: weights, tokenizer, configuration.

Hashing weights takes a second a gigabyte and would be paid at every start, so the digest of a file is kept in a
small JSON file, keyed by path, size and modification time in nanoseconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from blake3 import blake3

from protocol.errors import ModelUnavailable
from protocol.identity import digest
from protocol.manifest import ModelDigests

_CACHE_NAME = "weights-digests.json"
_READ_BYTES = 4 * 1024 * 1024

_NOT_NUMBERS = frozenset(
    {
        "transformers_version",
        "_name_or_path",
        "dtype",
        "torch_dtype",
        "architectures",
        "use_cache",
        "quantization_config",
    }
)
"""Keys of config.json that differ between writers of one model and change nothing that is computed."""


class _Known(msgspec.Struct):
    size_bytes: int
    mtime_ns: int
    blake3: str


def weights_files(folder: Path, gguf_file: str = "", weights: Sequence[str] = ()) -> list[Path]:
    """The files that hold the weights, in order. Raises ModelUnavailable when there are none."""
    names = [gguf_file] if gguf_file else list(weights)
    files = [folder / name for name in names] or sorted(folder.glob("*.safetensors"))
    if not files or not all(path.is_file() for path in files):
        raise ModelUnavailable(
            f"loading a model from {folder}: no {' and '.join(names) or 'safetensors weights'} there",
            hint="install the model again, or name a folder that holds *.safetensors (pickled weights are never read)",
            reason="no weights",
        )
    return files


def model_digests(
    folder: Path, gguf_file: str = "", cache_dir: Path | None = None, weights: Sequence[str] = ()
) -> ModelDigests:
    """BLAKE3 of weights, tokenizer and configuration of the model in ``folder``.

    Args:
        folder: a model folder as transformers writes it, or one with a GGUF file.
        gguf_file: name of the GGUF file, which then is weights, tokenizer and configuration in one.
        cache_dir: where digests of large files are kept between starts; None keeps none.
        weights: names of the files that hold the weights, in order, where they are no safetensors: a built graph's.
    """
    known = _load(cache_dir)
    parts = [(path.name, _file_digest(path, known)) for path in weights_files(folder, gguf_file, weights)]
    if cache_dir is not None:
        _store(cache_dir, known)
    # Shards are taken by content and order, and their names by nothing: a renamed file is the same model.
    whole = parts[0][1] if len(parts) == 1 else digest(*(part for _, part in parts))
    if gguf_file:
        return ModelDigests(weights=whole, tokenizer=whole, config=whole)
    return ModelDigests(weights=whole, tokenizer=_tokenizer_digest(folder), config=_config_digest(folder))


def shared_digests(folder: Path) -> ModelDigests:
    """What all builds of a model have in common, without reading its weights: ``weights`` is empty."""
    return ModelDigests(weights=b"", tokenizer=_tokenizer_digest(folder), config=_config_digest(folder))


def _tokenizer_digest(folder: Path) -> bytes:
    for name in ("tokenizer.json", "tokenizer.model", "vocab.json"):
        path = folder / name
        if path.is_file():
            return digest(path.read_bytes())
    raise ModelUnavailable(
        f"loading a model from {folder}: no tokenizer.json there",
        hint="install the model again: its folder is not complete",
        reason="no tokenizer",
    )


def _config_digest(folder: Path) -> bytes:
    path = folder / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelUnavailable(
            f"loading a model from {folder}: config.json cannot be read: {error}",
            hint="install the model again: its folder is not complete",
            reason="no configuration",
        ) from error
    kept = {key: value for key, value in config.items() if key not in _NOT_NUMBERS}
    return digest(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode())


def _file_digest(path: Path, known: dict[str, _Known]) -> bytes:
    status = path.stat()
    key = str(path.resolve())
    entry = known.get(key)
    if entry is not None and (entry.size_bytes, entry.mtime_ns) == (status.st_size, status.st_mtime_ns):
        return bytes.fromhex(entry.blake3)
    hasher = blake3(max_threads=blake3.AUTO)
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            hasher.update(block)
    known[key] = _Known(status.st_size, status.st_mtime_ns, hasher.hexdigest())
    return hasher.digest()


def _load(cache_dir: Path | None) -> dict[str, _Known]:
    if cache_dir is None:
        return {}
    try:
        return msgspec.json.decode((cache_dir / _CACHE_NAME).read_bytes(), type=dict[str, _Known])
    except (OSError, msgspec.MsgspecError):
        return {}  # Absent or damaged: it only saves time, so it is made anew.


def _store(cache_dir: Path, known: dict[str, _Known]) -> None:
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        partial = cache_dir / f"{_CACHE_NAME}.{os.getpid()}"
        partial.write_bytes(msgspec.json.encode(known))
        partial.replace(cache_dir / _CACHE_NAME)
    except OSError:
        return  # A read-only cache folder costs a second at the next start, no more.
