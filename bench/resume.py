"""Whether a saved conversation goes on exactly, over a process border.

A prompt is begun here, saved through the snapshot codec to files, and resumed by a process that loaded the model
itself; 64 more tokens are compared with those of the uninterrupted run here, and their logits bit for bit.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from bench.engines.loading import Which, load
from bench.report import Progress
from protocol.errors import ModelError
from protocol.identity import digest
from protocol.manifest import SnapshotManifest, verify_chunk
from protocol.sealing import DataKey
from services.model_runner.engine import Engine, KVCache, LayerState, Logits, OnProgress, ShouldStop
from services.model_runner.generation import GenerationSettings, GenerationState, begin, generate
from services.model_runner.sampling import SamplingSettings
from services.model_runner.snapshot import pack, unpack

RESUMED_TOKENS = 64
_CHECKOUT = Path(__file__).resolve().parent.parent
_MANIFEST = "manifest.msgpack"
_KEY = DataKey(bytes(32))
"""Both processes know it: what is measured is the state, not who may read it."""


@dataclass(frozen=True)
class Resumed:
    """What was found."""

    prompts: int
    token_match: float
    """Share of prompts whose 64 tokens are the same."""
    logit_match: float
    """Share whose logits are, bit for bit."""
    exact: float
    """Share that was restored from its KV cache, and not read again."""
    snapshot_mean_bytes: int


def measure(
    engine: Engine, which: Which, corpus: list[int], *, prompts: int, longest_prompt_tokens: int, progress: Progress
) -> Resumed:
    """Save and resume ``prompts`` of them; ``engine`` is what ``which`` describes."""
    cases = _cases(prompts, longest_prompt_tokens)
    tokens_match, logits_match, exact, size_bytes = [], [], [], []
    settings = GenerationSettings(63 + RESUMED_TOKENS, ignore_eos=True)
    with tempfile.TemporaryDirectory(prefix="mindstream-bench-") as scratch, _worker(which) as ask:
        for number, case in enumerate(cases):
            at = (number * 4099) % (len(corpus) - case.prompt_tokens)
            prompt = corpus[at : at + case.prompt_tokens]
            state = begin(engine, prompt, sampling=case.sampling, settings=settings)
            for _ in itertools.islice(generate(engine, state), case.saved_after):
                pass
            folder = Path(scratch) / str(number)
            size_bytes.append(_save(engine, state, folder))
            here = _continue(engine, state, "exact")
            state.cache.close()
            there = ask(folder)
            for file in folder.iterdir():
                file.unlink()
            tokens_match.append(here.tokens == there.tokens)
            logits_match.append(here.logits == there.logits)
            exact.append(there.how == "exact")
            progress(
                f"resume {which.label} {number + 1}/{len(cases)}: {case.prompt_tokens} + {case.saved_after} tokens, "
                f"{'same' if tokens_match[-1] else 'OTHER'} tokens, {'same' if logits_match[-1] else 'OTHER'} logits"
            )
    return Resumed(
        len(cases),
        sum(tokens_match) / len(cases),
        sum(logits_match) / len(cases),
        sum(exact) / len(cases),
        round(statistics.mean(size_bytes)),
    )


@dataclass(frozen=True)
class _Case:
    prompt_tokens: int
    saved_after: int
    """Tokens generated before the snapshot."""
    sampling: SamplingSettings


def _cases(prompts: int, longest_prompt_tokens: int) -> list[_Case]:
    """Prompt lengths spread evenly in their logarithm; half greedy, half sampled."""
    random = np.random.default_rng(2026)
    lengths = np.geomspace(16, longest_prompt_tokens, prompts).round().astype(int)
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


def _save(engine: Engine, state: GenerationState, folder: Path) -> int:
    folder.mkdir()
    packed = pack(engine, state, conversation=folder.name, creator="bench", key=_KEY)
    (folder / _MANIFEST).write_bytes(msgspec.msgpack.encode(packed.manifest))
    for index, chunk in enumerate(packed.chunks):
        (folder / f"{index:06}.chunk").write_bytes(chunk)
    return packed.manifest.total_bytes


def _load(engine: Engine, folder: Path) -> tuple[GenerationState, str]:
    manifest = msgspec.msgpack.decode((folder / _MANIFEST).read_bytes(), type=SnapshotManifest)
    chunks = [path.read_bytes() for path in sorted(folder.glob("*.chunk"))]
    for index, (ref, chunk) in enumerate(zip(manifest.chunks, chunks, strict=True)):
        verify_chunk(ref, chunk, index=index)
    unpacked = unpack(engine, manifest, _KEY, chunks)
    return unpacked.state, unpacked.how


def _continue(engine: Engine, state: GenerationState, how: str) -> _Continuation:
    recorder = _Recorder(engine)
    steps = itertools.islice(generate(recorder, state), RESUMED_TOKENS)
    return _Continuation([token.token for token in steps], recorder.digests, how)


@contextlib.contextmanager
def _worker(which: Which) -> Iterator[Callable[[Path], _Continuation]]:
    """A process with an engine of its own; called with a snapshot's folder, it goes on from there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.resume", msgspec.json.encode(which).decode()],
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


def _work(which: Which) -> None:
    """The worker: a snapshot's folder a line in, a continuation a line out."""
    engine = load(which)
    for line in sys.stdin:
        state, how = _load(engine, Path(line.rstrip("\n")))
        answer = msgspec.json.encode(_continue(engine, state, how))
        state.cache.close()
        sys.stdout.buffer.write(answer + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _work(msgspec.json.decode(sys.argv[1], type=Which))
