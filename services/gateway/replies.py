"""What is sent back: JSON objects and server-sent events, in OpenAI's form.

Of an event only the text differs from token to token: what stands around it is encoded once an answer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from protocol.messages import RunDone, RunToken, Usage

encode = msgspec.json.encode

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": the model is at work\n\n"

_ODD_LINE_ENDS = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))


def event(body: bytes) -> bytes:
    """One server-sent event. Characters that some readers take for the end of a line are escaped."""
    if not body.isascii():
        for character, escaped in _ODD_LINE_ENDS:
            body = body.replace(character, escaped)
    return b"data: " + body + b"\n\n"


def usage(found: Sequence[Usage]) -> dict[str, Any]:
    """OpenAI's usage, of all answers of a request together."""
    prompt = sum(each.prompt_tokens for each in found)
    completion = sum(each.completion_tokens for each in found)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(each.cached_tokens for each in found)},
    }


def own(nodes: Sequence[str], found: Sequence[Usage]) -> dict[str, Any]:
    """Mindstream's own member of an answer: who gave it, and what it cost there."""
    told: dict[str, Any] = {"node": ", ".join(dict.fromkeys(nodes))}
    if len(found) == 1:
        fields = msgspec.to_builtins(found[0])
        told |= {name: fields[name] for name in fields if name not in ("prompt_tokens", "completion_tokens")}
    return told


class Reply:
    """The form of one request's answers. Subclasses: a chat's and a completion's."""

    prefix: str
    whole: str
    chunk: str

    def __init__(self, identifier: str, model: str, *, logprobs: bool, include_usage: bool) -> None:
        self._head: dict[str, Any] = {"id": f"{self.prefix}-{identifier}", "created": int(time.time()), "model": model}
        self._logprobs = logprobs
        self._include_usage = include_usage
        # {"id":…,"object":…,"usage":null,"choices":[{"index":
        head = {**self._head, "object": self.chunk, **({"usage": None} if include_usage else {})}
        self._begin = encode(head)[:-1] + b',"choices":[{"index":'

    def _chunk(self, choice: int, rest: bytes) -> bytes:
        return event(self._begin + b"%d" % choice + rest + b"}]}")

    def first(self, choice: int) -> bytes:
        """The event that comes before the first token's."""
        raise NotImplementedError

    def token(self, choice: int, text: str, token: RunToken | None) -> bytes:
        """The event of one token (of a piece of text, when ``token`` is None)."""
        raise NotImplementedError

    def last(self, choice: int, finish_reason: str) -> bytes:
        """The event that ends one answer."""
        raise NotImplementedError

    def _choice(self, choice: int, done: RunDone, tokens: Sequence[RunToken]) -> dict[str, Any]:
        raise NotImplementedError

    def end(self, nodes: Sequence[str], found: Sequence[Usage]) -> bytes:
        """The events after all answers."""
        if not self._include_usage:
            return DONE
        last = {**self._head, "object": self.chunk, "choices": [], "usage": usage(found)}
        return event(encode({**last, "mindstream": own(nodes, found)})) + DONE

    def complete(self, answers: Sequence[tuple[RunDone, Sequence[RunToken]]], nodes: Sequence[str]) -> bytes:
        """The whole reply, of a request that is not streamed."""
        found = [done.usage for done, _ in answers if done.usage is not None]
        return encode(
            {
                **self._head,
                "object": self.whole,
                "choices": [self._choice(index, done, tokens) for index, (done, tokens) in enumerate(answers)],
                "usage": usage(found),
                "mindstream": own(nodes, found),
            }
        )


class ChatReply(Reply):
    """Of /v1/chat/completions."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self, choice: int) -> bytes:
        return self._chunk(choice, b',"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null')

    def token(self, choice: int, text: str, token: RunToken | None) -> bytes:
        logprobs = encode({"content": [_chat_logprob(token)]}) if self._logprobs and token is not None else b"null"
        return self._chunk(
            choice, b',"delta":{"content":' + encode(text) + b'},"logprobs":' + logprobs + b',"finish_reason":null'
        )

    def last(self, choice: int, finish_reason: str) -> bytes:
        return self._chunk(choice, b',"delta":{},"logprobs":null,"finish_reason":' + encode(finish_reason))

    def _choice(self, choice: int, done: RunDone, tokens: Sequence[RunToken]) -> dict[str, Any]:
        return {
            "index": choice,
            "message": {"role": "assistant", "content": done.text, "refusal": None},
            "logprobs": {"content": [_chat_logprob(token) for token in tokens]} if self._logprobs else None,
            "finish_reason": done.finish_reason,
        }


class TextReply(Reply):
    """Of /v1/completions."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, identifier: str, model: str, *, logprobs: bool, include_usage: bool) -> None:
        super().__init__(identifier, model, logprobs=logprobs, include_usage=include_usage)
        self._offsets: dict[int, int] = {}
        """Characters said so far, by choice."""

    def first(self, choice: int) -> bytes:  # noqa: ARG002 - a chat's needs it
        return b""

    def token(self, choice: int, text: str, token: RunToken | None) -> bytes:
        logprobs = b"null"
        if self._logprobs and token is not None:
            offset = self._offsets.get(choice, 0)
            self._offsets[choice] = offset + len(text)
            logprobs = encode(_text_logprobs([token], offset))
        return self._chunk(choice, b',"text":' + encode(text) + b',"logprobs":' + logprobs + b',"finish_reason":null')

    def last(self, choice: int, finish_reason: str) -> bytes:
        return self._chunk(choice, b',"text":"","logprobs":null,"finish_reason":' + encode(finish_reason))

    def _choice(self, choice: int, done: RunDone, tokens: Sequence[RunToken]) -> dict[str, Any]:
        return {
            "index": choice,
            "text": done.text,
            "logprobs": _text_logprobs(tokens, 0) if self._logprobs else None,
            "finish_reason": done.finish_reason,
        }


def _chat_logprob(token: RunToken) -> dict[str, Any]:
    top = [_chance(each.text, each.logprob) for each in token.top]
    return {**_chance(token.text, token.logprob), "top_logprobs": top}


def _chance(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode("utf-8", "surrogatepass"))}


def _text_logprobs(tokens: Sequence[RunToken], offset: int) -> dict[str, Any]:
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{each.text: each.logprob for each in token.top} for token in tokens],
        "text_offset": offsets,
    }
