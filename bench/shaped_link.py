"""A simulated link: a TCP proxy that lets so many bits a second through, each way, all its connections together.

It is no real network: it has no loss, and no latency but that of bytes waiting for their turn. Buffers are small, so
that who sends feels the rate at once, as behind a home router.

    python -m bench.shaped_link link PORT BITS_PER_S      (to 127.0.0.1:PORT; 0 bits: as fast as it goes)

It prints the port that it listens on, and ends with its input.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys

PIECE_S = 0.005
"""A piece of what passes takes so long, within bounds."""
FEWEST_BYTES, MOST_BYTES = 1_500, 262_144


class Direction:
    """One way of the link: pieces of all connections one after another."""

    def __init__(self, bits_per_s: float) -> None:
        self._bytes_per_s = bits_per_s / 8
        self._free_s = 0.0
        self.piece_bytes = MOST_BYTES
        if bits_per_s:
            self.piece_bytes = int(min(MOST_BYTES, max(FEWEST_BYTES, self._bytes_per_s * PIECE_S)))

    async def take(self, size_bytes: int) -> None:
        """Wait until a piece of this size has passed."""
        if not self._bytes_per_s:
            return
        now_s = asyncio.get_running_loop().time()
        self._free_s = max(self._free_s, now_s) + size_bytes / self._bytes_per_s
        if self._free_s - now_s > 0.0005:
            await asyncio.sleep(self._free_s - now_s)

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Everything that ``reader`` has, to its end."""
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(self.piece_bytes):
                await self.take(len(piece))
                writer.write(piece)
                await writer.drain()
        with contextlib.suppress(ConnectionError):
            writer.close()


async def serve(port: int, bits_per_s: float) -> None:
    """Until the end of input."""
    there, back = Direction(bits_per_s), Direction(bits_per_s)
    buffer_bytes = max(8_192, min(1 << 20, 4 * there.piece_bytes))

    def small(sock: socket.socket) -> socket.socket:
        if bits_per_s:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            sock = socket.socket()
            small(sock).connect(("127.0.0.1", port))
            sock.setblocking(False)
            far_reader, far_writer = await asyncio.open_connection(sock=sock, limit=2 * MOST_BYTES)
        except OSError:
            writer.close()
            return
        for each in (writer, far_writer):
            each.transport.set_write_buffer_limits(high=there.piece_bytes)
        await asyncio.gather(there.carry(reader, far_writer), back.carry(far_reader, writer))

    listener = small(socket.socket())
    listener.bind(("127.0.0.1", 0))
    server = await asyncio.start_server(connected, sock=listener, limit=2 * MOST_BYTES)
    print(listener.getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    server.close()


def main(arguments: list[str]) -> None:
    """``link PORT BITS_PER_S``."""
    _, port, bits_per_s = arguments
    loop = asyncio.new_event_loop()
    loop.run_until_complete(serve(int(port), float(bits_per_s)))


if __name__ == "__main__":
    main(sys.argv[1:])
