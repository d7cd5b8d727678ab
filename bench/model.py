"""`mindstream bench model`: our decode loop against transformers' ``generate``, and whether resume is exact.

The two loops run alternately in one call, on the same weights, dtype, threads and context, and medians are compared.
Both begin with the same KV cache, so that only decoding is timed: a prompt is read once, by our engine, and the
stock model is given a copy of that cache in its own default class.

Resume is tried over a process border: a prompt is begun here, saved through the snapshot codec to files, resumed by
a worker process that loaded the model itself, and 64 more tokens are compared with those of the uninterrupted run
here, and their logits bit for bit.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from edge.hardware import describe
from protocol.errors import ModelError
from protocol.identity import digest
from protocol.manifest import SnapshotManifest, verify_chunk
from services.model_runner.chat import ChatFormat
from services.model_runner.engine import Engine, KVCache, LayerState, Logits, OnProgress, ShouldStop
from services.model_runner.generation import (
    GenerationSettings,
    GenerationState,
    begin,
    generate,
)
from services.model_runner.sampling import Sampler, SamplingSettings
from services.model_runner.snapshot import pack, unpack
from services.model_runner.transformers_engine import TransformersEngine

Figures = dict[str, float | int | str | None]
Progress = Callable[[str], None]

RESUMED_TOKENS = 64
LONG_CONTEXT_TOKENS = 4096
_CHECKOUT = Path(__file__).resolve().parent.parent
_MANIFEST = "manifest.msgpack"


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


def _silent(_line: str) -> None:
    """Progress for those who do not ask."""


def run(options: Options, progress: Progress = _silent) -> Figures:
    """Measure, telling ``progress`` a line now and then. Raises what the model runner raises."""
    options = options.effective()
    progress(f"loading {options.folder.name}")
    engine = TransformersEngine.load(
        options.folder, device=options.device, dtype=options.dtype, threads=options.threads
    )
    chat = ChatFormat.load(options.folder)
    corpus = chat.encode(_english(), special=False)
    figures: Figures = {"model": engine.spec.name, "dtype": engine.spec.dtype, "threads": engine.fingerprint.threads}
    figures |= _decode(engine, options, corpus, progress)
    figures |= _resume(engine, options, corpus, progress)
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


@dataclass(frozen=True)
class _Case:
    prompt_tokens: int
    saved_after: int
    """Tokens generated before the snapshot."""
    sampling: SamplingSettings


def _cases(options: Options) -> list[_Case]:
    """Prompt lengths spread evenly in their logarithm; half greedy, half sampled."""
    random = np.random.default_rng(2026)
    lengths = np.geomspace(16, options.longest_prompt_tokens, options.prompts).round().astype(int)
    cases = []
    for number, length in enumerate(random.permutation(lengths)):
        sampling = SamplingSettings(temperature=0.8, top_p=0.95, seed=number) if number % 2 else SamplingSettings()
        cases.append(_Case(int(length), int(random.integers(1, 64)), sampling))
    return cases


class _Recorder(Engine):
    """An engine that keeps the digest of every step's logits."""

    def __init__(self, engine: Engine) -> None:
        self.spec = engine.spec
        self.fingerprint = engine.fingerprint
        self.digests: list[str] = []
        self._engine = engine

    def step(self, cache: KVCache, token: int) -> Logits:
        logits = self._engine.step(cache, token)
        self.digests.append(digest(logits.tobytes()).hex())
        return logits

    def new_cache(self, capacity_tokens: int) -> KVCache:
        return self._engine.new_cache(capacity_tokens)

    def prefill(
        self,
        cache: KVCache,
        tokens: Sequence[int],
        should_stop: ShouldStop | None = None,
        on_progress: OnProgress | None = None,
    ) -> int:
        return self._engine.prefill(cache, tokens, should_stop, on_progress)

    def export_layers(self, cache: KVCache) -> list[LayerState]:
        return self._engine.export_layers(cache)

    def import_layers(self, layers: Sequence[LayerState], capacity_tokens: int) -> KVCache:
        return self._engine.import_layers(layers, capacity_tokens)


class _Continuation(msgspec.Struct):
    """What came after a snapshot."""

    tokens: list[int]
    logits: list[str]
    how: str


