"""Building a model for ONNX Runtime: once, in a child process, into the cache; whole or not there.

The child (services/model_runner/build.py, started by its module's name) needs torch, transformers and the builder;
this process does not. It works in a folder whose name begins with a dot, which becomes the built model when graph,
tokenizer and card are whole and checked. Killed half-way, it leaves nothing that would be taken for a model, and the
next build removes what it left.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from edge.download import RESERVE_BYTES
from edge.files import storage_errors
from edge.model_cards import (
    BUILD,
    CARD_NAME,
    PRECISIONS,
    PROVIDERS,
    Built,
    Card,
    CardSource,
    Measured,
    built_name,
    read_card,
)
from edge.model_child import run_child
from edge.model_registry import KnownModel, Licence, ModelFile, default_cache_folder, model_named
from edge.models import Progress, ensure, is_path, model_lock, publish, remove_leftovers, sha256_of
from edge.process import free_bytes
from protocol.errors import ConfigError, ModelUnavailable, StorageError

BUILDER_MODULE = "services.model_runner.build"
EXIT_PACKAGES_MISSING = 3
EXIT_REFUSED = 4
"""The child refuses what it was asked, and its last line says why."""
ROOM_RATIO = {"int8": 2.5, "int4": 2.5, "fp16": 1.5, "fp32": 2.5}
"""Disk needed while building, over the size of the source's weights in bfloat16."""


class Said(msgspec.Struct, omit_defaults=True):
    """A line of the child: what it is doing now, or (the last) what it has done."""

    doing: str = ""
    method: str = ""
    versions: dict[str, str] = {}
    architecture: str = ""
    measured: Measured | None = None


def build(
    name: str,
    precision: str = "int8",
    provider: str = "",
    *,
    folders: Sequence[Path] = (),
    cache_dir: Path | None = None,
    check: bool = True,
    on_progress: Progress = lambda _line: None,
) -> Built:
    """The built model of ``name``: made now, unless it is there and whole.

    Args:
        name: a known model, or the path of a folder with config.json and safetensors.
        precision: one of ``PRECISIONS``.
        provider: ``cpu`` or ``cuda``; empty chooses: ``cuda`` for fp16, else ``cpu``.
        folders: searched first for the source.
        cache_dir: where built models are kept.
        check: compare it with its source, which takes some seconds for each 100 MB; unchecked it is no default.
        on_progress: told in a line what is being done.

    Raises ModelUnavailable when there is no source, no builder, or an architecture that the builder does not know;
    StorageError; ConfigError.
    """
    provider = provider or ("cuda" if precision == "fp16" else "cpu")
    for value, known, field in ((precision, PRECISIONS, "--precision"), (provider, PROVIDERS, "--provider")):
        if value not in known:
            raise ConfigError(f"building {name}: {value!r} is none of {', '.join(known)}", field=field)
    cache = cache_dir or default_cache_folder()
    source = ensure(name, cache, on_progress, folders)
    if source.kind != "language":
        raise ModelUnavailable(
            f"building {name}: it is an ONNX model already", hint="only language models are built", reason="onnx"
        )
    with storage_errors(f"building {source.name} into {cache}"):
        cache.mkdir(parents=True, exist_ok=True)
        weights = sorted(source.folder.glob("*.safetensors"))
        model = _row_of_folder(source.folder, weights) if is_path(name) else model_named(name, cache)
        target = cache / built_name(model.name, model.files[0].sha256, precision, provider)
        with model_lock(cache, model.name, lambda: on_progress(f"waiting: another process is at work on {model.name}")):
            if not (target / CARD_NAME).exists():
                # Under the lock nobody is at work: what lies here was left by a process that was killed.
                remove_leftovers(cache, target.name)
                shutil.rmtree(target, ignore_errors=True)
                _check_room(cache, model.name, precision, sum(path.stat().st_size for path in weights))
                partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=cache))
                try:
                    _build(model, source.folder, partial, target, precision, provider, check, on_progress)
                except BaseException:
                    shutil.rmtree(partial, ignore_errors=True)
                    raise
    return Built(target, read_card(target))


