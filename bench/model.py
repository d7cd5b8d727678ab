"""`mindstream bench model`: our decode loop against transformers' ``generate``, and whether resume is exact.

The two loops run alternately in one call, on the same weights, dtype, threads and context, and medians are compared.
Both begin with the same KV cache, so that only decoding is timed: a prompt is read once, by our engine, and the
stock model is given a copy of that cache in its own default class.

Resume is tried over a process border: a prompt is begun here, saved through the snapshot codec to files, resumed by
a worker process that loaded the model itself, and 64 more tokens are compared with those of the uninterrupted run
here, and their logits bit for bit.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from bench import resume
from bench.engines.loading import Which, english
from bench.report import Figures, Progress, silent
from edge.hardware import describe
from services.model_runner.chat import ChatFormat
from services.model_runner.generation import (
    GenerationSettings,
    GenerationState,
    begin,
    generate,
)
from services.model_runner.sampling import Sampler, SamplingSettings
from services.model_runner.transformers_engine import TransformersEngine

LONG_CONTEXT_TOKENS = 4096


@dataclass(frozen=True)
class Options:
    """What to measure, and on which model."""

    folder: Path
    """A model folder with safetensors weights."""
    device: str = "cpu"
    dtype: str = "auto"
    threads: int = 0
    """0 is torch's own choice."""
    prompts: int = 100
    """Prompts whose resume is compared."""
    longest_prompt_tokens: int = 2048
    rounds: int = 5
    """Alternations of the two loops."""
    short_tokens: int = 64
    """Tokens decoded in a round after a short prompt."""
    long_tokens: int = 24
    """Tokens decoded in a round after 4,096."""
    quick: bool = False
    """Few prompts, rounds and tokens: shows that it works, and its figures are no measurement."""

    def effective(self) -> Options:
        """``quick`` spelt out."""
        if not self.quick:
            return self
        return Options(
            self.folder, self.device, self.dtype, self.threads, min(self.prompts, 4), 64, 1, 8, 2, quick=True
        )


def run(options: Options, progress: Progress = silent) -> Figures:
    """Measure, telling ``progress`` a line now and then. Raises what the model runner raises."""
    options = options.effective()
    progress(f"loading {options.folder.name}")
    engine = TransformersEngine.load(
        options.folder, device=options.device, dtype=options.dtype, threads=options.threads
    )
    chat = ChatFormat.load(options.folder)
    corpus = chat.encode(english(), special=False)
    figures: Figures = {"model": engine.spec.name, "dtype": engine.spec.dtype, "threads": engine.fingerprint.threads}
    figures |= _decode(engine, options, corpus, progress)
    which = Which(
        engine.spec.name, "torch", str(options.folder), engine.device, engine.spec.dtype, engine.fingerprint.threads
    )
    resumed = resume.measure(
        engine,
        which,
        corpus,
        prompts=options.prompts,
        longest_prompt_tokens=options.longest_prompt_tokens,
        progress=progress,
    )
    figures |= {
        "resume_prompts": resumed.prompts,
        "resume_token_match": resumed.token_match,
        "resume_logit_match": resumed.logit_match,
        "resume_exact": resumed.exact,
        "resume_tokens_compared": resume.RESUMED_TOKENS,
        "snapshot_mean_bytes": resumed.snapshot_mean_bytes,
    }
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")}
    figures |= {
        "machine": f"{describe().cpu_model or platform.machine()}, {os.cpu_count()} CPUs, "
        f"{engine.fingerprint.instruction_set}",
        "versions": " ".join([f"python {platform.python_version()}", *(f"{k} {v}" for k, v in versions.items())]),
        "baseline": "transformers generate(), its default DynamicCache and SDPA attention, same weights, dtype, "
        "threads and context",
    }
    return figures


def _decode(engine: TransformersEngine, options: Options, corpus: list[int], progress: Progress) -> Figures:
    progress("loading the stock model")
    # Not engine._model: that one has our attention, and our matrix products.
    stock: Any = AutoModelForCausalLM.from_pretrained(
        options.folder, dtype=getattr(torch, engine.spec.dtype), local_files_only=True
    )
    stock.to(engine.device).eval()
    stock.generation_config.eos_token_id = None
    long_context = 512 if options.quick else LONG_CONTEXT_TOKENS
    figures: Figures = {}
    for key, context, new_tokens in (
        ("decode", 64, options.short_tokens),
        ("decode_4k", long_context, options.long_tokens),
    ):
        tokens = corpus[:context]
        base = begin(engine, tokens, settings=GenerationSettings(new_tokens, ignore_eos=True))
        started = time.perf_counter()
        engine.prefill(base.cache, tokens[:-1])
        prefill_s = time.perf_counter() - started
        ours, theirs, agreed = [], [], []
        for number in range(options.rounds + 1):
            our_s, our_tokens = _time_ours(engine, base)
            their_s, their_tokens = _time_theirs(engine, stock, base, new_tokens)
            agreed.append(_common(our_tokens, their_tokens) / new_tokens)
            if number or options.quick:  # The first round warms both up.
                ours.append(new_tokens / our_s)
                theirs.append(new_tokens / their_s)
            progress(f"{key}: {new_tokens / our_s:.1f} tokens/s, generate {new_tokens / their_s:.1f}")
        figures[f"{key}_ratio_vs_generate"] = round(statistics.median(ours) / statistics.median(theirs), 3)
        figures[f"{key}_tokens_per_s"] = round(statistics.median(ours), 2)
        figures[f"{key}_generate_tokens_per_s"] = round(statistics.median(theirs), 2)
        figures[f"{key}_agreement_with_generate"] = round(statistics.median(agreed), 3)
        if context == LONG_CONTEXT_TOKENS:
            figures["prefill_4k_s"] = round(prefill_s, 2)
    return figures


def _time_ours(engine: TransformersEngine, base: GenerationState) -> tuple[float, list[int]]:
    cache = engine.import_layers(engine.export_layers(base.cache), base.cache.capacity_tokens)
    state = GenerationState(list(base.tokens), cache, Sampler(SamplingSettings()), base.settings)
    started = time.perf_counter()
    tokens = [token.token for token in generate(engine, state)]
    return time.perf_counter() - started, tokens


def _time_theirs(
    engine: TransformersEngine, stock: Any, base: GenerationState, new_tokens: int
) -> tuple[float, list[int]]:
    kv = [(_tensor(state.keys, engine), _tensor(state.values, engine)) for state in engine.export_layers(base.cache)]
    cache = DynamicCache(ddp_cache_data=kv, config=stock.config)
    for layer in cache.layers:
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = base.cache.length
    ids = torch.tensor([base.tokens], device=stock.device)
    with torch.inference_mode():
        started = time.perf_counter()
        output = stock.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=new_tokens,
            do_sample=False,
        )
        took = time.perf_counter() - started
    tokens: list[int] = output[0, len(base.tokens) :].tolist()
    return took, tokens


def _tensor(array: np.ndarray[Any, Any], engine: TransformersEngine) -> torch.Tensor:
    signed = array.copy().view(np.int16 if array.dtype.itemsize == 2 else np.int32)
    dtype = getattr(torch, engine.spec.dtype)
    return torch.from_numpy(signed).view(dtype).unsqueeze(0).to(engine.device)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens agree before the first that does not."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
