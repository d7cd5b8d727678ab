"""What a request asks for, read from its JSON: every parameter is obeyed, known to change nothing, or refused.

One table a path: what is obeyed are the fields of a struct; ``NEUTRAL`` has what may stand there as long as it asks
for nothing; what is in neither is refused by name, as OpenAI does.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from protocol.errors import UNREADABLE
from protocol.messages import ChatMessage, Name
from services.gateway.errors import ApiError

SEED_MASK = 2**63 - 1
MAX_CHOICES = 16
"""Of one request: a prompt's list times ``n``."""
MAX_TOP_LOGPROBS = 20
COMPLETION_TOKENS = 16
"""OpenAI's default of /v1/completions."""

_IGNORED: frozenset[str] = frozenset(
    {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"}
)
"""They say something to OpenAI's own bookkeeping, and nothing about the answer."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "store": (False,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
"""Parameters that are not supported, with the values that ask for nothing."""

_INSTEAD = {
    "frequency_penalty": "`repetition_penalty` is supported",
    "presence_penalty": "`repetition_penalty` is supported",
    "tools": "models are run without tools; put what they need into the messages, or use response_format",
    "functions": "models are run without tools; put what they need into the messages, or use response_format",
    "echo": "send a chat, or keep the prompt on your side",
    "dimensions": "vectors come in the model's own size",
    "store": "answers are not stored",
    "best_of": "use `n`, and choose on your side",
}

Texts = Annotated[list[str], Meta(min_length=1)]
TokenIds = Annotated[list[Annotated[int, Meta(ge=0, le=2**31)]], Meta(min_length=1)]


class StreamOptions(msgspec.Struct):
    """What comes with a stream."""

    include_usage: bool | None = False
    include_obfuscation: bool | None = False
    """Padding against who listens to the wire; there is none."""


class Common(msgspec.Struct, kw_only=True):
    """What chat and completions share."""

    model: Annotated[str, Meta(min_length=1, max_length=200)]
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | Annotated[list[str], Meta(max_length=16)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    service_tier: str | None = None
    """``flex``: nobody waits for the answer, it gives way to those that somebody waits for."""
    # Beyond OpenAI's.
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None


class ChatRequest(Common, kw_only=True):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: dict[str, Any] | None = None
    conversation: Name | None = None


class CompletionRequest(Common, kw_only=True):
    """The body of /v1/completions."""

    prompt: str | list[Any]
    logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    """The body of /v1/embeddings."""

    model: Annotated[str, Meta(min_length=1, max_length=200)]
    input: str | list[Any]
    encoding_format: str | None = "float"


@dataclass
class Wanted:
    """A request for text, whichever path it came by."""

    chat: bool
    model: str
    prompts: list[list[ChatMessage] | str | list[int]]
    """One for each run, before ``n``."""
    settings: dict[str, Any]
    """Fields of ModelGenerate."""
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    logprobs: bool = False
    conversation: str = ""
    """A conversation that the client named: it holds the history, the request has what is new."""
    seeds: list[int] = field(default_factory=list)


T = TypeVar("T", bound=msgspec.Struct)


def read(body: bytes, kind: type[T]) -> T:
    """The body of a request as ``kind``. Raises ApiError, naming the parameter."""
    try:
        tree = msgspec.json.decode(body)
    except UNREADABLE as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(tree, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    fields = kind.__struct_fields__
    wanted = {}
    for name, value in tree.items():
        if name in fields:
            wanted[name] = value
        elif value is not None and name not in _IGNORED:
            _check_neutral(name, value)
    try:
        return msgspec.convert(wanted, kind)
    except UNREADABLE as error:
        text, _, path = str(error).partition(" - at `$.")
        param = path.rstrip("`") or _missing(text)
        raise ApiError(
            400, f"{param or 'the request'} is not right: {text}", param=param, code="invalid_value"
        ) from None


def _check_neutral(name: str, value: Any) -> None:
    shown = name[:80]
    if name not in _NEUTRAL:
        known = name in _INSTEAD
        text = f"{shown} is not supported" if known else f"unrecognized request argument supplied: {shown}"
        hint = f"; {_INSTEAD[name]}" if known else ""
        raise ApiError(400, text + hint, param=shown, code="unsupported_parameter" if known else "unknown_parameter")
    if not any(value == neutral for neutral in _NEUTRAL[name]):
        hint = f"; {_INSTEAD[name]}" if name in _INSTEAD else ""
        raise ApiError(400, f"{name} is not supported{hint}", param=name, code="unsupported_parameter")


def _missing(text: str) -> str:
    """The name in "Object missing required field `name`"."""
    return text.split("`")[-2] if text.startswith("Object missing") and text.count("`") >= 2 else ""


def chat(body: bytes, *, max_answer_tokens: int) -> Wanted:
    """A request of /v1/chat/completions. Raises ApiError."""
    request = read(body, ChatRequest)
    limits = [limit for limit in (request.max_completion_tokens, request.max_tokens) if limit is not None]
    if len(set(limits)) > 1:
        raise ApiError(400, "max_tokens and max_completion_tokens differ: give one", param="max_tokens")
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs", code="invalid_value")
    if request.conversation and (request.n or 1) > 1:
        raise ApiError(400, "a named conversation has one answer: n must be 1", param="n", code="invalid_value")
    settings = _settings(request, limits[0] if limits else max_answer_tokens)
    settings["top_logprobs"] = request.top_logprobs or 0
    settings["json_schema"] = _schema(request.response_format)
    messages = [_message(message, index) for index, message in enumerate(request.messages)]
    return _wanted(
        request,
        [messages],
        settings,
        chat=True,
        logprobs=bool(request.logprobs),
        conversation=request.conversation or "",
    )


def completion(body: bytes) -> Wanted:
    """A request of /v1/completions. Raises ApiError."""
    request = read(body, CompletionRequest)
    settings = _settings(request, request.max_tokens or COMPLETION_TOKENS)
    settings["top_logprobs"] = request.logprobs or 0
    prompts = _prompts(request.prompt)
    if len(prompts) * (request.n or 1) > MAX_CHOICES:
        raise ApiError(400, f"{len(prompts)} prompts times n are more than {MAX_CHOICES} answers", param="prompt")
    return _wanted(request, prompts, settings, chat=False, logprobs=request.logprobs is not None)


def embedding(body: bytes) -> tuple[str, list[str], bool]:
    """A request of /v1/embeddings: model, texts, whether vectors come as base64. Raises ApiError."""
    request = read(body, EmbeddingRequest)
    if request.encoding_format not in ("float", "base64", None):
        raise ApiError(400, "encoding_format is float or base64", param="encoding_format", code="invalid_value")
    texts = [request.input] if isinstance(request.input, str) else request.input
    if not texts or len(texts) > 2048:
        raise ApiError(400, "input has 1 to 2,048 texts", param="input", code="invalid_value")
    if not all(isinstance(text, str) for text in texts):
        raise ApiError(
            400, "input is a text or a list of texts; token ids are not supported", param="input", code="invalid_value"
        )
    if not all(text.strip() for text in texts):
        raise ApiError(400, "input has an empty text", param="input", code="invalid_value")
    return request.model, texts, request.encoding_format == "base64"


def _wanted(
    request: Common, prompts: list[Any], settings: dict[str, Any], *, chat: bool, logprobs: bool, conversation: str = ""
) -> Wanted:
    options = request.stream_options
    if options is not None and not request.stream:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options", code="invalid_value")
    n = request.n or 1
    first = secrets.randbits(62) if request.seed is None else request.seed & SEED_MASK
    return Wanted(
        chat=chat,
        model=request.model,
        prompts=prompts,
        settings=settings,
        n=n,
        stream=bool(request.stream),
        include_usage=bool(options and options.include_usage),
        logprobs=logprobs,
        conversation=conversation,
        seeds=[(first + index) & SEED_MASK for index in range(len(prompts) * n)],
    )


def _settings(request: Common, max_new_tokens: int) -> dict[str, Any]:
    """Fields of ModelGenerate, with OpenAI's defaults."""
    if request.service_tier not in (None, "auto", "default", "flex"):
        raise ApiError(400, "service_tier is auto, default or flex", param="service_tier", code="invalid_value")
    stop = request.stop or []
    return {
        "max_new_tokens": max_new_tokens,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_p": 1.0 if request.top_p is None else max(request.top_p, 1e-9),
        "top_k": request.top_k or 0,
        "min_p": request.min_p or 0.0,
        "repetition_penalty": 1.0 if request.repetition_penalty is None else request.repetition_penalty,
        "stop": [stop] if isinstance(stop, str) else stop,
        "priority": "background" if request.service_tier == "flex" else "person",
    }


def _schema(response_format: dict[str, Any] | None) -> str:
    """The JSON Schema that the answer must meet, as text; empty for plain text."""
    if response_format is None or response_format.get("type") == "text":
        return ""
    if response_format.get("type") == "json_object":
        return '{"type":"object"}'
    wrapped = response_format.get("json_schema")
    if response_format.get("type") != "json_schema" or not isinstance(wrapped, dict):
        raise ApiError(
            400,
            "response_format is {type: text}, {type: json_object} or {type: json_schema, json_schema: {name, schema}}",
            param="response_format",
            code="invalid_value",
        )
    schema = wrapped.get("schema")
    if not isinstance(schema, dict):
        raise ApiError(400, "json_schema.schema is not an object", param="response_format", code="invalid_value")
    return msgspec.json.encode(schema).decode()


def _prompts(prompt: str | list[Any]) -> list[Any]:
    """A text, several texts, token ids, or several lists of them."""
    if prompt == "" or (isinstance(prompt, list) and "" in prompt):
        raise ApiError(
            400, "prompt has an empty text: there is nothing to go on from", param="prompt", code="invalid_value"
        )
    if isinstance(prompt, str):
        return [prompt]
    for kind, wrap in ((Texts, False), (TokenIds, True), (Annotated[list[TokenIds], Meta(min_length=1)], False)):
        try:
            found: list[Any] = msgspec.convert(prompt, kind)
        except msgspec.ValidationError:
            continue
        return [found] if wrap else found
    raise ApiError(
        400, "prompt is a text, texts, token ids, or lists of token ids", param="prompt", code="invalid_value"
    )


_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def _message(message: dict[str, Any], index: int) -> ChatMessage:
    where = f"messages[{index}]"
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise ApiError(
            400,
            f"{where}.role {str(role)[:40]!r} is not supported: system, developer, user or assistant",
            param=f"{where}.role",
            code="invalid_value",
        )
    for name, value in message.items():
        if name not in ("role", "content") and value not in (None, [], ""):
            raise ApiError(
                400, f"{where}.{name[:40]} is not supported", param=f"{where}.{name[:40]}", code="unsupported_parameter"
            )
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(_part(part, f"{where}.content[{at}]") for at, part in enumerate(content))
    if not isinstance(content, str):
        raise ApiError(
            400, f"{where}.content is not a text, nor a list of texts", param=f"{where}.content", code="invalid_value"
        )
    return ChatMessage(_ROLES[role], content)


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("text") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(text, str):
        raise ApiError(
            400,
            f"{where} is {str(kind)[:40]!r}: parts of type text are supported",
            param=where,
            code="unsupported_parameter",
        )
    return text
