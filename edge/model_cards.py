"""Built models: graphs for ONNX Runtime that Mindstream made from a model's weights, each with a card.

A built model is a folder of the cache, ``NAME-DIGEST-PRECISION-PROVIDER-bBUILD``: NAME and DIGEST are those of the
source's weights, BUILD is ``BUILD`` of the version that made it. It holds ``model.onnx`` with its data,
``config.json``, tokenizer, chat template, and ``card.json``: what it was made from, how, and what was measured.
Nothing heavy is imported here: a node that only runs built models has neither torch nor the builder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from edge.model_registry import ModelFile
from protocol.errors import ModelUnavailable

BUILD = 2
"""Raised when what is built, or how the folder is laid out, changes: other numbers are refused, and built again."""
CARD_NAME = "card.json"
GRAPH_NAME = "model.onnx"
PRECISIONS = ("int8", "int4", "fp16", "fp32")
PROVIDERS = ("cpu", "cuda")
ANOTHER_VERSION = "built by another version"
DEFAULT_MAX_PPL_PCT = 2.0
"""A built model whose perplexity is above its source's by more is never taken as the default engine."""
_FOLDER = re.compile(
    rf"(?P<name>.+)-(?P<digest>[0-9a-f]{{12}})-(?P<precision>{'|'.join(PRECISIONS)})-(?P<provider>cpu|cuda)"
    r"-b(?P<build>\d+)"
)


class CardSource(msgspec.Struct, frozen=True):
    """What a model was built from."""

    upstream: str
    """Repository or folder that the weights came from."""
    licence: str
    """Its name; empty when it is not known."""
    architecture: str
    """As config.json names it, such as ``LlamaForCausalLM``."""
    identity: str
    """SHA-256 of what names the model: the registry's first file, or the weights of a folder."""
    files: tuple[ModelFile, ...]
    """Weights, configuration and tokenizer as the builder read them."""


class TextCheck(msgspec.Struct, frozen=True):
    """One text through source and built model."""

    kind: str
    """``prose``, ``technical`` or ``code``."""
    tokens: int
    """Predictions compared."""
    source_perplexity: float
    built_perplexity: float
    top1: float
    """Share of positions where both hold the same token to be the likeliest."""


class Measured(msgspec.Struct, frozen=True):
    """The built model against its source, on the machine that built it."""

    reference: str
    """What computed the source, such as ``transformers 5.23.0 float32``."""
    texts: tuple[TextCheck, ...]
    perplexity_pct: float
    """How much higher the perplexity is than the source's over all texts, in per cent; negative: lower."""
    top1: float
    """Over all texts."""
    decode_tokens_per_s: float | None = None
    """The built model, one conversation; None: not measured."""
    source_decode_tokens_per_s: float | None = None
    """The source on the transformers engine of the same machine, in its own dtype there."""
    source_dtype: str = ""
    """That dtype."""
    machine: str = ""
    """Where: CPU or GPU, and threads."""


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """``card.json``."""

    build: int
    """``BUILD`` of the version that made it."""
    model: str
    """Name of the model."""
    source: CardSource
    precision: str
    """``int8``, ``int4``, ``fp16`` or ``fp32``: of the weights."""
    provider: str
    """ONNX Runtime provider that the graph is for: ``cpu`` or ``cuda``."""
    method: str
    """How the weights were rounded, in words."""
    versions: dict[str, str]
    """Of builder, onnxruntime, onnx, torch, transformers and Mindstream."""
    files: tuple[ModelFile, ...]
    """Every other file of the folder."""
    measured: Measured | None
    """None when it was built without the check."""
    build_s: float
    time_us: int
    """When, UTC."""

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(file.size_bytes for file in self.files)

    @property
    def variant(self) -> str:
        """Precision and provider, such as ``int8-cpu``."""
        return f"{self.precision}-{self.provider}"

    @property
    def not_default(self) -> str:
        """Why it is not taken unless it is asked for; empty when it may be the default."""
        if self.measured is None:
            return "not checked against its source"
        if not self.measured.perplexity_pct <= DEFAULT_MAX_PPL_PCT:  # NaN is refused too
            return f"{self.measured.perplexity_pct:+.1f} %"
        return ""