def _build(
    model: KnownModel,
    source: Path,
    partial: Path,
    target: Path,
    precision: str,
    provider: str,
    check: bool,
    say: Progress,
) -> None:
    started_s = time.monotonic()
    done = build_in_child(model.name, source, partial, precision, provider, check, say)
    say("digests of what was built")
    read = [path for path in sorted(source.iterdir()) if path.suffix in (".safetensors", ".json", ".jinja")]
    files = _digests(partial.iterdir())
    card = Card(
        build=BUILD,
        model=model.name,
        source=CardSource(
            upstream=model.upstream,
            licence=model.licence.name,
            architecture=done.architecture,
            identity=model.files[0].sha256,
            files=_digests(path for path in read if not path.name.startswith(".")),
        ),
        precision=precision,
        provider=provider,
        method=done.method,
        versions=done.versions,
        files=files,
        measured=done.measured,
        build_s=round(time.monotonic() - started_s, 1),
        time_us=time.time_ns() // 1000,
    )
    write_card(partial, card)
    own = ModelFile(CARD_NAME, (partial / CARD_NAME).stat().st_size, sha256_of(partial / CARD_NAME))
    publish(partial, target, model, made="built", files=(*files, own))


def write_card(folder: Path, card: Card) -> None:
    """Write a card. Raises OSError."""
    (folder / CARD_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(card)) + b"\n")


def build_in_child(
    name: str, source: Path, folder: Path, precision: str, provider: str, check: bool, say: Progress
) -> Said:
    """Build the model in ``source`` into ``folder``, which must exist. Raises ModelUnavailable."""
    quiet = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    arguments = [str(source), str(folder), precision, provider, *([] if check else ["--no-check"])]
    last, ended = run_child(BUILDER_MODULE, arguments, Said(), say, quiet)
    if ended.code == 0 and last.method:
        return last
    why = ended.last_words or "it said nothing"
    if ended.code == EXIT_PACKAGES_MISSING:
        raise ModelUnavailable(
            f"building {name}: {why}",
            hint="pip install 'mindstream[model,build]' (Python 3.11 or newer), here or on the node that builds",
            reason="packages missing",
        )
    if ended.code == EXIT_REFUSED:
        raise ModelUnavailable(
            f"building {name}: {why}", hint="it runs on the transformers engine all the same", reason="cannot be built"
        )
    if any("No space left" in line for line in ended.noise):
        raise StorageError(
            f"building {name} in {folder.parent}: {why}", hint="free some space there", reason="disk full"
        )
    raise ModelUnavailable(
        f"building {name}: the build ended with code {ended.code}: {why}",
        hint="is there memory (ten times the weights in bfloat16) for it? `mindstream doctor` tells",
        reason="build failed",
    )


def _check_room(cache: Path, name: str, precision: str, source_bytes: int) -> None:
    needed, free = int(ROOM_RATIO[precision] * source_bytes) + RESERVE_BYTES, free_bytes(cache)
    if free < needed:
        raise StorageError(
            f"building {name} in {cache}: {free / 1e6:,.0f} MB are free there, {needed / 1e6:,.0f} MB are needed",
            hint="free some space, or set XDG_CACHE_HOME to a folder on a larger disk",
            reason="disk full",
        )


def _digests(paths: object) -> tuple[ModelFile, ...]:
    ordered = sorted(paths)  # type: ignore[call-overload]
    return tuple(ModelFile(path.name, path.stat().st_size, sha256_of(path)) for path in ordered)


def _row_of_folder(folder: Path, weights: Sequence[Path]) -> KnownModel:
    """A row for a folder of the user's own."""
    return KnownModel(
        name=folder.name,
        about=f"the folder {folder}",
        kind="language",
        format="safetensors",
        files=_digests(weights),
        upstream=str(folder),
        licence=Licence(""),
    )
