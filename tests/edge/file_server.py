"""A real HTTP server on loopback for tests of downloads: ranges as RFC 9110 has them, and every fault on request."""

from __future__ import annotations

import hashlib
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PIECE_BYTES = 64 * 1024


@dataclass
class Answer:
    """How one request is answered; the default is well."""

    status: int = 0
    """Answer with this status and no file."""
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    """Close the connection after so many bytes of the body."""
    hold_after: int | None = None
    """After so many bytes of the body wait for ``server.release``."""
    wrong_range: bool = False
    """Answer a range with another range."""


class FileServer:
    """Serves ``files`` (path to bytes); answers come from ``plan`` first, one a request, then well."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.files: dict[str, bytes] = {}
        self.plan: list[Answer] = []
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.ranges = True
        self.validators = True
        self.chunked = False
        self.release = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self._scheme = "http"
        if tls is not None:
            self._scheme = "https"
            self._http.socket = tls.wrap_socket(self._http.socket, server_side=True)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._http.server_address[1])

    def url(self, path: str) -> str:
        return f"{self._scheme}://127.0.0.1:{self.port}{path}"

    def ranges_asked(self) -> list[str]:
        """The Range header of each request, empty where it had none."""
        return [headers.get("range", "") for _, headers in self.requests]

    def close(self) -> None:
        self.release.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def _handler(server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                pass

            def handle(self) -> None:
                try:
                    super().handle()
                except OSError:
                    pass  # the client was killed, or hung up

            def do_GET(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                server.requests.append((self.path, headers))
                answer = server.plan.pop(0) if server.plan else Answer()
                body = server.files.get(self.path)
                self.close_connection = True
                if answer.status or body is None:
                    self.send_response(answer.status or 404)
                    for name, value in answer.headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                etag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
                first = self._first(headers, etag, len(body))
                if first == len(body) and first:
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(body)}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                if first:
                    self.send_response(206)
                    shown = first + 7 if answer.wrong_range else first
                    self.send_header("Content-Range", f"bytes {shown}-{len(body) - 1}/{len(body)}")
                else:
                    self.send_response(200)
                if server.validators:
                    self.send_header("ETag", etag)
                if server.chunked:
                    self.send_header("Transfer-Encoding", "chunked")
                else:
                    self.send_header("Content-Length", str(len(body) - first))
                self.end_headers()
                self._send(body[first:], answer)

            def _first(self, headers: dict[str, str], etag: str, size: int) -> int:
                """Where the body begins: a range counts if If-Range, where there is one, names this file."""
                asked = headers.get("range", "")
                if not server.ranges or not asked or headers.get("if-range", etag) != etag:
                    return 0
                return min(int(asked.removeprefix("bytes=").rstrip("-")), size)

            def _send(self, body: bytes, answer: Answer) -> None:
                end = len(body) if answer.cut_after is None else answer.cut_after
                held = answer.hold_after is None
                sent = 0
                while sent < end:
                    piece = body[sent : min(sent + PIECE_BYTES, end)]
                    if not held and answer.hold_after is not None:
                        piece = piece[: max(0, answer.hold_after - sent)]
                        if not piece:
                            held = True
                            self.wfile.flush()
                            server.release.wait(60)
                            continue
                    if server.chunked:
                        self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                    else:
                        self.wfile.write(piece)
                    sent += len(piece)
                if server.chunked and answer.cut_after is None:
                    self.wfile.write(b"0\r\n\r\n")

        return Handler


@contextmanager
def file_server(tls: ssl.SSLContext | None = None) -> Iterator[FileServer]:
    server = FileServer(tls)
    try:
        yield server
    finally:
        server.close()


def self_signed(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """A server's TLS context for 127.0.0.1, and its certificate's file, which is its own CA."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate_file, key_file = folder / "server.crt", folder / "server.key"
    certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate_file, key_file)
    return context, certificate_file
