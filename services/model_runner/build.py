"""The child process that builds a model for ONNX Runtime: ``python -m services.model_runner.build SOURCE FOLDER
PRECISION PROVIDER [--no-check]``.

onnxruntime-genai's builder writes the graph, with keys and values as plain inputs and outputs; quantise.py rounds its
weights; then it is compared with its source (build_check.py). Started by edge/model_build.py, which reads the lines of
JSON on standard output (``edge.model_build.Said``); what the libraries say goes to standard error.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import msgspec

from edge.model_build import EXIT_PACKAGES_MISSING, EXIT_REFUSED, Said
from edge.model_cards import GRAPH_NAME
from protocol.errors import ModelUnavailable

_OPTIONS = ["windowed_kv_cache=false", "fuse_mlp_gate_up=true"]
"""Sliding layers take and give all positions, as full ones do: what an engine keeps of them is its own affair. Gate
and up projection in one product make a step a tenth shorter."""
_KINDS = {"full_attention", "sliding_attention"}
_COPIED = ("config.json", "generation_config.json")
_PACKAGES = ("onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir", "torch", "transformers", "mindstream")


def build(source: Path, folder: Path, precision: str, provider: str, check: bool, say: Callable[[Said], None]) -> None:
    """Build the model in ``source`` into ``folder``. Raises ImportError, ModelUnavailable, OSError."""
    say(Said(doing="loading torch, transformers and the builder"))
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    from services.model_runner.logits_rows import choose_logits_rows
    from services.model_runner.quantise import METHODS, quantise

    architecture = _architecture(source)
    say(Said(doing=f"building {architecture} as {precision} for {provider}"))
    rounded = precision in METHODS
    graph, scratch = folder / "graph", folder / "scratch"
    graph.mkdir()
    place: tuple[Any, ...] = ("", str(source), str(graph), "fp32" if rounded else precision, provider, str(scratch))
    try:
        options = parse_extra_options(*place, _OPTIONS)
        _attention_only(options["hf_details"]["hf_config"], architecture)
        _one_rope_base(options["hf_details"]["hf_config"])
        create_model(*place, **options)
    except NotImplementedError as error:
        raise ModelUnavailable(
            f"onnxruntime-genai {version('onnxruntime-genai')} builds no {architecture}: {error}",
            reason="unknown architecture",
        ) from error
    if not (graph / GRAPH_NAME).is_file():
        raise ModelUnavailable(f"the builder left no {GRAPH_NAME}: {sorted(path.name for path in graph.iterdir())}")
    if rounded:
        say(Said(doing=f"rounding the weights to {precision}"))
        quantise(graph, folder, precision, lambda line: say(Said(doing=line)))
    for path in graph.iterdir():
        if not (rounded and path.name.startswith(GRAPH_NAME)):
            path.rename(folder / path.name)
    shutil.rmtree(graph)
    shutil.rmtree(scratch, ignore_errors=True)
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    choose_logits_rows(folder / GRAPH_NAME)
    measured = None
    if check:
        from services.model_runner.build_check import check_built, with_rates

        measured = check_built(source, folder, provider, lambda line: say(Said(doing=line)))
        if measured is not None:
            measured = with_rates(measured, source, folder, provider, lambda line: say(Said(doing=line)))
    say(
        Said(
            method=METHODS.get(precision, f"weights and activations in {precision}"),
            versions=_versions(),
            architecture=architecture,
            measured=measured,
        )
    )


def _attention_only(config: Any, architecture: str) -> None:
    """The builder knows some recurrent layers; the onnx engine keeps keys and values alone. Raises ModelUnavailable."""
    kinds = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ()) - _KINDS
    if kinds:
        raise ModelUnavailable(
            f"building {architecture}: it has layers of kind {', '.join(sorted(kinds))}, and the onnx engine keeps "
            "keys and values of full and sliding-window attention alone",
            hint="run it on the transformers engine",
            field="model.name",
            reason="unsupported layers",
        )


def _one_rope_base(config: Any) -> None:
    """transformers 5 keeps the RoPE base for each kind of layer; the builder looks where version 4 kept the two."""
    rope = getattr(config, "rope_parameters", None) or {}
    if "full_attention" in rope and "sliding_attention" in rope:
        config.rope_local_base_freq = rope["sliding_attention"]["rope_theta"]
        config.rope_parameters = rope["full_attention"]


def _architecture(source: Path) -> str:
    try:
        config: dict[str, Any] = msgspec.json.decode((source / "config.json").read_bytes())
        return str(config["architectures"][0])
    except (OSError, msgspec.MsgspecError, LookupError, TypeError) as error:
        raise ModelUnavailable(f"{source / 'config.json'} names no architecture: {error}") from error


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def main(arguments: list[str]) -> int:
    """The child process of a build."""
    answers: IO[bytes] = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # the builder prints
    warnings.simplefilter("ignore")

    def say(said: Said) -> None:
        answers.write(msgspec.json.encode(said) + b"\n")

    source, folder, precision, provider, *rest = arguments
    try:
        logging.disable(logging.INFO)
        build(Path(source), Path(folder), precision, provider, "--no-check" not in rest, say)
    except ImportError as error:
        print(f"a package is not installed: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_PACKAGES_MISSING
    except ModelUnavailable as error:
        print(error.message, file=sys.stderr)
        return EXIT_REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
