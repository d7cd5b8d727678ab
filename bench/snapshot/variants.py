"""Reuse of KV between variants of one model: what a certificate allows, how close it then is on fresh texts, and how
much sooner the first token comes than by reading the prompt again.

Pairs: torch and the built int8, both ways; the base model and a LoRA of it; two LoRAs. The adapters are trained here,
once, and kept beside the bases. Certificates are measured on calibration texts, the figures on others: a sealed
snapshot of the source's is opened, decoded, taken in (with layers or recent positions computed again where the
certificate says so) and one step made, against the target reading all tokens and making that step.
"""

from __future__ import annotations

import statistics
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bench.lora import train_lora
from bench.report import Figures
from bench.snapshot.codecs import compared
from bench.snapshot.frame import Bench, read_state
from bench.snapshot.texts import measured_texts
from edge.model_cards import built_models
from edge.model_registry import default_cache_folder
from protocol.manifest import open_private
from protocol.sealing import DataKey
from services.model_runner import snapshot
from services.model_runner.codecs.ladder import Asked
from services.model_runner.codecs.texts import calibration_texts
from services.model_runner.engine import Engine
from services.model_runner.variants import Permit, Sampled, certify, permit, sample, windows_of

CALIBRATION_TEXTS, CALIBRATION_PREFIX, CALIBRATION_TEST = 4, 512, 64
KINDS = ("dialogue", "legal", "python")
"""Of the measured texts, these, or the first ones that are here."""
PREFIX_TOKENS, CONTINUATION_TOKENS = 1_024, 96
LORA_STEPS, LORA_TOKENS, LORA_RATE = 24, 128, 5e-4
LORA_QUICK_STEPS, LORA_QUICK_RATE = 2, 2e-4
"""Rank 8 on every linear layer. A quick one changes a random model little: its answers are all but even."""
PAIRS = (("torch", "int8"), ("int8", "torch"), ("torch", "lora_a"), ("lora_a", "lora_b"))
"""``torch`` is the base model on the transformers engine."""


@dataclass
class _Text:
    """One fresh text, by one variant."""

    tokens: list[int]
    continuation: list[int]
    packed: snapshot.Packed
    read_s: float
    """Reading the prompt, and one step."""
    logits: np.ndarray
    """After each token of the continuation, behind the variant's own KV."""


@dataclass
class _Pair:
    """What was measured of one pair."""

    permit: Permit | str
    kl: list[float] = field(default_factory=list)
    top1: list[float] = field(default_factory=list)
    speedup: list[float] = field(default_factory=list)


def part(bench: Bench) -> Figures:
    """All pairs that can be made here."""
    return _Variants(bench).measure()


