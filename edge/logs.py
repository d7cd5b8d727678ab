"""Logs: one entry an event, to stderr or to systemd's journal.

Whoever starts a process keeps what it prints: the supervisor passes it on with the service's name before it and
writes it to ``DATA_DIR/logs/NAME.log`` (bounded), tracebacks and the words of native libraries included; systemd
keeps a journal. So a log file has one writer.

With ``log.format = "auto"`` a process whose stderr is the journal sends its entries there with fields
(edge/journald.py); every other writes text. ``json`` writes one object a line with the same fields, named as
``journalctl -o json`` names them. An error of the tree that stands among a log call's arguments, or is being handled,
gives its code, topic, type, field and reason as fields; the call need not say so. ``extra={"topic": …, "type": …}``
names the message at fault for any other error.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import Literal

from edge.config import Config
from edge.journald import SOCKET, JournalSocket, is_journal
from protocol.errors import MindstreamError, to_wire

Format = Literal["text", "json", "journal"]

_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_ERROR_FIELDS = ("code", "topic", "type", "field", "reason", "hint")

_format: Format = "text"


def set_up_logging(config: Config, name: str, *, prefix: bool = False) -> None:
    """Log at ``log.level``, in ``log.format``.

    Args:
        config: the configuration.
        name: of the service, or ``supervisor``.
        prefix: put ``name`` before each line of text, where no supervisor does.
    """
    global _format
    _format = chosen_format(config)
    text = logging.StreamHandler(sys.stderr)
    text.setFormatter(formatter(config, name, prefix=prefix))
    handler: logging.Handler = text
    if _format == "journal":
        handler = JournalHandler(config.node.name, name, text)
    logging.basicConfig(level=config.log.level.upper(), handlers=[handler], force=True)


def chosen_format(config: Config) -> Format:
    """``log.format``, with ``auto`` decided by where stderr leads."""
    wanted = config.log.format
    if wanted == "auto":
        return "journal" if is_journal(2, os.environ) else "text"
    return "json" if wanted == "json" else "journal" if wanted == "journal" else "text"


def formatter(config: Config, name: str, *, prefix: bool = False) -> logging.Formatter:
    """For a stream or a file: JSON if that is asked for, else text."""
    if config.log.format == "json":
        return JsonFormatter(config.node.name, name)
    begin = f"{name:>12} | " if prefix else ""
    return logging.Formatter(f"{begin}%(asctime)s %(levelname)s %(message)s")


def say_end(name: str, error: MindstreamError) -> None:
    """Say on the way out what ended this process: as the last line on stderr, which a supervisor quotes, or as an
    entry with fields where entries are read."""
    if _format != "text":
        logging.getLogger(__name__).critical("%s: %s", name, error)
    if _format == "text" or (_format == "journal" and not is_journal(2, os.environ)):
        print(f"{name}: {error}", file=sys.stderr)


def fields_of(record: logging.LogRecord, node: str, service: str) -> dict[str, str]:
    """The journal's fields of a record; MESSAGE holds the traceback too."""
    message = record.getMessage()
    if record.exc_info:
        message += "\n" + _PLAIN.formatException(record.exc_info)
    if record.stack_info:
        message += "\n" + record.stack_info
    fields = {
        "MESSAGE": message,
        "PRIORITY": str(next((priority for level, priority in _PRIORITIES if record.levelno >= level), 7)),
        "SYSLOG_IDENTIFIER": f"mindstream-{service}",
        "CODE_FILE": record.pathname,
        "CODE_LINE": str(record.lineno),
        "CODE_FUNC": record.funcName or "",
        "THREAD_NAME": record.threadName or "",
        "LOGGER": record.name,
        "MINDSTREAM_NODE": node,
        "MINDSTREAM_SERVICE": service,
    }
    if (error := _error_of(record)) is not None:
        info = to_wire(error, topic=getattr(record, "topic", ""), type=getattr(record, "type", ""))
        fields |= {f"MINDSTREAM_ERROR_{name.upper()}": getattr(info, name) for name in _ERROR_FIELDS}
        if isinstance(error, MindstreamError) and error.remote:
            fields["MINDSTREAM_ERROR_REMOTE"] = error.remote
    return {name: value for name, value in fields.items() if value}


class JsonFormatter(logging.Formatter):
    """One JSON object a line, as ``journalctl -o json`` prints entries."""

    def __init__(self, node: str, service: str) -> None:
        super().__init__()
        self._node = node
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its newline."""
        fields = {"__REALTIME_TIMESTAMP": str(int(record.created * 1e6))} | fields_of(record, self._node, self._service)
        return json.dumps(fields, ensure_ascii=False)


class JournalHandler(logging.Handler):
    """Sends entries to the journal; while that is not there, to ``fallback``."""

    def __init__(self, node: str, service: str, fallback: logging.Handler, path: str = SOCKET) -> None:
        super().__init__()
        self._node = node
        self._service = service
        self._fallback = fallback
        self._socket = JournalSocket(path)

    def emit(self, record: logging.LogRecord) -> None:
        """Send ``record``."""
        try:
            self._socket.send(fields_of(record, self._node, self._service))
        except OSError:
            self._fallback.handle(record)
        except Exception:  # noqa: BLE001 - as logging has it: a log call never raises
            self.handleError(record)

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
        super().close()


def wrapped(line: str, node: str, service: str) -> str:
    """A child's line for a stream of JSON: itself if it is an entry, else an entry made of it (a native library's
    words, or an interpreter's last)."""
    if line.startswith("{") and line.endswith("}"):
        return line
    fields = {
        "__REALTIME_TIMESTAMP": str(time.time_ns() // 1000),
        "MESSAGE": line,
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": f"mindstream-{service}",
        "MINDSTREAM_NODE": node,
        "MINDSTREAM_SERVICE": service,
    }
    return json.dumps(fields, ensure_ascii=False)


def message_of(line: str) -> str:
    """What a line of either format says to a person."""
    if line.startswith("{"):
        try:
            found = json.loads(line)
        except ValueError:
            return line
        if isinstance(found, dict) and "MESSAGE" in found:
            return str(found["MESSAGE"]).partition("\n")[0]
    return line


_PLAIN = logging.Formatter()


def _error_of(record: logging.LogRecord) -> BaseException | None:
    """The error that a record is about: of the tree if there is one, else the one being handled."""
    arguments = record.args.values() if isinstance(record.args, Mapping) else record.args or ()
    handled = record.exc_info[1] if record.exc_info else None
    return next((each for each in (handled, *arguments) if isinstance(each, MindstreamError)), handled)
