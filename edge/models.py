"""Where models are on this machine, and how one becomes ready to load.

A model is found, in this order, in the folders that the configuration names, in an installed wheel, in the folders
of ``$MINDSTREAM_MODELS``, in the cache, and in ``../shared/models`` beside a checkout. A language model that comes as
GGUF is converted once (edge/model_convert.py). Nothing is fetched from a network here: that is edge/model_pull.py.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from edge.files import sync_folder
from edge.model_convert import CONVERSION, convert_in_child
from edge.model_registry import (
    DEFAULT_MODEL,
    RECORD_NAME,
    KnownModel,
    ModelFile,
    Record,
    WheelSource,
    all_models,
    default_cache_folder,
    known_models,
    model_named,
    read_record,
    write_record,
)
from protocol.errors import ModelUnavailable, StorageError

__all__ = [
    "DEFAULT_MODEL",
    "Hold",
    "ModelFiles",
    "all_models",
    "default_cache_folder",
    "ensure",
    "find",
    "known_models",
]

_READ_BYTES = 1 << 20

Progress = Callable[[str], None]


class ModelFiles(msgspec.Struct, frozen=True):
    """Where a model is."""

    name: str
    folder: Path
    """Folder that holds ``file``; for a language model ready to load, the folder to give to transformers."""
    file: str
    """The file in the folder that ``find`` saw: ``*.safetensors``, ``*.gguf`` or ``*.onnx``."""
    kind: str
    licence: str
    """Its name; empty for a folder of the user's own."""
    source: str
    """Where the weights came from: upstream repository, or the path given."""
    reason: str
    """Why this place was taken."""

    @property
    def ready(self) -> bool:
        """Whether it can be loaded as it is; a GGUF is converted by ``ensure`` first."""
        return not self.file.endswith(".gguf")


class Hold:
    """Says to other processes that a model's folder is in use, until ``release`` or the end of this process.

    A shared lock of the kernel's on the folder: `mindstream models rm` does not take away what somebody holds. Where
    the file system knows no such locks, nothing is held, and nothing breaks.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor: int | None = None
        try:
            self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            self.release()

    def release(self) -> None:
        """Let others take it away."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def find(name: str, folders: Sequence[Path] = (), cache_dir: Path | None = None) -> ModelFiles | None:
    """Where the model's files are, or None. Looks, and changes nothing.

    Args:
        name: a known model's name, or the path of a folder with config.json and safetensors.
        folders: searched first, in order.
        cache_dir: the cache (default: ``default_cache_folder()``).

    Raises ModelUnavailable when ``name`` is neither known nor a path.
    """
    if is_path(name):
        return _own_folder(Path(name).expanduser())
    cache = cache_dir or default_cache_folder()
    return next(find_all(model_named(name, cache), folders, cache), None)


def find_all(model: KnownModel, folders: Sequence[Path], cache: Path) -> Iterator[ModelFiles]:
    """Every place where the model is, the one that is taken first."""
    for folder, reason in _places(model, folders, cache):
        for candidate in (folder / converted_name(model), folder / model.name):
            if weights := _loadable(candidate):
                yield _files(model, candidate, weights, reason)
        for candidate in (folder / model.name, *([folder] if model in known_models() else [])):
            if all((candidate / file.name).is_file() for file in model.files):
                yield _files(model, candidate, model.files[0].name, reason)


def ensure(
    name: str,
    cache_dir: Path | None = None,
    on_progress: Progress | None = None,
    folders: Sequence[Path] = (),
) -> ModelFiles:
    """The model, ready to load: found, checked, and converted if it is a GGUF that was not converted yet.

    Several processes may ask at once: one converts, the others wait. A process killed half-way leaves nothing that
    another would take for a model. Converting SmolLM2 takes some 20 s and 270 MB in the cache.

    Args:
        name: as for ``find``.
        cache_dir: where converted models are kept (default: ``default_cache_folder()``).
        on_progress: told in a line what is being done, when it takes longer.
        folders: searched first, in order.

    Raises ModelUnavailable when it is not here, is damaged, or cannot be converted for want of packages, and
    StorageError when the cache cannot be written.
    """
    cache = cache_dir or default_cache_folder()
    found = find(name, folders, cache)
    if found is None:
        raise _missing(name, folders, cache)
    if is_path(name):
        return found
    model = model_named(name, cache)
    if not found.ready:
        return _convert(model, found, cache, on_progress or (lambda _line: None))
    if found.kind == "language":
        check_sizes(found)
    else:
        for file in model.files:
            _check(model, file, found.folder / file.name)
    return found