class Built(msgspec.Struct, frozen=True):
    """A built model on this machine."""

    folder: Path
    card: Card


def built_name(name: str, identity: str, precision: str, provider: str, build: int = BUILD) -> str:
    """Name of its folder. ``identity``: SHA-256 of the source, in hexadecimal."""
    return f"{name}-{identity[:12]}-{precision}-{provider}-b{build}"


def is_built_name(folder: str, name: str = "") -> bool:
    """Whether a folder of the cache is called as a built model is, of the model ``name`` if one is given."""
    found = _FOLDER.fullmatch(folder)
    return found is not None and name in ("", found["name"])


def read_card(folder: Path) -> Card:
    """The card of a built model. Raises ModelUnavailable when there is none, or another version wrote it."""
    path = folder / CARD_NAME
    found = _FOLDER.fullmatch(folder.name)
    build = int(found["build"]) if found else BUILD
    try:
        body = path.read_bytes()
        build = msgspec.json.decode(body, type=_BuildOnly).build
        if build == BUILD:
            return msgspec.json.decode(body, type=Card)
    except FileNotFoundError as error:
        raise ModelUnavailable(
            f"reading {path}: it is not there, so this is no built model", hint=_HINT, reason="no card"
        ) from error
    except (OSError, msgspec.MsgspecError) as error:
        raise ModelUnavailable(f"reading {path}: {error}", hint=_again(found), reason="damaged card") from error
    raise ModelUnavailable(
        f"reading {path}: it was built by build {build} of Mindstream's builder, this version runs build {BUILD}",
        hint=_again(found),
        field="build",
        reason=ANOTHER_VERSION,
    )


def built_models(cache: Path, name: str = "") -> Iterator[Built]:
    """Built models in the cache that this version can run, of one model or of all; others are passed over."""
    for path in sorted(cache.glob("*/" + CARD_NAME)):
        if path.parent.name.startswith(".") or not is_built_name(path.parent.name, name):
            continue
        try:
            yield Built(path.parent, read_card(path.parent))
        except ModelUnavailable:
            continue


def other_builds(cache: Path, name: str = "") -> Iterator[tuple[Path, ModelUnavailable]]:
    """Folders of built models that this version cannot run, and why."""
    for path in sorted(cache.iterdir()) if cache.is_dir() else ():
        if path.is_dir() and is_built_name(path.name, name):
            try:
                read_card(path)
            except ModelUnavailable as error:
                yield path, error


def check_built_files(built: Built, cache: Path) -> None:
    """Raise ModelUnavailable unless every file is what the card says.

    Contents are read when size or modification time are not those of the last time, a second for each GB.
    """
    from edge.file_digests import FileDigests

    digests = FileDigests(cache)
    card = built.card
    try:
        for file in card.files:
            path = built.folder / file.name
            try:
                size_bytes, why = path.stat().st_size, ""
                if size_bytes != file.size_bytes:
                    why = f"it has {size_bytes:,} bytes, not {file.size_bytes:,}"
                elif digests.sha256(path) != file.sha256:
                    why = "its SHA-256 is not the one of its card"
            except OSError as error:
                why = f"it cannot be read: {error.strerror}"
            if why:
                raise ModelUnavailable(
                    f"checking {path}: {why}",
                    hint=f"mindstream models rm {card.model} --variant {card.variant}, then "
                    f"mindstream models build {card.model} --precision {card.precision} --provider {card.provider}",
                    reason="damaged",
                )
    finally:
        digests.save()


class _BuildOnly(msgspec.Struct):
    build: int


_HINT = "mindstream models build NAME makes one"


def _again(found: re.Match[str] | None) -> str:
    if found is None:
        return _HINT
    return f"mindstream models build {found['name']} --precision {found['precision']} --provider {found['provider']}"
