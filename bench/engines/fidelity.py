"""How close: the built model to its source, a batch to each conversation alone, a resumed conversation to itself."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

from bench import resume
from bench.engines.child import EngineProcess
from bench.engines.loading import Which, load
from bench.engines.options import Model, Options
from bench.report import Figures, Progress
from protocol.errors import ModelError

AGREEMENT_TOKENS = 64
AGREEMENT_PROMPTS = 8


def quality(model: Model, progress: Progress) -> Figures:
    """Perplexity of each built model against its source in float32, on the texts that `mindstream models build`
    checks with."""
    figures: Figures = {"onnx_dppl_pct": None, "onnx_top1": None, "onnx_int4_dppl_pct": None, "onnx_int4_top1": None}
    for variant, key in (("int8-cpu", "onnx"), ("int4-cpu", "onnx_int4")):
        folder = model.built.get(variant)
        if folder is None:
            continue
        from services.model_runner.build_check import check_built

        progress(f"perplexity of {folder.name}")
        measured = check_built(model.folder, folder, "cpu", progress)
        if measured is not None:
            figures[f"{key}_dppl_pct"] = measured.perplexity_pct
            figures[f"{key}_top1"] = measured.top1
            progress(f"{variant}: perplexity {measured.perplexity_pct:+.2f} %, top-1 {measured.top1:.3f}")
    return figures


def agreement(engines: Sequence[Which], corpus: list[int], options: Options, progress: Progress) -> Figures:
    """Of 64 greedy tokens, the share before the first that a batch of eight chose otherwise than each prompt alone."""
    figures: Figures = {"batched_token_agreement": None, "torch_batched_token_agreement": None}
    count = 8 if options.quick else AGREEMENT_TOKENS
    # Of different lengths, so that no two rows stand at one position.
    longest = 32 if options.quick else 512
    prompts = [
        corpus[at * 997 : at * 997 + max(2, longest * (at + 1) // AGREEMENT_PROMPTS)] for at in range(AGREEMENT_PROMPTS)
    ]
    for which in engines:
        if which.label not in ("torch", "onnx_int8"):
            continue
        try:
            with EngineProcess(which) as process:
                together = process.batch(prompts, count)
                shares = []
                for prompt, batched in zip(prompts, together, strict=True):
                    process.read(prompt)
                    shares.append(_common(process.decode(count)[1], batched) / count)
        except ModelError as error:
            progress(f"{which.label} is left out: {error}")
            continue
        key = "batched_token_agreement" if which.label == "onnx_int8" else "torch_batched_token_agreement"
        figures[key] = round(statistics.mean(shares), 4)
        progress(f"{which.label}: {figures[key]:.3f} of {count} tokens agree, batched against alone")
    return figures


def resumes(options: Options, corpora: dict[str, list[int]], progress: Progress) -> Figures:
    """Saved and resumed in another process: both engines, all families. A family that an engine cannot run is said
    and left out, and stands in ``resume_left_out``."""
    tokens: list[tuple[int, float]] = []
    logits: list[tuple[int, float]] = []
    figures: Figures = {}
    left_out = []
    for model in (options.model, *options.families):
        for which in model.engines(options.threads):
            if which.label not in ("torch", "onnx_int8"):
                continue
            key = f"{slug(model.name)}_{which.label}"
            try:
                engine = load(which)
                found = resume.measure(
                    engine,
                    which,
                    corpora[model.name],
                    prompts=options.resume_prompts,
                    longest_prompt_tokens=options.longest_prompt_tokens,
                    progress=lambda line, name=model.name: progress(f"{name}: {line}"),  # type: ignore[misc]
                )
            except ModelError as error:
                progress(f"{key} is left out: {error}")
                left_out.append(key)
                continue
            finally:
                engine = None  # type: ignore[assignment]
            figures[f"{key}_resume_token_match"] = found.token_match
            figures[f"{key}_resume_logit_match"] = found.logit_match
            figures[f"{key}_resume_exact"] = found.exact
            tokens.append((found.prompts, found.token_match))
            logits.append((found.prompts, found.logit_match))
        if "int8-cpu" not in model.built:
            left_out.append(f"{slug(model.name)}_onnx_int8")
    return {
        "resume_token_match": _mean(tokens),
        "resume_logit_match": _mean(logits),
        "resume_prompts": sum(count for count, _ in tokens),
        "resume_left_out": ", ".join(sorted(set(left_out))),
        **figures,
    }


def _mean(weighted: list[tuple[int, float]]) -> float | None:
    total = sum(count for count, _ in weighted)
    return sum(count * share for count, share in weighted) / total if total else None


def slug(name: str) -> str:
    """A model's name as part of a key."""
    return "".join(letter if letter.isalnum() else "_" for letter in name.lower())


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens agree before the first that does not."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