class _Variants:
    """Loads the variants one after another, and keeps of each what the pairs need."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._key = DataKey.generate()
        self._calibration = [bench.chat.encode(text, special=False) for text in calibration_texts()]
        self._prefix, self._test = (64, 16) if bench.quick else (CALIBRATION_PREFIX, CALIBRATION_TEST)
        self._sampled: dict[str, Sampled] = {}
        self._texts: dict[str, list[_Text]] = {}

    def measure(self) -> Figures:
        """Each variant is loaded twice at most: once to read, as a source, and once to be a target."""
        progress = self._bench.progress
        adapters = {"lora_a": self._trained("code"), "lora_b": self._trained("manual")}
        int8 = self._built()
        if int8 is None:
            progress("the model is not built as int8: `mindstream models build` makes these pairs possible")
        names = [name for name in ("torch", "int8", "lora_a", "lora_b") if name != "int8" or int8]
        pairs = {}
        # The targets in this order: what is a source first has read its texts when it is wanted.
        for name in [*names, "torch"] if int8 else names:
            engine = self._engine(name, adapters, int8)
            if name not in self._sampled:
                self._read(name, engine)
            for source, target in PAIRS:
                if target == name and source in self._sampled and (source, target) not in pairs:
                    pairs[source, target] = self._pair(source, target, engine)
            del engine
        return self._figures(pairs)

    def _built(self) -> Path | None:
        """The model built as int8, if it was built of these weights."""
        sizes = {path.name: path.stat().st_size for path in self._bench.options.folder.glob("*.safetensors")}
        for each in built_models(default_cache_folder()):
            files = {file.name: file.size_bytes for file in each.card.source.files}
            if each.card.variant == "int8-cpu" and all(files.get(name) == size for name, size in sizes.items()):
                return each.folder
        return None

    def _trained(self, kind: str) -> Path:
        bench = self._bench
        weights = bench.engine.spec.digests.weights.hex()[:12]
        steps, rate = (LORA_QUICK_STEPS, LORA_QUICK_RATE) if bench.quick else (LORA_STEPS, LORA_RATE)
        folder = bench.options.bases.parent / "bench-adapters" / f"{weights}-{kind}-{steps}x{LORA_TOKENS}-{rate:g}"
        if not (folder / "adapter_config.json").is_file():
            tokens = bench.chat.encode(_training_text(kind), special=False)
            starts = range(0, len(tokens) - LORA_TOKENS, LORA_TOKENS)
            windows = [tokens[at : at + LORA_TOKENS] for at in starts][: steps + 8]
            train_lora(
                bench.options.folder,
                windows,
                folder,
                steps=steps,
                rate=rate,
                progress=bench.progress,
            )
        return folder

    def _engine(self, name: str, adapters: dict[str, Path], int8: Path | None) -> Engine:
        options = self._bench.options
        if name == "torch":
            return self._bench.engine
        self._bench.progress(f"loading {name}")
        if name == "int8":
            from services.model_runner.onnx_engine import OnnxEngine

            assert int8 is not None
            return OnnxEngine.load(int8, provider="cpu", threads=options.threads)
        from services.model_runner.transformers_engine import TransformersEngine

        return TransformersEngine.load(
            options.folder, device=options.device, dtype=options.dtype, threads=options.threads, adapter=adapters[name]
        )

    def _read(self, name: str, engine: Engine) -> None:
        """What the variant keeps of calibration and fresh texts, the latter timed."""
        bench = self._bench
        count = 2 if bench.quick else CALIBRATION_TEXTS
        windows = windows_of(self._calibration, self._prefix, self._test, count)
        bench.progress(f"{name}: reading {len(windows)} calibration texts")
        self._sampled[name] = sample(engine, windows, self._prefix)
        found = measured_texts()
        kinds = [kind for kind in (*KINDS, *(each for each in found if each not in KINDS)) if kind in found]
        prefix, rest = (96, 16) if bench.quick else (PREFIX_TOKENS, CONTINUATION_TOKENS)
        self._texts[name] = []
        for kind in kinds[: 1 if bench.quick else len(KINDS)]:
            bench.progress(f"{name}: reading {kind}")
            tokens = bench.chat.encode(found[kind], special=False)[: prefix + rest]
            started_s = time.perf_counter()
            state = read_state(engine, tokens[:prefix])
            read_s = time.perf_counter() - started_s
            # The step is made on a copy: what is packed is the state before it.
            fork = engine.fork(state.cache, prefix - 1, prefix + rest)
            assert fork is not None
            started_s = time.perf_counter()
            engine.step(fork, tokens[prefix - 1])
            read_s += time.perf_counter() - started_s
            logits = engine.read(fork, tokens[prefix:])
            fork.close()
            packed = snapshot.pack(engine, state, conversation=kind, creator="bench", key=self._key)
            state.cache.close()
            self._texts[name].append(_Text(tokens[:prefix], tokens[prefix:], packed, read_s, logits))

    def _pair(self, source: str, target: str, engine: Engine) -> _Pair:
        progress = self._bench.progress
        progress(f"{source} on {target}: measuring the certificate")
        certificate = certify(self._sampled[source], engine, "bench", layer_texts=1)
        tokens = len(self._texts[target][0].tokens) - 1
        allowed = permit(certificate, self._sampled[source].variant, engine, Asked(), tokens)
        for reuse in certificate.reuses:
            progress(
                f"  {reuse.computed_layers} layers and {reuse.recent_tokens} recent positions computed: mean KL "
                f"{reuse.mean_kl:.5f}, worst {reuse.worst_kl:.5f}, top-1 {reuse.top1:.3f}"
            )
        found = _Pair(allowed)
        if isinstance(allowed, str):
            progress(f"{source} on {target}: refused: {allowed}")
            return found
        for theirs, own in zip(self._texts[source], self._texts[target], strict=True):
            manifest = theirs.packed.manifest
            private = open_private(manifest, self._key)
            started_s = time.perf_counter()
            read = snapshot.read(engine, manifest, private, self._key, theirs.packed.chunks, variant=allowed)
            state = snapshot.restore(engine, read).state
            engine.step(state.cache, own.tokens[-1])
            took_s = time.perf_counter() - started_s
            logits = engine.read(state.cache, own.continuation)
            state.cache.close()
            answers = [*own.continuation[1:], own.continuation[-1]]  # of no account: distributions are compared
            _, divergence, top1 = compared(own.logits, logits, answers)
            found.kl.append(divergence)
            found.top1.append(top1)
            found.speedup.append(own.read_s / took_s)
        progress(
            f"{source} on {target}: {allowed.computed_layers} layers and {allowed.recent_tokens} recent positions "
            f"computed, {statistics.mean(found.speedup):.1f} times as fast, mean KL {statistics.mean(found.kl):.5f}"
        )
        return found

    @staticmethod
    def _figures(pairs: dict[tuple[str, str], _Pair]) -> Figures:
        figures: Figures = {}
        certified = []
        for source, target in PAIRS:
            name = f"variant_{source}_to_{target}"
            found = pairs.get((source, target))
            if found is None or not found.kl:
                figures[name] = "not measured" if found is None else f"refused: {found.permit}"
                continue
            assert isinstance(found.permit, Permit)
            speedup, divergence = statistics.mean(found.speedup), statistics.mean(found.kl)
            certified.append((speedup, divergence, f"{source} to {target}"))
            figures |= {
                f"{name}_computed_layers": found.permit.computed_layers,
                f"{name}_recent_tokens": found.permit.recent_tokens,
                f"{name}_speedup": round(speedup, 2),
                f"{name}_kl": round(divergence, 5),
                f"{name}_top1": round(statistics.mean(found.top1), 4),
            }
        figures |= {"variant_speedup": None, "variant_speedup_pair": None, "variant_kl": None, "variant_kl_pair": None}
        if certified:
            slowest, farthest = min(certified), max(certified, key=lambda each: each[1])
            figures["variant_speedup"], figures["variant_speedup_pair"] = round(slowest[0], 2), slowest[2]
            figures["variant_kl"], figures["variant_kl_pair"] = round(farthest[1], 5), farthest[2]
        return figures


def _training_text(kind: str) -> str:
    """Neither a calibration's nor a measurement's."""
    if kind == "code":
        folder = Path(sysconfig.get_paths()["stdlib"])
        return "".join((folder / name).read_text("utf-8") for name in ("configparser.py", "difflib.py"))
    from pydoc_data.topics import topics

    reference = "\n\n".join(topics[name] for name in sorted(topics))
    return reference[30_000:55_000]
