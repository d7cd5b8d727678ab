"""The HTTP server: uvicorn on a socket and in a thread of our own, with limits on clients that are slow.

On uvloop where that is installed: a token of a stream then costs this thread a fifth to a third less, on the cores
on which the next one is computed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from protocol.errors import BusError

log = logging.getLogger(__name__)

HEAD_S = 10.0
"""So long a request's head may take to come, and a new connection may say nothing."""
KEEP_ALIVE_S = 75
STALLED_S = 60.0
"""A client that has read nothing for so long, while there is something to read, is disconnected."""
MAX_HEAD_BYTES = 32 * 1024
MAX_CONNECTIONS = 1000
BACKLOG = 256
DATE_S = 1.0
"""So often the Date header is made anew."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises BusError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise BusError(
            f"listening at {host}:{port}: {error.strerror or error}",
            hint="set gateway.port to a free one, and gateway.host to an address of this machine",
            field="gateway.port",
            reason="port not available",
        ) from None
    return listener


def _protocol(count: Callable[[str], None]) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1, which waits for ever for a head and for a reader, with limits to that."""

    class Limited(H11Protocol):
        _head_timer: asyncio.TimerHandle | None = None
        _stall_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._await_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._disarm()
            elif self._head_timer is None and self.timeout_keep_alive_task is None:
                self._await_head()  # the beginning of another request on this connection

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._disarm()

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            if self._stall_timer is not None:
                self._stall_timer.cancel()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stall_timer = self.loop.call_later(STALLED_S, self._end, "dropped.slow_reader")

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._stall_timer is not None:
                self._stall_timer.cancel()
                self._stall_timer = None

        def _await_head(self) -> None:
            self._head_timer = self.loop.call_later(HEAD_S, self._end, "dropped.slow_head")

        def _disarm(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _end(self, counter: str) -> None:
            count(counter)
            self.transport.abort()

    return Limited


class _Server(uvicorn.Server):
    """uvicorn's, which is told to end: its own looks ten times a second whether it shall."""

    _loop: asyncio.AbstractEventLoop | None = None

    async def main_loop(self) -> None:
        self._ending = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        while not self.should_exit:
            await self.on_tick(0)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._ending.wait(), DATE_S)

    def end(self) -> None:
        """End; from any thread."""
        self.should_exit = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._ending.set)


class HttpServer:
    """Serves ``app`` on ``listener`` in a thread of its own, until ``stop``.

    Args:
        cert_file, key_file: PEM files for TLS; empty for plain HTTP.
        count: counts one of something, by name.
    """

    def __init__(
        self,
        app: Any,
        listener: socket.socket,
        *,
        cert_file: str = "",
        key_file: str = "",
        count: Callable[[str], None],
    ) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        self._listener = listener
        self.port: int = listener.getsockname()[1]
        self._server = _Server(
            uvicorn.Config(
                app,
                http=_protocol(count),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                limit_concurrency=MAX_CONNECTIONS,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=2,
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
                ssl_certfile=cert_file or None,
                ssl_keyfile=key_file or None,
            )
        )
        self._server.config.load()  # a certificate that cannot be read is found here

    def serve(self) -> None:
        """Serve until ``stop``."""
        self._server.run(sockets=[self._listener])

    def stop(self, thread: threading.Thread, timeout_s: float = 5.0) -> None:
        """End it; what is under way has two seconds."""
        self._server.end()
        thread.join(timeout_s)
        self._listener.close()
