"""Downloads against a real HTTP server: ranges, cuts, changes, wrong bytes, redirects, proxies, full disks, kills."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge.download import check_url, download, part_path, request_for
from protocol.errors import DownloadError, StorageError
from tests.edge.file_server import Answer, FileServer, file_server, self_signed
from tests.support.ports import free_port
from tests.support.waiting import DEADLINE_S, wait_for

ROOT = Path(__file__).resolve().parents[2]
BODY = random.Random(1).randbytes(1_000_000)
DIGEST = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server() -> Iterator[FileServer]:
    with file_server() as found:
        found.files["/model.bin"] = BODY
        yield found


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder / "model.bin"


def fetch(server: FileServer, target: Path, **options: Any) -> list[str]:
    """Download; what was said."""
    said: list[str] = []
    usual = {"sha256": DIGEST, "backoff_s": 0.001, "timeout_s": 5.0, "reserve_bytes": 0, "say": said.append}
    download(server.url("/model.bin"), target, **(usual | options))
    assert target.read_bytes() == BODY
    assert list(target.parent.iterdir()) == [target]
    return said


def refused(server: FileServer, target: Path, path: str = "/model.bin", **options: Any) -> DownloadError:
    usual = {"sha256": DIGEST, "backoff_s": 0.001, "timeout_s": 5.0, "reserve_bytes": 0}
    with pytest.raises(DownloadError) as caught:
        download(server.url(path), target, **(usual | options))
    assert not target.exists()
    return caught.value


def test_a_file_comes_whole_and_nothing_else_is_left(server: FileServer, target: Path) -> None:
    seen: list[tuple[int, int]] = []
    fetch(server, target, size_bytes=len(BODY), on_bytes=lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, len(BODY))
    assert seen[-1] == (len(BODY), len(BODY))
    assert seen == sorted(seen)
    assert server.requests[0][1]["accept-encoding"] == "identity"


def test_a_cut_connection_is_taken_up_where_it_broke(server: FileServer, target: Path) -> None:
    server.plan = [Answer(cut_after=300_000), Answer(cut_after=200_000)]
    said = fetch(server, target)
    assert server.ranges_asked() == ["", "bytes=300000-", "bytes=500000-"]
    assert all(headers["if-range"] for _, headers in server.requests[1:])
    assert "300,000 of 1,000,000" in said[0]


def test_each_cut_that_brought_something_is_not_counted_against_the_server(server: FileServer, target: Path) -> None:
    server.plan = [Answer(cut_after=100_000) for _ in range(9)]
    fetch(server, target, retries=1)
    assert len(server.requests) == 10


def test_a_later_call_goes_on_where_an_earlier_one_gave_up(server: FileServer, target: Path) -> None:
    server.plan = [Answer(cut_after=400_000), Answer(status=503), Answer(status=503)]
    error = refused(server, target, retries=1)
    assert error.reason == "no answer"
    assert "400,000 bytes are kept" in error.message
    assert "goes on" in error.hint
    assert part_path(target).stat().st_size == 400_000
    said = fetch(server, target)
    assert server.ranges_asked()[-1] == "bytes=400000-"
    assert "going on behind 400,000 bytes" in said[0]


def test_a_file_that_changed_at_the_server_in_between_comes_from_the_beginning(
    server: FileServer, target: Path
) -> None:
    server.files["/model.bin"] = bytes(len(BODY))
    server.plan = [Answer(cut_after=400_000), Answer(status=500)]
    refused(server, target, retries=0)
    refused(server, target, retries=0)
    server.files["/model.bin"] = BODY
    said = fetch(server, target)
    assert server.ranges_asked()[-1] == "bytes=400000-"  # asked for; If-Range made it whole
    assert any("from the beginning" in line for line in said)


def test_it_changes_between_two_tries_of_one_call(server: FileServer, target: Path) -> None:
    server.files["/model.bin"] = bytes(len(BODY))
    server.plan = [Answer(cut_after=400_000)]

    def change(line: str) -> None:
        server.files["/model.bin"] = BODY

    fetch(server, target, say=change)
    assert len(server.requests) == 2


def test_without_validators_a_mixture_is_found_by_its_digest_and_fetched_again(
    server: FileServer, target: Path
) -> None:
    server.validators = False
    server.files["/model.bin"] = bytes(len(BODY))
    server.plan = [Answer(cut_after=400_000)]
    refused(server, target, retries=0)
    server.files["/model.bin"] = BODY
    said = fetch(server, target)
    assert server.ranges_asked()[1:] == ["bytes=400000-", ""]
    assert any("another SHA-256" in line for line in said)


def test_a_part_that_was_damaged_on_the_disk_is_fetched_again(server: FileServer, target: Path) -> None:
    server.plan = [Answer(cut_after=400_000)]
    refused(server, target, retries=0)
    damaged = bytearray(part_path(target).read_bytes())
    damaged[1000] ^= 1
    part_path(target).write_bytes(damaged)
    fetch(server, target)
    assert server.ranges_asked() == ["", "bytes=400000-", ""]


def test_a_part_of_another_file_is_not_gone_on_with(server: FileServer, target: Path) -> None:
    server.files["/other.bin"] = bytes(800_000)
    server.plan = [Answer(cut_after=400_000)]
    refused(server, target, "/other.bin", retries=0)
    fetch(server, target)
    assert server.ranges_asked() == ["", ""]


def test_a_part_that_lacks_nothing_but_its_name_needs_no_bytes(server: FileServer, target: Path) -> None:
    server.plan = [Answer(cut_after=400_000)]
    refused(server, target, retries=0)
    part_path(target).write_bytes(BODY)
    fetch(server, target)
    assert server.ranges_asked() == ["", "bytes=1000000-"]


def test_a_server_without_ranges_is_read_from_the_beginning(server: FileServer, target: Path) -> None:
    server.ranges = False
    server.plan = [Answer(cut_after=400_000)]
    fetch(server, target)
    assert len(server.requests) == 2


def test_another_range_than_asked_for_is_not_taken(server: FileServer, target: Path) -> None:
    server.plan = [Answer(cut_after=400_000), Answer(wrong_range=True)]
    fetch(server, target)
    assert server.ranges_asked() == ["", "bytes=400000-", ""]


def test_a_length_that_is_not_said_is_no_hindrance(server: FileServer, target: Path) -> None:
    server.chunked = True
    server.plan = [Answer(cut_after=400_000)]
    fetch(server, target)
    assert server.ranges_asked()[1].startswith("bytes=")


def test_wrong_bytes_are_removed_and_both_digests_are_named(server: FileServer, target: Path) -> None:
    server.files["/model.bin"] = bytes(len(BODY))
    error = refused(server, target)
    assert error.reason == "wrong digest"
    assert DIGEST in error.message
    assert hashlib.sha256(bytes(len(BODY))).hexdigest() in error.message
    assert str(part_path(target)) in error.message
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize("size_bytes", [len(BODY) - 1, len(BODY) + 1])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_file_of_another_size_is_not_fetched(
    server: FileServer, target: Path, size_bytes: int, chunked: bool
) -> None:
    server.chunked = chunked
    assert refused(server, target, size_bytes=size_bytes, retries=1).reason == "another size"


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429])
def test_a_busy_server_is_asked_again(server: FileServer, target: Path, status: int) -> None:
    server.plan = [Answer(status=status), Answer(status=status)]
    said = fetch(server, target)
    assert len(server.requests) == 3
    assert str(status) in said[0]


def test_it_waits_as_long_as_the_server_asks(server: FileServer, target: Path) -> None:
    server.plan = [Answer(status=503, headers={"Retry-After": "1"})]
    started_s = time.monotonic()
    fetch(server, target)
    assert time.monotonic() - started_s > 0.7


@pytest.mark.parametrize(
    ("status", "reason"), [(404, "not found"), (410, "not found"), (403, "not allowed"), (400, "refused")]
)
def test_a_refusal_is_final_and_says_why(server: FileServer, target: Path, status: int, reason: str) -> None:
    server.plan = [Answer(status=status)]
    error = refused(server, target)
    assert (error.reason, len(server.requests)) == (reason, 1)
    assert "/model.bin" in error.message
    assert error.hint


def test_a_server_that_says_nothing_more_is_left_after_the_timeout(server: FileServer, target: Path) -> None:
    server.plan = [Answer(hold_after=100_000)]
    said = fetch(server, target, timeout_s=1.5)
    assert "nothing came for 1.5 s" in said[0]
    assert server.ranges_asked()[-1] == "bytes=100000-"


def test_nobody_there_is_said_with_what_to_do(target: Path) -> None:
    port = free_port()
    with pytest.raises(DownloadError, match="Connection refused") as caught:
        download(f"http://127.0.0.1:{port}/x", target, sha256=DIGEST, retries=1, backoff_s=0.001)
    assert "network" in caught.value.hint


def test_redirects_are_followed_and_keep_the_range(server: FileServer, target: Path) -> None:
    away = Answer(status=302, headers={"Location": "/model.bin?signature=secret"})
    server.files["/model.bin?signature=secret"] = BODY
    server.plan = [away, Answer(cut_after=300_000), away]
    fetch(server, target)
    assert server.ranges_asked() == ["", "", "bytes=300000-", "bytes=300000-"]


@pytest.mark.parametrize(
    ("location", "reason"),
    [("http://192.0.2.1/x", "no TLS"), ("file:///etc/passwd", "not a URL"), ("/model.bin", "no answer")],
)
def test_redirects_out_of_tls_to_files_or_in_circles_are_not_followed(
    server: FileServer, target: Path, location: str, reason: str
) -> None:
    server.plan = [Answer(status=302, headers={"Location": location}) for _ in range(40)]
    assert refused(server, target, retries=0).reason in (reason, "refused")


def test_an_encoding_that_was_not_asked_for_is_refused(
    server: FileServer, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from email.message import Message

    from edge import download as module

    headers = Message()
    headers["Content-Encoding"] = "gzip"
    fetch_ = module._Fetch("http://127.0.0.1/x", target, DIGEST, 0, 1.0, 0)
    with pytest.raises(DownloadError, match="gzip"):
        fetch_._check_answer(type("Response", (), {"headers": headers, "status": 200}))


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/x",
        "ftp://example.org/x",
        "file:///etc/passwd",
        "https:///x",
        "https://me:hunter2@example.org/x",
        "https://example.org/a b",
        "https://example.org:port/x",
        "https://[::1/x",
        "model",
    ],
)
def test_only_https_and_loopback_are_fetched_and_no_secret_is_repeated(url: str) -> None:
    with pytest.raises(DownloadError) as caught:
        check_url(url)
    assert "hunter2" not in str(caught.value)


def test_the_hugging_face_token_goes_to_hugging_face_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    ours = request_for("https://huggingface.co/a/b/resolve/main/x.gguf", {})
    assert ours.get_header("Authorization") == "Bearer hf_secret"
    assert "Authorization" not in ours.headers  # those go on with a redirect
    for url in ("https://example.org/x", "https://huggingface.co.example.org/x", "http://huggingface.co/x"):
        assert request_for(url, {}).get_header("Authorization") is None


def test_tls_is_checked_against_the_ca_of_the_environment(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, certificate = self_signed(tmp_path)
    with file_server(context) as server:
        server.files["/model.bin"] = BODY
        error = refused(server, target)
        assert (error.reason, error.message.count("certificate")) == ("TLS", 2)
        assert "SSL_CERT_FILE" in error.hint
        assert server.requests == []
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        fetch(server, target)


def test_tls_where_none_is_spoken_is_said(server: FileServer, target: Path) -> None:
    with pytest.raises(DownloadError) as caught:
        download(f"https://127.0.0.1:{server.port}/model.bin", target, sha256=DIGEST, retries=0)
    assert caught.value.reason == "TLS"


def test_a_proxy_of_the_environment_is_used_for_https_and_not_for_loopback_http(
    tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, certificate = self_signed(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with file_server(context) as server, file_server() as plain, _connect_proxy() as (proxy_url, asked):
        server.files["/model.bin"] = plain.files["/model.bin"] = BODY
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"):
            monkeypatch.setenv(name, proxy_url)
        fetch(server, target)
        assert asked == [f"127.0.0.1:{server.port}"]
        target.unlink()
        fetch(plain, target)
        assert len(asked) == 1


class _connect_proxy:
    """A proxy that speaks CONNECT."""

    def __enter__(self) -> tuple[str, list[str]]:
        self.asked: list[str] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, daemon=True).start()
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}", self.asked

    def __exit__(self, *_: object) -> None:
        self.listener.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            head = b""
            while b"\r\n\r\n" not in head:
                head += client.recv(4096)
            place = head.split()[1].decode()
            self.asked.append(place)
            host, _, port = place.rpartition(":")
            upstream = socket.create_connection((host, int(port)))
            client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            for source, sink in ((client, upstream), (upstream, client)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while block := source.recv(65536):
                sink.sendall(block)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass


def test_too_little_room_is_said_before_anything_is_fetched(server: FileServer, target: Path) -> None:
    with pytest.raises(StorageError, match="1 MB are still to come") as caught:
        download(server.url("/model.bin"), target, sha256=DIGEST, size_bytes=len(BODY), reserve_bytes=1 << 60)
    assert "goes on" in caught.value.hint
    assert server.requests == []


def test_a_disk_that_fills_up_keeps_what_has_come(server: FileServer, tmp_path: Path) -> None:
    """In a mount namespace of its own, on a file system of 512 kB that says how full it is only when it is."""
    folder = tmp_path / "small"
    folder.mkdir()
    program = (
        "import sys\nfrom pathlib import Path\nfrom edge import download\nfrom protocol.errors import StorageError\n"
        "download.free_bytes = lambda folder: 1 << 60\n"
        "try:\n    download.download(sys.argv[1], Path(sys.argv[2]), sha256=sys.argv[3])\n"
        "except StorageError as error:\n"
        "    print('kept', download.part_path(Path(sys.argv[2])).stat().st_size, error)\n"
    )
    command = [sys.executable, "-c", program, server.url("/model.bin"), str(folder / "model.bin"), DIGEST]
    shell = f'mount -t tmpfs -o size=512k none "{folder}" || exit 77; exec "$@"'
    if shutil.which("unshare") is None:
        pytest.skip("no unshare here")
    done = subprocess.run(
        ["unshare", "--mount", *(["--map-root-user"] if os.getuid() else []), "sh", "-c", shell, "sh", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"this machine lets us mount nothing: {done.stderr.strip()}")
    words = done.stdout.split()
    assert words[:1] == ["kept"], done.stdout + done.stderr
    assert 300_000 < int(words[1]) <= 512 * 1024
    assert "No space left" in done.stdout
    assert "free some space" in done.stdout


def test_a_folder_that_cannot_be_written_is_named(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        download(server.url("/model.bin"), tmp_path / "nowhere" / "model.bin", sha256=DIGEST)


def test_a_folder_that_is_not_ours_is_said(server: FileServer, target: Path) -> None:
    if os.getuid() == 0:
        pytest.skip("root may write everywhere")
    target.parent.chmod(0o555)
    with pytest.raises(StorageError, match="Permission denied") as caught:
        download(server.url("/model.bin"), target, sha256=DIGEST)
    assert "right to write" in caught.value.hint
    assert server.requests == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_download_is_gone_on_with_by_the_next(
    server: FileServer, target: Path, number: signal.Signals
) -> None:
    server.plan = [Answer(hold_after=600_000)]
    program = (
        "import sys\nfrom pathlib import Path\nfrom edge.download import download\n"
        "download(sys.argv[1], Path(sys.argv[2]), sha256=sys.argv[3])\n"
    )
    command = [sys.executable, "-c", program, server.url("/model.bin"), str(target), DIGEST]
    child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: part_path(target).exists() and part_path(target).stat().st_size == 600_000, "the first part")
        child.send_signal(number)
        assert child.wait(DEADLINE_S) != 0
    finally:
        child.kill()
        child.wait()
    assert not target.exists()
    fetch(server, target)
    assert server.ranges_asked() == ["", "bytes=600000-"]
