"""Whether a conversation that was saved goes on exactly in another process: its tokens, and its logits bit for bit."""

from __future__ import annotations

from bench import resume
from bench.engines.loading import Which, english
from bench.report import Figures
from bench.snapshot.frame import Bench

PROMPTS, LONGEST_PROMPT_TOKENS = 24, 1_024
QUICK_PROMPTS, QUICK_PROMPT_TOKENS = 3, 100


def part(bench: Bench) -> Figures:
    """The raw rung, whole way, over a process border."""
    options = bench.options
    which = Which("torch", "torch", str(options.folder), options.device, options.dtype, options.threads)
    found = resume.measure(
        bench.engine,
        which,
        bench.chat.encode(english(), special=False),
        prompts=QUICK_PROMPTS if bench.quick else PROMPTS,
        longest_prompt_tokens=QUICK_PROMPT_TOKENS if bench.quick else LONGEST_PROMPT_TOKENS,
        progress=bench.progress,
    )
    return {
        "exact_token_match": found.token_match,
        "exact_logit_match": found.logit_match,
        "exact_restored": found.exact,
        "exact_prompts": found.prompts,
    }
