"""One file from a URL onto the disk: resumable, checked while it comes, whole or not there.

What has come lies in ``NAME.part``, and what it is a part of in ``NAME.part.json``; both survive a ``kill -9`` and a
lost connection, and the next call goes on behind them: ``Range`` with ``If-Range`` (RFC 9110, sections 13.1.5 and 14),
so that a file that was changed at the server in between comes from the beginning instead of as a mixture. The SHA-256
is computed over all bytes, those of earlier calls included; only when it is the expected one does the file get its
name, synced to disk before.

HTTP is the standard library's (urllib): a node's core has no HTTP client, and one request at a time with ranges,
redirects, proxies from the environment and the system's certificates is what it does well. What it lacks (retries,
resume, a limit on where a redirect may lead) is here.
"""

from __future__ import annotations

import contextlib
import email.message
import hashlib
import http.client
import ipaddress
import os
import random
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn
from urllib.parse import urlsplit

import msgspec

from edge.files import storage_errors, sync_folder, write_atomically
from edge.process import free_bytes
from edge.text import mindstream_version
from protocol.errors import DownloadError, StorageError

TIMEOUT_S = 30.0
"""Longest wait for a connection, and for the next bytes."""
RETRIES = 5
"""Tries in a row that bring nothing new before it is given up; each that does starts the count again."""
BACKOFF_FIRST_S = 0.5
BACKOFF_MAX_S = 30.0
RESERVE_BYTES = 64 * 1024 * 1024
"""Space that a download leaves on its disk: a node must go on keeping what it is told."""
_READ_BYTES = 256 * 1024
_LOOK_AT_DISK_BYTES = 16 * 1024 * 1024
_TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
_HF_HOSTS = frozenset({"huggingface.co", "hf.co"})

OnBytes = Callable[[int, int], None]
"""Told (bytes so far, bytes in all or 0 when the server does not say)."""
Say = Callable[[str], None]


class _State(msgspec.Struct):
    """``NAME.part.json``: what the part is a part of."""

    url: str
    sha256: str
    validator: str = ""
    """Strong ETag or Last-Modified of the answer that the part's bytes came from."""


