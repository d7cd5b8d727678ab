"""The error tree, and its form on the wire.

    MindstreamError
    ├── ProtocolError             what crossed the bus is not of the contract
    │   ├── MalformedMessage      bytes that are no envelope, or fields missing or of the wrong type
    │   ├── UnsupportedVersion    an envelope of a version this node does not speak
    │   ├── UnknownType           a message type that no table row names
    │   ├── WrongTopic            a type where it may not be said, or a sender in another's branch
    │   └── MessageTooLarge       above the limit of its row in the table
    ├── TrustError                who said it is not proven
    │   ├── UnknownPeer           signed by a node that this node does not trust
    │   ├── BadSignature          the signature or the digest does not match
    │   └── ForkDetected          one origin wrote two entries under one sequence number
    ├── BusError                  the bus did not carry it
    │   ├── NotConnected          no connection to the broker, or none in time
    │   ├── NotAuthorized         the broker does not let this name say it
    │   ├── AskExpired            the time to live ran out before an answer came
    │   └── Overloaded            a bounded queue was full
    ├── BrokerError               the broker could not be started or found
    ├── ConfigError               mindstream.toml or an override is wrong
    ├── StorageError              the disk or the database refused
    ├── BlobError                 a blob is missing, cut or damaged
    ├── DownloadError             a file could not be fetched, or is not the one expected
    ├── ModelError                the model runner cannot do what was asked
    │   ├── ModelUnavailable      no such model here, or its packages are absent
    │   ├── ContextOverflow       more tokens than the model's context
    │   ├── InvalidPrompt         empty, or token ids that the model has not
    │   ├── ConversationUnknown   no conversation of that name here
    │   ├── SnapshotRefused       it does not fit this model, or is damaged
    │   └── Cancelled             stopped by request
    └── NotFound                  what was asked for by name or id is not here

Every message says what was being done, with what, and why it failed; ``hint`` says what to do next.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec


class MindstreamError(Exception):
    """Root of the tree. ``code`` is its stable name on the wire.

    Args:
        message: what was being done, with what, and why it failed.
        hint: what to do next.
        field: the field, key or argument at fault.
        reason: the cause in a few words.
    """

    code: ClassVar[str] = "error"

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        field: str = "",
        reason: str = "",
        topic: str = "",
        type: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.field = field
        self.reason = reason
        self.topic = topic
        self.type = type
        self.remote: str = ""
        """``node/service`` that reported it, when it came over the bus."""

    def __str__(self) -> str:
        origin = f"{self.remote}: " if self.remote else ""
        return f"{origin}{self.message}" + (f" ({self.hint})" if self.hint else "")


class ProtocolError(MindstreamError):
    code = "protocol"


class MalformedMessage(ProtocolError):
    code = "malformed"


class UnsupportedVersion(ProtocolError):
    code = "unsupported_version"


class UnknownType(ProtocolError):
    code = "unknown_type"


class WrongTopic(ProtocolError):
    code = "wrong_topic"


class MessageTooLarge(ProtocolError):
    code = "too_large"


class TrustError(MindstreamError):
    code = "trust"


class UnknownPeer(TrustError):
    code = "unknown_peer"


class BadSignature(TrustError):
    code = "bad_signature"


class ForkDetected(TrustError):
    code = "fork"


class BusError(MindstreamError):
    code = "bus"


class NotConnected(BusError):
    code = "not_connected"


class NotAuthorized(BusError):
    code = "not_authorized"


class AskExpired(BusError):
    code = "expired"


class Overloaded(BusError):
    code = "overloaded"


class BrokerError(MindstreamError):
    code = "broker"


class ConfigError(MindstreamError):
    code = "config"


class StorageError(MindstreamError):
    code = "storage"


class BlobError(MindstreamError):
    code = "blob"


class DownloadError(MindstreamError):
    code = "download"


class ModelError(MindstreamError):
    code = "model"


class ModelUnavailable(ModelError):
    code = "model_unavailable"


class ContextOverflow(ModelError):
    code = "context_overflow"


class InvalidPrompt(ModelError):
    code = "invalid_prompt"


class ConversationUnknown(ModelError):
    code = "conversation_unknown"


class SnapshotRefused(ModelError):
    code = "snapshot_refused"


class Cancelled(ModelError):
    code = "cancelled"


class NotFound(MindstreamError):
    code = "not_found"


UNREADABLE: tuple[type[Exception], ...] = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)
"""All that msgspec raises over bytes from outside: UnicodeDecodeError, for a text that is not UTF-8, and
RecursionError, for one nested too deep, are no MsgspecError."""


class ErrorInfo(msgspec.Struct, omit_defaults=True):
    """An error as it crosses the bus: the data of message type ``error``."""

    code: str
    """Stable name of the error's kind, as in the tree of protocol/errors.py."""
    message: str
    """What was being done, with what, and why it failed."""
    hint: str = ""
    """What to do next."""
    topic: str = ""
    """Topic of the message at fault."""
    type: str = ""
    """Type of the message at fault."""
    field: str = ""
    """Field at fault."""
    reason: str = ""
    """The cause in a few words."""


def _tree(root: type[MindstreamError]) -> dict[str, type[MindstreamError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


BY_CODE: dict[str, type[MindstreamError]] = _tree(MindstreamError)


def to_wire(error: BaseException, *, topic: str = "", type: str = "") -> ErrorInfo:
    """The wire form of any exception; one outside the tree becomes ``error`` with its class named.

    Long texts are cut, so that every error fits the limit of its row, whatever it quotes.
    """
    if isinstance(error, MindstreamError):
        return ErrorInfo(
            code=error.code,
            message=_cut(error.message, 1_500),
            hint=_cut(error.hint, 400),
            topic=_cut(error.topic or topic, 512),
            type=_cut(error.type or type, 80),
            field=_cut(error.field, 200),
            reason=_cut(error.reason, 400),
        )
    return ErrorInfo(
        code=MindstreamError.code,
        message=_cut(f"unexpected {error.__class__.__name__}: {error}", 1_500),
        topic=_cut(topic, 512),
        type=_cut(type, 80),
        reason=error.__class__.__name__,
    )


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def from_wire(info: ErrorInfo, *, remote: str = "") -> MindstreamError:
    """The exception that ``info`` describes; an unknown code becomes the root of the tree."""
    error = BY_CODE.get(info.code, MindstreamError)(
        info.message, hint=info.hint, field=info.field, reason=info.reason, topic=info.topic, type=info.type
    )
    error.remote = remote
    return error
