"""What `mindstream bench engines` measures, and how much of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.engines.loading import Which

PARTS = ("decode", "quality", "agreement", "resume", "serving")
"""Each can be measured alone."""
ENGINES = ("torch_stock", "torch", "onnx_int8", "onnx_int4")
CUDA_ENGINES = ("torch_stock_cuda", "torch_cuda", "onnx_fp16_cuda")
CONTEXTS = (64, 256, 1024, 2048, 4096)


@dataclass(frozen=True)
class Model:
    """A model, and what was built from it."""

    name: str
    folder: Path
    """With safetensors weights and a tokenizer."""
    built: dict[str, Path] = field(default_factory=dict)
    """By ``precision-provider``, such as ``int8-cpu``."""

    def engines(self, threads: int, *, cuda: bool = False) -> list[Which]:
        """Every engine that can run it here."""
        folder = str(self.folder)
        found = [
            Which("torch_stock", "stock", folder, threads=threads),
            Which("torch", "torch", folder, threads=threads),
        ]
        for precision in ("int8", "int4"):
            if path := self.built.get(f"{precision}-cpu"):
                found.append(Which(f"onnx_{precision}", "onnx", str(path), threads=threads))
        if cuda:
            found.append(Which("torch_stock_cuda", "stock", folder, "cuda", "bfloat16", threads))
            found.append(Which("torch_cuda", "torch", folder, "cuda", "auto", threads))
            if path := self.built.get("fp16-cuda"):
                found.append(Which("onnx_fp16_cuda", "onnx", str(path), "cuda", "auto", threads))
        return found


@dataclass(frozen=True)
class Options:
    """What to measure."""

    model: Model
    """Every figure without a model's name is of this one."""
    families: Sequence[Model] = ()
    """Others, whose speed is measured at fewer lengths, and whose resume is compared."""
    parts: Sequence[str] = PARTS
    threads: int = 0
    """Of every engine; 0: as many as this process may use."""
    rounds: int = 5
    """Alternations of the engines."""
    contexts: Sequence[int] = CONTEXTS
    decoded: int = 32
    """Tokens decoded in a round."""
    resume_prompts: int = 16
    longest_prompt_tokens: int = 1024
    streams: int = 8
    stream_prompt_tokens: int = 64
    stream_tokens: int = 64
    long_prompt_tokens: int = 1024
    quick: bool = False
    """Short prompts, one round: shows that it works, and its figures are no measurement."""

    def effective(self) -> Options:
        """``quick`` and 0 spelt out."""
        threads = self.threads or len(os.sched_getaffinity(0))
        if not self.quick:
            return Options(**{**self.__dict__, "threads": threads})
        return Options(
            self.model,
            self.families,
            self.parts,
            threads,
            rounds=1,
            contexts=(16, 32, 64),
            decoded=4,
            resume_prompts=2,
            longest_prompt_tokens=48,
            streams=self.streams,
            stream_prompt_tokens=16,
            stream_tokens=16,
            long_prompt_tokens=200,
            quick=True,
        )
