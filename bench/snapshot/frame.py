"""What the parts of `mindstream bench snapshot` have in common: options, the model, its basis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from bench.report import Progress

if TYPE_CHECKING:
    from services.model_runner.chat import ChatFormat
    from services.model_runner.codecs.basis import Basis
    from services.model_runner.engine import Engine
    from services.model_runner.generation import GenerationState
    from services.model_runner.transformers_engine import TransformersEngine


@dataclass(frozen=True)
class Options:
    """What to measure, and on which model."""

    folder: Path
    """A model folder with safetensors weights."""
    bases: Path
    """Where a model's basis is kept between runs."""
    device: str = "cpu"
    dtype: str = "auto"
    threads: int = 0
    """0 is torch's own choice."""
    parts: Sequence[str] = ()
    """Empty: all of them."""
    name: str = ""
    """Of the model, for nodes that find it themselves, built for the fastest engine where it is; empty: the folder."""
    quick: bool = False
    """Short texts: shows that it works, and its figures are no measurement."""


class Bench:
    """Given to every part; the model is loaded, and its basis made, by the first part that wants it."""

    def __init__(self, options: Options, progress: Progress) -> None:
        self.options = options
        self.progress = progress

    @property
    def quick(self) -> bool:
        """Whether it is to show that it works, and no more."""
        return self.options.quick

    @cached_property
    def engine(self) -> TransformersEngine:
        """The model on the reference engine. Raises ModelUnavailable."""
        from services.model_runner.transformers_engine import TransformersEngine

        options = self.options
        self.progress(f"loading {options.folder.name}")
        return TransformersEngine.load(
            options.folder, device=options.device, dtype=options.dtype, threads=options.threads
        )

    @cached_property
    def chat(self) -> ChatFormat:
        """Its tokenizer and chat template."""
        from services.model_runner.chat import ChatFormat

        return ChatFormat.load(self.options.folder)

    @cached_property
    def basis(self) -> Basis:
        """The model's, as it was calibrated before, or made now, which takes minutes."""
        from bench.snapshot.codecs import basis_of

        return basis_of(self.engine, self.chat, self.basis_file, self.progress, self.quick)

    @property
    def basis_file(self) -> Path:
        """Where it is kept. A quick one is poor: it must not be taken for the model's in a later run."""
        return self.options.bases / f"{self.engine.spec.name}{'-quick' if self.quick else ''}.basis"


def read_state(engine: Engine, tokens: list[int]) -> GenerationState:
    """A conversation whose prompt is ``tokens``, read up to the pending one; its cache is the caller's to close."""
    from services.model_runner.generation import begin

    state = begin(engine, tokens)
    engine.prefill(state.cache, tokens[:-1])
    return state
