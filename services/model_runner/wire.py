"""Between the messages of the bus and the runner's own types: what an ask wants, and a token as it is said."""

from __future__ import annotations

from protocol.messages import ModelGenerate, RunToken, TokenChance
from services.model_runner.chat import ChatFormat
from services.model_runner.generation import GeneratedToken, GenerationSettings
from services.model_runner.sampling import SamplingSettings


def sampling_of(ask: ModelGenerate) -> SamplingSettings:
    """How the ask wants tokens chosen. Raises InvalidPrompt, naming the field."""
    return SamplingSettings(
        temperature=ask.temperature,
        top_k=ask.top_k,
        top_p=ask.top_p,
        min_p=ask.min_p,
        repetition_penalty=ask.repetition_penalty,
        seed=ask.seed,
    )


def settings_of(ask: ModelGenerate) -> GenerationSettings:
    """When the answer ends, and what is said with its tokens. Raises InvalidPrompt, naming the field."""
    return GenerationSettings(
        max_new_tokens=ask.max_new_tokens,
        stop=tuple(ask.stop),
        ignore_eos=ask.ignore_eos,
        top_logprobs=ask.top_logprobs,
        json_schema=ask.json_schema,
    )


def run_token(chat: ChatFormat, generated: GeneratedToken, text: str) -> RunToken:
    """The message of a token that adds ``text`` to the answer."""
    return RunToken(
        index=generated.index,
        token=generated.token,
        text=text,
        logprob=generated.logprob,
        entropy=generated.entropy,
        top=[TokenChance(chance.token, chat.piece(chance.token), chance.logprob) for chance in generated.top],
    )