def _convert(model: KnownModel, found: ModelFiles, cache: Path, say: Progress) -> ModelFiles:
    target = cache / converted_name(model)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with model_lock(cache, model.name, lambda: say(f"waiting: another process is at work on {model.name}")):
            weights = _loadable(target)
            if weights is None:
                # Under the lock nobody is at work: what lies here was left by a process that was killed.
                remove_leftovers(cache, target.name)
                _check(model, model.files[0], found.folder / found.file)
                say(f"converting {found.file} to safetensors, once (some 20 seconds per 100 MB)")
                partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=cache))
                try:
                    convert_in_child(found.folder / found.file, partial)
                    publish(partial, target, model, made="converted")
                except BaseException:
                    shutil.rmtree(partial, ignore_errors=True)
                    raise
                weights = _loadable(target)
    except OSError as error:
        raise StorageError(
            f"converting {model.name} into {cache}: {error.strerror or error}",
            hint="free some 300 MB there, or set XDG_CACHE_HOME to a folder that this user may write",
            field="models.cache",
            reason="cache not writable",
        ) from error
    if weights is None:
        raise ModelUnavailable(f"converting {model.name}: {target} holds no config.json and safetensors afterwards")
    return _files(model, target, weights, f"converted from {found.file}")


def publish(
    partial: Path, target: Path, model: KnownModel, *, made: str, files: tuple[ModelFile, ...] | None = None
) -> None:
    """Make ``partial`` the folder ``target``, with a record of what is in it; all on the disk before it has its name.

    ``files``: what is in it, where that is known already. Raises OSError.
    """
    if files is None:
        paths = sorted(path for path in partial.iterdir() if path.name != RECORD_NAME)
        files = tuple(ModelFile(path.name, path.stat().st_size, sha256_of(path)) for path in paths)
    write_record(partial, Record(made=made, model=model, files=files, time_us=time.time_ns() // 1000))
    # A power cut after the rename must not leave empty files.
    for path in partial.iterdir():
        path.chmod(0o644)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    partial.chmod(0o755)
    sync_folder(partial)
    partial.rename(target)
    sync_folder(target.parent)


def converted_name(model: KnownModel) -> str:
    """Name of its converted folder. The source's digest is part of it: another file is another model."""
    return f"{model.name}-{model.files[0].sha256[:12]}-v{CONVERSION}"


def is_path(name: str) -> bool:
    """Whether a model is named by its folder."""
    return os.sep in name or name in (".", "..") or name.startswith("~")


@contextmanager
def model_lock(cache: Path, name: str, on_wait: Callable[[], None]) -> Iterator[None]:
    """The right to pull, convert or remove a model; the kernel lets go of it when its holder dies.

    Raises OSError.
    """
    # Reading is right enough for a lock: another user, root for one, may have made the file.
    descriptor = os.open(cache / f".{name}.lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def remove_leftovers(cache: Path, name: str) -> None:
    """Remove what a killed process left of the folder ``name``; only under the model's lock."""
    for leftover in cache.glob(f".{name}.*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hexadecimal. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def difference(file: ModelFile, path: Path) -> str:
    """In what the file at ``path`` is not the one that was expected; empty when it is. Raises OSError."""
    size_bytes = path.stat().st_size
    if file.size_bytes and size_bytes != file.size_bytes:
        return f"it has {size_bytes:,} bytes, not {file.size_bytes:,}"
    found = sha256_of(path)
    return "" if found == file.sha256 else f"its SHA-256 is {found}, not {file.sha256}"


def _places(model: KnownModel, folders: Sequence[Path], cache: Path) -> Iterator[tuple[Path, str]]:
    """The search path: folders that exist or not, each with what to say when the model is found there."""
    if model not in known_models():
        # A name of the user's own: a file of the same name elsewhere ("model.onnx") is likely another.
        yield cache, "pulled"
        return
    for folder in folders:
        yield folder.expanduser(), "in a folder of the configuration"
    # Before the wheel, for the same model: what was converted from it. `find` looks for that name only here.
    if _loadable(cache / converted_name(model)):
        yield cache, "converted earlier"
    for folder in wheel_folders(model):
        yield folder, "in an installed wheel"
    for folder_name in filter(None, os.environ.get("MINDSTREAM_MODELS", "").split(os.pathsep)):
        yield Path(folder_name).expanduser(), "in $MINDSTREAM_MODELS"
    yield cache, "in the cache"
    yield Path(__file__).resolve().parents[2] / "shared" / "models", "in ../shared/models"


def wheel_folders(model: KnownModel) -> Iterable[Path]:
    """Folders of installed wheels that hold the model's files whole; parts are joined by a pull."""
    parts = [source.parts[0] for source in model.sources if isinstance(source, WheelSource) and len(source.parts) == 1]
    found = (package_folder(part.package) / part.path for part in parts if package_folder(part.package).name)
    return dict.fromkeys(path.parent for path in found)


def package_folder(package: str) -> Path:
    """Folder of an installed package, without importing it; ``Path()`` when it is not installed."""
    spec = importlib.util.find_spec(package)
    locations = list(spec.submodule_search_locations or ()) if spec else []
    return Path(locations[0]) if locations else Path()


def _missing(name: str, folders: Sequence[Path], cache: Path) -> ModelUnavailable:
    if is_path(name):
        return ModelUnavailable(
            f"loading the model in {name}: there is no config.json with safetensors in that folder",
            hint="give the folder of a model as Hugging Face lays it out",
            field="model.name",
            reason="no model in that folder",
        )
    model = model_named(name, cache)
    places = ", ".join(dict.fromkeys(str(folder) for folder, _ in _places(model, folders, cache)))
    files = ", ".join(file.name for file in model.files)
    return ModelUnavailable(
        f"looking for the model {name!r}: neither a wheel nor any folder has {files} (looked in {places})",
        hint=model.how_to_get,
        field="model.name",
        reason="files not found",
    )


def _check(model: KnownModel, file: ModelFile, path: Path) -> None:
    """Raise ModelUnavailable unless the file is the one that the registry names."""
    if why := difference(file, path):
        raise ModelUnavailable(
            f"checking {path}: {why}",
            hint=f"`mindstream models verify {model.name}` says what to do",
            reason="damaged or another file",
        )


def check_sizes(found: ModelFiles) -> None:
    """Raise ModelUnavailable when a file that Mindstream wrote was cut or is gone; contents are `verify`'s."""
    record = read_record(found.folder)
    for file in record.files if record else ():
        path = found.folder / file.name
        size_bytes = path.stat().st_size if path.exists() else 0
        if size_bytes != file.size_bytes:
            raise ModelUnavailable(
                f"checking {path}: it has {size_bytes:,} bytes, not {file.size_bytes:,}",
                hint=f"mindstream models rm {found.name}, then mindstream models prepare {found.name}",
                reason="damaged",
            )


def _files(model: KnownModel, folder: Path, file: str, reason: str) -> ModelFiles:
    return ModelFiles(
        name=model.name,
        folder=folder,
        file=file,
        kind=model.kind,
        licence=model.licence.name,
        source=model.upstream,
        reason=reason,
    )


def _own_folder(folder: Path) -> ModelFiles | None:
    weights = _loadable(folder)
    if weights is None:
        return None
    return ModelFiles(
        name=folder.name,
        folder=folder.resolve(),
        file=weights,
        kind="language",
        licence="",
        source=str(folder),
        reason="the folder given",
    )


def _loadable(folder: Path) -> str | None:
    """Name of the (first) weights file of a folder that transformers can load, else None."""
    if not (folder / "config.json").is_file():
        return None
    return min((path.name for path in folder.glob("*.safetensors")), default=None)