def _resume(engine: TransformersEngine, options: Options, corpus: list[int], progress: Progress) -> Figures:
    cases = _cases(options)
    tokens_match, logits_match, exact, size_bytes = [], [], [], []
    settings = GenerationSettings(63 + RESUMED_TOKENS, ignore_eos=True)
    with tempfile.TemporaryDirectory(prefix="mindstream-bench-") as scratch, _worker(engine, options) as ask:
        for number, case in enumerate(cases):
            at = (number * 4099) % (len(corpus) - case.prompt_tokens)
            prompt = corpus[at : at + case.prompt_tokens]
            state = begin(engine, prompt, sampling=case.sampling, settings=settings)
            for _ in itertools.islice(generate(engine, state), case.saved_after):
                pass
            folder = Path(scratch) / str(number)
            size_bytes.append(_save(engine, state, folder))
            here = _continue(engine, state, "exact")
            there = ask(folder)
            for file in folder.iterdir():
                file.unlink()
            tokens_match.append(here.tokens == there.tokens)
            logits_match.append(here.logits == there.logits)
            exact.append(there.how == "exact")
            progress(
                f"resume {number + 1}/{len(cases)}: {case.prompt_tokens} + {case.saved_after} tokens, "
                f"{'same' if tokens_match[-1] else 'OTHER'} tokens, {'same' if logits_match[-1] else 'OTHER'} logits"
            )
    return {
        "resume_prompts": len(cases),
        "resume_token_match": sum(tokens_match) / len(cases),
        "resume_logit_match": sum(logits_match) / len(cases),
        "resume_exact": sum(exact) / len(cases),
        "resume_tokens_compared": RESUMED_TOKENS,
        "snapshot_mean_bytes": round(statistics.mean(size_bytes)),
    }


def _save(engine: Engine, state: GenerationState, folder: Path) -> int:
    folder.mkdir()
    packed = pack(engine, state, conversation=folder.name, creator="bench")
    (folder / _MANIFEST).write_bytes(msgspec.msgpack.encode(packed.manifest))
    for index, chunk in enumerate(packed.chunks):
        (folder / f"{index:06}.chunk").write_bytes(chunk)
    return packed.manifest.total_bytes


def _load(engine: Engine, folder: Path) -> tuple[GenerationState, str]:
    manifest = msgspec.msgpack.decode((folder / _MANIFEST).read_bytes(), type=SnapshotManifest)
    chunks = [path.read_bytes() for path in sorted(folder.glob("*.chunk"))]
    for index, (ref, chunk) in enumerate(zip(manifest.chunks, chunks, strict=True)):
        verify_chunk(ref, chunk, index=index)
    unpacked = unpack(engine, manifest, chunks)
    return unpacked.state, unpacked.how


def _continue(engine: Engine, state: GenerationState, how: str) -> _Continuation:
    recorder = _Recorder(engine)
    steps = itertools.islice(generate(recorder, state), RESUMED_TOKENS)
    return _Continuation([token.token for token in steps], recorder.digests, how)


@contextlib.contextmanager
def _worker(engine: TransformersEngine, options: Options) -> Iterator[Callable[[Path], _Continuation]]:
    """A process with an engine of its own; called with a snapshot's folder, it goes on from there."""
    request = [str(options.folder), engine.device, engine.spec.dtype, str(engine.fingerprint.threads)]
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.model", *request],
        cwd=_CHECKOUT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def ask(folder: Path) -> _Continuation:
        stdin.write(f"{folder}\n".encode())
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise ModelError(
                f"resuming {folder.name} in another process: it ended with code {process.wait()}",
                hint="its error stands above",
                reason="worker ended",
            )
        return msgspec.json.decode(line, type=_Continuation)

    try:
        yield ask
    finally:
        stdin.close()  # The end of its input ends it.
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        stdout.close()


def _work(folder: Path, device: str, dtype: str, threads: int) -> None:
    """The worker: a snapshot's folder a line in, a continuation a line out."""
    engine = TransformersEngine.load(folder, device=device, dtype=dtype, threads=threads)
    for line in sys.stdin:
        state, how = _load(engine, Path(line.rstrip("\n")))
        sys.stdout.buffer.write(msgspec.json.encode(_continue(engine, state, how)) + b"\n")
        sys.stdout.buffer.flush()


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens agree before the first that does not."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _english() -> str:
    """Real text that is on every machine: the reference that comes with Python."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


if __name__ == "__main__":
    _work(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