class _Transient(Exception):
    """Worth another try."""

    def __init__(self, why: str, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.wait_s = wait_s


def part_path(target: Path) -> Path:
    """Where the bytes of an unfinished download of ``target`` lie."""
    return target.with_name(f"{target.name}.part")


def download(
    url: str,
    target: Path,
    *,
    sha256: str,
    size_bytes: int = 0,
    on_bytes: OnBytes | None = None,
    say: Say | None = None,
    timeout_s: float = TIMEOUT_S,
    retries: int = RETRIES,
    backoff_s: float = BACKOFF_FIRST_S,
    reserve_bytes: int = RESERVE_BYTES,
) -> None:
    """Fetch ``url`` to ``target``, going on behind what an earlier call has brought. One call at a time a target.

    Args:
        url: https; http only to loopback.
        target: the file to make; its folder must exist.
        sha256: of the file, in hexadecimal.
        size_bytes: of the file; 0 when it is not known.
        on_bytes: told of progress, often.
        say: told in a line when something was not as usual: a broken connection, a start from the beginning.
        timeout_s, retries, backoff_s: patience, see the constants.
        reserve_bytes: space to leave on the disk.

    Raises DownloadError (its ``reason`` tells a missing file, a wrong digest, TLS, a silent server apart) and
    StorageError. The part is kept for another call except when its digest is wrong: then it is removed.
    """
    check_url(url)
    fetch = _Fetch(url, target, sha256.lower(), size_bytes, timeout_s, reserve_bytes)
    fetch.on_bytes = on_bytes or fetch.on_bytes
    fetch.say = say or fetch.say
    with storage_errors(f"writing {fetch.part}"), fetch.opened():
        # A part may be damaged (power was cut before its bytes were on the disk). Fetched in one piece it is not.
        while not fetch.complete(retries, backoff_s):
            fetch.say(f"{target.name}: what came in pieces has another SHA-256: from the beginning")
            fetch.start_again()
        os.fsync(fetch.file.fileno())
        fetch.part.replace(target)
        sync_folder(target.parent)
    fetch.state_path.unlink(missing_ok=True)


def check_url(url: str) -> None:
    """Raises DownloadError unless ``url`` is https, or http to loopback, and holds no password."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        _ = parts.port
    except ValueError as error:
        raise DownloadError(
            f"fetching {url!r}: {error}", hint="https://HOST/FILE", field="url", reason="not a URL"
        ) from None
    if parts.username or parts.password:
        raise DownloadError(
            f"fetching from {host}: the URL holds a name or password",
            hint="a secret on a command line is seen by every user of this machine; HF_TOKEN serves for Hugging Face",
            field="url",
            reason="a secret in the URL",
        )
    if not host or parts.scheme not in ("https", "http") or not re.fullmatch(r"[!-~]+", url):
        raise DownloadError(f"fetching {url!r}: it is no https URL", hint="https://HOST/FILE", reason="not a URL")
    if parts.scheme == "http" and not _is_loopback(host):
        raise DownloadError(
            f"fetching {shown(url)}: it leaves this machine without TLS",
            hint="use https; http is for loopback alone",
            field="url",
            reason="no TLS",
        )


def shown(url: str) -> str:
    """``url`` for people and logs: without its query, which may hold a signature or a token."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def request_for(url: str, headers: dict[str, str]) -> urllib.request.Request:
    """The request for ``url``. Hugging Face gets $HF_TOKEN if there is one, and only Hugging Face."""
    request = urllib.request.Request(url, headers=headers)
    token = os.environ.get("HF_TOKEN", "")
    parts = urlsplit(url)
    if token and parts.scheme == "https" and parts.hostname in _HF_HOSTS:
        # Unredirected: the store that it sends us to is another host and must not see it.
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    return request


class _Fetch:
    """One download under way."""

    def __init__(
        self, url: str, target: Path, sha256: str, size_bytes: int, timeout_s: float, reserve_bytes: int
    ) -> None:
        self.url = url
        self.target = target
        self.sha256 = sha256
        self.size_bytes = size_bytes
        self.total_bytes = size_bytes
        self.timeout_s = timeout_s
        self.reserve_bytes = reserve_bytes
        self.part = part_path(target)
        self.state_path = target.with_name(f"{target.name}.part.json")
        self.on_bytes: OnBytes = lambda _done, _total: None
        self.say: Say = lambda _line: None
        self.file: IO[bytes]
        self.hash = hashlib.sha256()
        self.have_bytes = 0
        self.answers = 0
        """Answers that the part's bytes came from; more than one is a part in pieces."""
        self.state = _State(url, sha256)
        self._opener = _opener(url)

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """The part, open, read once for its digest if it is of this file."""
        descriptor = os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        # Unbuffered: what was written is the kernel's, and a kill -9 of this process takes none of it.
        with os.fdopen(descriptor, "r+b", buffering=0) as self.file:
            state = _read_state(self.state_path)
            if state is not None and (state.url, state.sha256) == (self.url, self.sha256):
                self.state = state
                self._read_part()
            else:
                self.start_again()
            yield

    def _read_part(self) -> None:
        while block := self.file.read(_READ_BYTES):
            self.hash.update(block)
            self.have_bytes += len(block)
        if self.size_bytes and self.have_bytes > self.size_bytes:
            self.start_again()
        elif self.have_bytes:
            self.answers = 1
            self.say(f"{self.target.name}: going on behind {self.have_bytes:,} bytes")

    def start_again(self) -> None:
        """Forget what has come."""
        self.file.truncate(0)
        self.file.seek(0)
        self.hash = hashlib.sha256()
        self.have_bytes = self.answers = 0
        self.state = _State(self.url, self.sha256)

    def complete(self, retries: int, backoff_s: float) -> bool:
        """Fetch until all is here; whether its digest is right. Raises DownloadError when it will not be."""
        failures, best_bytes = 0, self.have_bytes
        while True:
            try:
                self._once()
                break
            except _Transient as trouble:
                failures = failures + 1 if self.have_bytes <= best_bytes else 1
                best_bytes = max(best_bytes, self.have_bytes)
                if failures > retries:
                    self._give_up(trouble)
                wait_s = trouble.wait_s or min(BACKOFF_MAX_S, backoff_s * 2 ** (failures - 1))
                wait_s *= random.uniform(0.8, 1.2)
                self.say(f"{self.target.name}: {trouble}; tried again in {wait_s:.1f} s")
                time.sleep(wait_s)
        found = self.hash.hexdigest()
        if found == self.sha256:
            return True
        if self.answers > 1:
            return False
        self.part.unlink(missing_ok=True)
        self.state_path.unlink(missing_ok=True)
        raise DownloadError(
            f"fetching {shown(self.url)}: its SHA-256 is {found}, not {self.sha256}; {self.part} is removed",
            hint="the file at the server is another one, or the digest is mistyped: use neither before you know which",
            field="sha256",
            reason="wrong digest",
        )

    def _once(self) -> None:
        """One request, and all of its answer. Raises _Transient and DownloadError."""
        if self.size_bytes and self.have_bytes == self.size_bytes:
            return
        self._check_disk(self.size_bytes - self.have_bytes if self.size_bytes else 0)
        try:
            with self._ask() as response:
                if response is not None:
                    self._take(response)
        except (http.client.HTTPException, OSError) as error:
            self._judge(error)

    @contextlib.contextmanager
    def _ask(self) -> Iterator[Any]:
        """Yields the answer to read, from ``have_bytes`` on; None when there is nothing more to come."""
        headers = {"User-Agent": f"mindstream/{mindstream_version()}", "Accept-Encoding": "identity"}
        if self.have_bytes:
            headers["Range"] = f"bytes={self.have_bytes}-"
            if self.state.validator:
                headers["If-Range"] = self.state.validator
        try:
            response = self._opener.open(request_for(self.url, headers), timeout=self.timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 416 and self.have_bytes:
                    # All of it is here, unless the file has become shorter.
                    total = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
                    if total and int(total.group(1)) == self.have_bytes:
                        if self.size_bytes:
                            self._fail(
                                f"the server has {self.have_bytes:,} bytes, not {self.size_bytes:,}",
                                reason="another size",
                            )
                        yield None
                        return
                    self.start_again()
                    raise _Transient("the file at the server has become shorter") from None
                self._refused(error.code, error.reason, error.headers)
        with response:
            self._check_answer(response)
            yield response

    def _check_answer(self, response: Any) -> None:
        """Take in status and headers: where the body begins, and how long all is."""
        headers: email.message.Message = response.headers
        if headers.get("Content-Encoding", "identity") != "identity":
            self._fail(f"the server packs it as {headers['Content-Encoding']}", reason="an encoding not asked for")
        validator = _validator(headers)
        length = headers.get("Content-Length")
        if response.status == 206:
            place = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", headers.get("Content-Range", ""))
            if place is None or int(place.group(1)) != self.have_bytes:
                self.start_again()
                raise _Transient(f"the server sent another range than asked for: {headers.get('Content-Range')}")
            if validator and validator != self.state.validator:
                self.start_again()
                raise _Transient("the file at the server has changed")
            total = 0 if place.group(3) == "*" else int(place.group(3))
        elif response.status == 200:
            if self.have_bytes:
                self.say(f"{self.target.name}: changed at the server, or that sends no parts: from the beginning")
                self.start_again()
            total = int(length) if length and length.isdecimal() else 0
        else:
            self._fail(f"the server answers {response.status}", reason="unexpected answer")
        if self.size_bytes and total and total != self.size_bytes:
            self._fail(f"the server has {total:,} bytes, not {self.size_bytes:,}", reason="another size")
        self.total_bytes = total or self.size_bytes
        self._check_disk(self.total_bytes - self.have_bytes)
        self.answers += 1
        self.state.validator = validator or self.state.validator
        write_atomically(self.state_path, msgspec.json.encode(self.state), mode=0o644)

    def _take(self, response: Any) -> None:
        unlooked_bytes = 0
        self.on_bytes(self.have_bytes, self.total_bytes)
        # read1 gives what has come: a cut or a slow connection costs nothing that was here.
        while block := response.read1(_READ_BYTES):
            if self.size_bytes and self.have_bytes + len(block) > self.size_bytes:
                self._fail(f"the server sends more than {self.size_bytes:,} bytes", reason="another size")
            with storage_errors(f"writing {self.part}; type the same again and it goes on where it stopped"):
                _write_all(self.file, block)
            self.hash.update(block)
            self.have_bytes += len(block)
            self.on_bytes(self.have_bytes, self.total_bytes)
            unlooked_bytes += len(block)
            if unlooked_bytes >= _LOOK_AT_DISK_BYTES:
                unlooked_bytes = 0
                self._check_disk(0)
        if self.have_bytes < self.total_bytes:
            raise _Transient(f"the connection ended after {self.have_bytes:,} of {self.total_bytes:,} bytes")

    def _check_disk(self, wanted_bytes: int) -> None:
        free = free_bytes(self.target.parent)
        if free < wanted_bytes + self.reserve_bytes:
            raise StorageError(
                f"fetching {self.target.name} into {self.target.parent}: {free / 1e6:,.0f} MB are free there,"
                f" {max(wanted_bytes, 0) / 1e6:,.0f} MB are still to come and {self.reserve_bytes / 1e6:,.0f} MB stay"
                " in reserve",
                hint="free some space and type the same again: it goes on where it stopped",
                reason="disk full",
            )

    def _refused(self, status: int, reason: str, headers: email.message.Message) -> NoReturn:
        """An answer of 400 or more."""
        if status in _TRY_AGAIN:
            raise _Transient(f"the server answers {status} {reason}", _retry_after_s(headers))
        if status in (404, 410):
            self._fail(f"there is no such file ({status})", hint="look at the address", reason="not found")
        if status in (401, 403):
            self._fail(
                f"the server does not let us ({status} {reason})",
                hint="a gated model: accept its licence in the browser, then set HF_TOKEN"
                if urlsplit(self.url).hostname in _HF_HOSTS
                else "the address may have expired",
                reason="not allowed",
            )
        self._fail(f"the server answers {status} {reason}", hint="look at the address", reason="refused")

    def _judge(self, error: Exception) -> NoReturn:
        """What went wrong below HTTP: raises what it means."""
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, ssl.SSLCertVerificationError):
            self._fail(
                f"its certificate is not trusted: {cause.verify_message}",
                hint="is this machine's clock right (`mindstream doctor`)? A company's or your own CA is named in"
                " SSL_CERT_FILE",
                reason="TLS",
            )
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
            self._fail(f"TLS: {cause.reason or cause}", hint="does it speak TLS there?", reason="TLS")
        if isinstance(cause, TimeoutError):
            raise _Transient(f"nothing came for {self.timeout_s:g} s") from error
        raise _Transient(str(cause) or type(cause).__name__) from error

    def _give_up(self, trouble: _Transient) -> NoReturn:
        kept = f"; {self.have_bytes:,} bytes are kept in {self.part}" if self.have_bytes else ""
        raise DownloadError(
            f"fetching {shown(self.url)}: {trouble}{kept}",
            hint="is the network there? Type the same again: it goes on where it stopped",
            reason="no answer",
        ) from trouble

    def _fail(self, why: str, *, reason: str, hint: str = "") -> NoReturn:
        raise DownloadError(f"fetching {shown(self.url)}: {why}", hint=hint, field="url", reason=reason)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but not out of TLS."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        check_url(newurl)
        if req.type == "https" and urlsplit(newurl).scheme != "https":
            raise DownloadError(
                f"fetching {shown(req.full_url)}: it redirects to {shown(newurl)}, out of TLS",
                hint="look at the address",
                field="url",
                reason="no TLS",
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener(url: str) -> urllib.request.OpenerDirector:
    handlers: list[Any] = [_Redirects]
    if urlsplit(url).scheme == "http":
        # Loopback is this machine's own, not the proxy's; and what is not encrypted does not leave.
        handlers.append(urllib.request.ProxyHandler({}))
    return urllib.request.build_opener(*handlers)


def _validator(headers: email.message.Message) -> str:
    """What If-Range may name: a strong ETag, else Last-Modified; a weak ETag may not (RFC 9110, 13.1.5)."""
    etag = headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", "")


def _retry_after_s(headers: email.message.Message) -> float:
    text = headers.get("Retry-After", "")
    return min(60.0, float(text)) if text.isdecimal() else 0.0


def _read_state(path: Path) -> _State | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_State)
    except (OSError, msgspec.MsgspecError):
        return None


def _write_all(file: IO[bytes], block: bytes) -> None:
    view = memoryview(block)
    while view:
        view = view[file.write(view) :]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
