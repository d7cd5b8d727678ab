"""Errors in OpenAI's form, and which HTTP status each error of the tree becomes."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from protocol.errors import (
    AskExpired,
    Cancelled,
    ContextOverflow,
    ConversationUnknown,
    InvalidPrompt,
    MessageTooLarge,
    MindstreamError,
    ModelError,
    ModelUnavailable,
    NotAuthorized,
    NotConnected,
    Overloaded,
)

INVALID, SERVER, RATE, AUTHENTICATION = (
    "invalid_request_error",
    "server_error",
    "rate_limit_error",
    "authentication_error",
)


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: for a person: what was wrong, and what would be right.
        type: OpenAI's kind of error.
        param: the parameter at fault.
        code: a stable name of the cause, for programs.
        retry_after_s: when it may be worth to ask again; 0 says nothing.
    """

    def __init__(
        self, status: int, message: str, *, type: str = INVALID, param: str = "", code: str = "", retry_after_s: int = 0
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def body(self) -> bytes:
        """As JSON."""
        told = {"message": self.message, "type": self.type, "param": self.param or None, "code": self.code or None}
        return msgspec.json.encode({"error": told})


class _Row(NamedTuple):
    kind: type[MindstreamError]
    status: int
    type: str
    code: str
    retry_after_s: int = 0


_ROWS = (
    _Row(ContextOverflow, 400, INVALID, "context_length_exceeded"),
    _Row(InvalidPrompt, 400, INVALID, "invalid_prompt"),
    _Row(MessageTooLarge, 413, INVALID, "request_too_large"),
    _Row(ConversationUnknown, 404, INVALID, "conversation_not_found"),
    _Row(ModelUnavailable, 503, SERVER, "model_unavailable", 10),
    _Row(Cancelled, 503, SERVER, "cancelled", 5),
    _Row(ModelError, 500, SERVER, "model_error"),
    _Row(Overloaded, 429, RATE, "overloaded", 2),
    _Row(NotConnected, 503, SERVER, "bus_unavailable", 5),
    _Row(NotAuthorized, 502, SERVER, "not_authorized"),
    _Row(AskExpired, 504, SERVER, "timeout"),
    _Row(MindstreamError, 500, SERVER, "internal_error"),
)
"""The first whose kind fits."""


def api_error(error: MindstreamError) -> ApiError:
    """What an error of the tree is to a program that speaks OpenAI's protocol."""
    row = next(row for row in _ROWS if isinstance(error, row.kind))
    if error.reason == "no chat template":
        row = _Row(ModelUnavailable, 400, INVALID, "no_chat_template")  # asking again will not help
    return ApiError(
        row.status, str(error), type=row.type, param=error.field, code=row.code, retry_after_s=row.retry_after_s
    )
