"""A built model against its source: perplexity and the likeliest token at every position of three kinds of text.

The source is computed by transformers in float32, whole texts at once; the built model by plain ONNX Runtime, in
windows, with keys and values handed from one to the next, as an engine does. The texts (``check_texts.json``) are
the project's own, and no model has been tuned on them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from edge.hardware import describe
from edge.model_cards import GRAPH_NAME, Measured, TextCheck
from protocol.errors import ModelUnavailable
from services.model_runner.distributions import log_probabilities
from services.model_runner.engine import Engine
from services.model_runner.onnx_graph import INDICES_NAME

TEXTS = Path(__file__).with_name("check_texts.json")
MAX_TOKENS = 640
"""Of each text: enough for a steady ratio, since both see the same tokens."""
WINDOW_TOKENS = 128
RATE_PROMPT_TOKENS, RATE_STEPS = 64, 32

Floats = npt.NDArray[np.float32]


class CheckText(msgspec.Struct):
    """One text of ``check_texts.json``."""

    kind: str
    text: str


def check_built(source: Path, folder: Path, provider: str, say: Callable[[str], None]) -> Measured | None:
    """Compare the built model in ``folder`` with its ``source``; None where its provider is not at hand."""
    import onnxruntime
    import transformers
    from transformers import AutoTokenizer

    wanted = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[provider]
    if wanted not in onnxruntime.get_available_providers():
        say(f"not checked: the installed onnxruntime has no {wanted}")
        return None
    tokenizer: Any = AutoTokenizer.from_pretrained(source, local_files_only=True)
    texts = [(text.kind, tokenizer.encode(text.text)[:MAX_TOKENS]) for text in load_texts()]
    say("checking: the source in float32")
    of_source = _source_logits(source, [tokens for _, tokens in texts])
    say("checking: the built model")
    session = onnxruntime.InferenceSession(str(folder / GRAPH_NAME), providers=[wanted])
    checks, totals = [], np.zeros(4)
    for (kind, tokens), expected in zip(texts, of_source, strict=True):
        found = graph_logits(session, tokens)
        counts = compare(expected, found, tokens)
        totals += counts
        checks.append(
            TextCheck(
                kind,
                int(counts[3]),
                _perplexity(counts[0], counts[3]),
                _perplexity(counts[1], counts[3]),
                round(float(counts[2] / counts[3]), 4),
            )
        )
    if not np.isfinite(totals).all():
        raise ModelUnavailable("the built model computes no numbers: its logits are not finite")
    return Measured(
        reference=f"transformers {transformers.__version__} float32",
        texts=tuple(checks),
        perplexity_pct=round(100 * math.expm1((totals[1] - totals[0]) / totals[3]), 3),
        top1=round(float(totals[2] / totals[3]), 4),
    )


def with_rates(measured: Measured, source: Path, folder: Path, provider: str, say: Callable[[str], None]) -> Measured:
    """``measured`` with the decode rates of both engines on this machine, one conversation on a short prompt."""
    from services.model_runner.onnx_engine import OnnxEngine
    from services.model_runner.transformers_engine import TransformersEngine

    say("measuring decode on both engines")
    built = OnnxEngine.load(folder, provider=provider)
    built_rate = decode_rate(built)
    threads = built.fingerprint.threads
    del built
    reference = TransformersEngine.load(source, device=provider)
    numerics = reference.fingerprint
    return msgspec.structs.replace(
        measured,
        decode_tokens_per_s=built_rate,
        source_decode_tokens_per_s=decode_rate(reference),
        source_dtype=reference.spec.dtype,
        machine=f"{describe().cpu_model if provider == 'cpu' else numerics.device}, {threads} threads",
    )


def decode_rate(engine: Engine) -> float:
    """Tokens per second, from the median of ``RATE_STEPS`` steps after a prompt of ``RATE_PROMPT_TOKENS``."""
    cache = engine.new_cache(min(RATE_PROMPT_TOKENS + RATE_STEPS, engine.spec.context_tokens))
    prompt = [position % engine.spec.vocab_size for position in range(cache.capacity_tokens - RATE_STEPS)]
    engine.prefill(cache, prompt)
    token, steps_s = 1, []
    for _ in range(RATE_STEPS):
        started_s = time.perf_counter()
        token = int(engine.step(cache, token).argmax())
        steps_s.append(time.perf_counter() - started_s)
    cache.close()
    return round(1 / statistics.median(steps_s), 1)


def load_texts() -> list[CheckText]:
    """The texts of the check."""
    return msgspec.json.decode(TEXTS.read_bytes(), type=list[CheckText])


def compare(expected: Floats, found: Floats, tokens: list[int]) -> npt.NDArray[np.float64]:
    """Nats of source and built model, positions whose likeliest token is the same, and positions.

    ``expected`` and ``found``: (tokens, vocabulary).
    """
    answers = np.asarray(tokens[1:])
    rows = np.arange(len(answers))
    nats = [float(-log_probabilities(logits)[rows, answers].sum()) for logits in (expected[:-1], found[:-1])]
    same = (expected[:-1].argmax(1) == found[:-1].argmax(1)).sum()
    return np.array([*nats, same, len(answers)], np.float64)


def graph_logits(session: Any, tokens: list[int]) -> Floats:
    """Logits of every position, (tokens, vocabulary), computed window by window with past keys and values."""
    inputs = {each.name: each for each in session.get_inputs()}
    past: dict[str, Any] = {}
    for name, each in inputs.items():
        if name.startswith("past_key_values."):
            dtype = np.float16 if each.type == "tensor(float16)" else np.float32
            # Layers of a graph differ at most in the number of heads; the last dimension may be symbolic.
            past[name] = np.zeros((1, each.shape[1], 0, _head_size(session, each)), dtype)
    outputs = [each.name for each in session.get_outputs()]
    rows = []
    for start in range(0, len(tokens), WINDOW_TOKENS):
        window = tokens[start : start + WINDOW_TOKENS]
        feed: dict[str, Any] = {"input_ids": np.array([window], np.int64), **past}
        end = start + len(window)
        if "attention_mask" in inputs:
            feed["attention_mask"] = np.ones((1, end), np.int64)
        if "position_ids" in inputs:
            feed["position_ids"] = np.arange(start, end, dtype=np.int64)[None]
        if INDICES_NAME in inputs:
            feed[INDICES_NAME] = np.arange(len(window), dtype=np.int64)
        found = dict(zip(outputs, session.run(None, feed), strict=True))
        rows.append(found.pop("logits")[0].astype(np.float32))
        past = {name.replace("present.", "past_key_values."): value for name, value in found.items()}
    return np.concatenate(rows)


def _head_size(session: Any, each: Any) -> int:
    if isinstance(each.shape[3], int):
        return int(each.shape[3])
    folder = Path(session._model_path).parent
    return int(msgspec.json.decode((folder / "genai_config.json").read_bytes())["model"]["decoder"]["head_size"])


def _source_logits(source: Path, texts: list[list[int]]) -> list[Floats]:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, local_files_only=True, use_safetensors=True, trust_remote_code=False
    ).eval()
    with torch.inference_mode():
        return [model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy() for tokens in texts]


def _perplexity(nats: float, count: float) -> float:
    return round(math.exp(nats / count), 3)
